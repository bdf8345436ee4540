"""Turn another program's weights into a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path

from configurator import UserError, run
from formats.checkpoint import save_weights
from formats.files import write_atomically
from formats.huggingface import SIZES, load_gpt2
from text.tokenizer import Tokenizer, gpt2_spec


def main(
    source="gpt2",  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the folder of a saved GPT-2
    out_dir="",  # the checkpoint's folder ('': out/<source>)
):
    folder = Path(out_dir or Path("out", Path(source).resolve().name))
    if source not in SIZES and folder.resolve() == Path(source).resolve():
        raise UserError(f"out_dir={out_dir!r} is the source, which would be lost; name another")
    model, tokenizer = load_gpt2(source), Tokenizer(gpt2_spec())
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    tokenizer.save(folder)
    write_atomically(folder / "meta.json", json.dumps({"model": asdict(model.config), "source": source},
                                                 indent=1) + "\n")
    print(f"{folder}: {model.parameter_count():,} parameters; "
          f"sample from it with python sample.py --init_from={folder}")


if __name__ == "__main__":
    run(main)
