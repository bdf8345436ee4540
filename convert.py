"""Convert GPT-2's weights into a checkpoint, from which sample.py and train.py can start.

    python convert.py --source=gpt2                       # OpenAI's weights, from Hugging Face
    python convert.py --source=FOLDER --out_dir=out/mine  # a GPT-2 that transformers has saved

Reads config.json and model.safetensors; the tokenizer is always GPT-2's. Writes model.safetensors,
tokenizer.json and meta.json, and prints the command that samples from them.
"""

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
    out_dir="",  # the checkpoint's folder; '': out/<source>
):
    # Where to write: never over the source.
    folder = Path(out_dir)
    if not out_dir:
        folder = Path("out", Path(source).resolve().name)
    if source not in SIZES and folder.resolve() == Path(source).resolve():
        raise UserError(f"out_dir={out_dir!r} is the source, which would be overwritten; name "
                        "another folder")

    # Read everything before anything is written.
    model = load_gpt2(source)
    tokenizer = Tokenizer(gpt2_spec())

    # Write the checkpoint. meta.json comes last, because without it nothing can be loaded.
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    tokenizer.save(folder)
    meta = {"model": asdict(model.config), "source": source}
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    print(f"{folder}: {model.parameter_count():,} parameters; "
          f"sample from it with python sample.py --init_from={folder}")


if __name__ == "__main__":
    run(main)
