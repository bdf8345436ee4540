"""Peak memory of preparing texts of several sizes, over all processes, and the cost of a kill.

    python experiments/prepare_memory.py TEXTS.jsonl.gz 100 2000      # megabytes

TEXTS are repeated, each line with a number of its own. Prints a line of JSON for each size: the
largest sum of proportional set sizes (Linux's PSS) of prepare.py and its workers, looked at ten
times a second; and for the first size what it takes if it is killed half-way and goes on.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pss(pid):
    """Return the proportional set size of a process and its children, in MB."""
    try:
        own = int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(),
                            flags=re.M)[1]) / 1e3
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, TypeError):
        return 0
    return own + sum(pss(int(child)) for child in children)


def prepare(texts, folder, kill_after=None):
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", f"--input={texts}",
                                f"--dataset={folder}", "--tokenizer=gpt2", "--workers=2",
                                "--shard_tokens=10000000"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, pss(process.pid))
        time.sleep(0.1)
        if kill_after and time.perf_counter() - began > kill_after:
            process.send_signal(signal.SIGKILL)
    return time.perf_counter() - began, peak


def main(source, *sizes):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, megabytes in enumerate(map(float, sizes)):
            texts, written, line_number = folder / "texts.jsonl", 0, 0
            with open(texts, "w", encoding="utf-8") as out:
                while written < megabytes * 1e6:
                    with gzip.open(source, "rt", encoding="utf-8") as file:
                        for row in file:
                            lines = json.loads(row)["text"].split("\n")
                            text = "\n".join(f"{line_number + i} {line}"
                                             for i, line in enumerate(lines))
                            line_number += len(lines)
                            written += out.write(json.dumps({"text": text}) + "\n")
                            if written >= megabytes * 1e6:
                                break
            seconds, peak = prepare(texts, folder / f"whole{number}")
            row = {"megabytes": round(os.path.getsize(texts) / 1e6), "seconds": round(seconds, 1),
                   "peak_pss_mb": round(peak)}
            if not number:
                row["killed_after_s"] = round(prepare(texts, folder / "killed", seconds / 2)[0], 1)
                row["then_s"] = round(prepare(texts, folder / "killed")[0], 1)
                row["same"] = all((folder / "killed" / path.name).read_bytes() == path.read_bytes()
                                  for path in (folder / "whole0").glob("*.bin"))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
