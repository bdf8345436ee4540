"""nanoGPT's command: the same as python prepare.py --dataset=openwebtext, from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from configurator import run  # noqa: E402
from prepare import main  # noqa: E402

if __name__ == "__main__":
    run(main, argv=["--dataset=openwebtext", *sys.argv[1:]])
