"""Tokenize one text with flatgpt, raw tiktoken and nanoGPT's openwebtext script, by turns.

    python experiments/prepare_speed.py TEXTS.jsonl.gz NANOGPT REPEATS [MEGABYTES]

TEXTS' column "text" is cut into documents of about 5 kB, as web pages are. nanoGPT's script is run
as it is, but load_dataset reads those documents and total_batches is 8 (its 1024 wants at least as
many validation documents). Prints a line of JSON for each run: seconds of the whole process, and of
encoding alone for raw tiktoken.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAW = """
import json, sys, time, tiktoken
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
encode = tiktoken.get_encoding("gpt2").encode_ordinary_batch
began, tokens = time.perf_counter(), 0
for i in range(0, len(texts), 1024):
    tokens += sum(map(len, encode(texts[i:i + 1024], num_threads=int(sys.argv[2]))))
print(json.dumps({"encoding_s": time.perf_counter() - began, "tokens": tokens}))
"""
NANO = """
import runpy, sys, datasets
own = datasets.load_dataset
datasets.load_dataset = lambda name, num_proc: own("json", data_files=sys.argv[1])
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def main(source, nanogpt, repeats, megabytes=100):
    megabytes = float(megabytes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts, size, number = folder / "texts.jsonl", 0, 0
        with gzip.open(source, "rt", encoding="utf-8") as file, open(texts, "w") as out:
            for line in file:
                text = json.loads(line)["text"]
                for i in range(0, len(text), 5000):
                    number += 1
                    size += out.write(json.dumps({"text": text[i:i + 5000]}) + "\n")
                if size > megabytes * 1e6:
                    break
        script = (Path(nanogpt) / "data/openwebtext/prepare.py").read_text()
        (folder / "owt").mkdir()
        (folder / "owt/prepare.py").write_text(script.replace("total_batches = 1024",
                                                              "total_batches = 8"))
        print(json.dumps({"documents": number, "characters_of_json": size}), flush=True)
        for repeat in range(int(repeats)):
            for name, command in {
                **{f"flatgpt, {n} workers": [
                    str(ROOT / "prepare.py"), f"--input={texts}", f"--dataset={folder}/ours{n}",
                    "--tokenizer=gpt2", f"--workers={n}", "--val_fraction=0.0005",
                    "--overwrite=True"] for n in (1, 2)},
                **{f"tiktoken, {n} threads": ["-c", RAW, str(texts), str(n)] for n in (1, 2)},
                "nanoGPT": ["-c", NANO, str(texts), str(folder / "owt/prepare.py")],
            }.items():
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                                      env={**os.environ,
                                           "HF_DATASETS_CACHE": f"{folder}/cache{repeat}"})
                seconds = time.perf_counter() - began
                assert done.returncode == 0, done.stderr[-2000:]
                row = {"repeat": repeat, "what": name, "seconds": round(seconds, 2)}
                if name.startswith("tiktoken"):
                    row |= json.loads(done.stdout)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
