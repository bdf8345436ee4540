"""What all tests share: the repository on the path, and GPT-2's tokenizer where it is at hand."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores
CACHE = ROOT.parent / "shared/data/tiktoken_cache"
if CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))
