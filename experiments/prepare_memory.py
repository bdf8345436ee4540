"""Peak memory of preparing texts of several sizes, over all processes, and the cost of a kill.

    python experiments/prepare_memory.py --text=TEXTS.jsonl.gz --megabytes=100,2000

The documents of TEXTS are repeated, each line with a number of its own. Prints a line of JSON for
each size: the largest sum of proportional set sizes (Linux's PSS) of prepare.py and its workers,
looked at ten times a second. For the first size, also the seconds of a preparation that is killed
half-way, and those of the same command after it.
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
sys.path.insert(0, str(ROOT))
from configurator import UserError, run  # noqa: E402


def main(
    text="",  # a .jsonl.gz file with a field text
    megabytes="100,2000",  # sizes of the texts that are prepared
):
    if not Path(text).is_file():
        raise UserError(f"text={text!r}: no such file; name a .jsonl.gz file")
    try:
        sizes = [float(size) for size in megabytes.split(",")]
    except ValueError:
        raise UserError(f"megabytes={megabytes!r}: write numbers, such as 100,2000") from None

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = folder / "texts.jsonl"
        for number, size in enumerate(sizes):
            write_texts(text, texts, size * 1e6)
            whole = folder / f"whole{number}"
            seconds, peak = prepare(texts, whole)
            row = {"megabytes": round(os.path.getsize(texts) / 1e6), "seconds": round(seconds, 1),
                   "peak_pss_mb": round(peak)}
            if number == 0:
                row |= cost_of_a_kill(texts, whole, folder / "killed", seconds / 2)
            print(json.dumps(row), flush=True)


def write_texts(source, target, limit):
    """Write documents of so many characters, from the source again and again; number each line, so
    that no two are equal."""
    written = line_number = 0
    with open(target, "w", encoding="utf-8") as out:
        while written < limit:
            with gzip.open(source, "rt", encoding="utf-8") as file:
                for row in file:
                    lines = json.loads(row)["text"].split("\n")
                    numbered = [f"{line_number + i} {line}" for i, line in enumerate(lines)]
                    line_number += len(lines)
                    written += out.write(json.dumps({"text": "\n".join(numbered)}) + "\n")
                    if written >= limit:
                        break


def prepare(texts, folder, kill_after=None):
    """Run prepare.py; kill it after so many seconds. Return (its seconds, its peak PSS in MB)."""
    began = time.perf_counter()
    peak = 0
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", f"--input={texts}",
                                f"--dataset={folder}", "--tokenizer=gpt2", "--workers=2",
                                "--shard_tokens=10000000"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, proportional_memory(process.pid))
        time.sleep(0.1)
        if kill_after and time.perf_counter() - began > kill_after:
            process.kill()
    if process.returncode not in (0, -signal.SIGKILL):  # prepare.py has said why
        raise UserError(f"prepare.py ended with exit code {process.returncode}")
    return time.perf_counter() - began, peak


def proportional_memory(pid):
    """Return the proportional set size of a process and its children, in MB."""
    try:
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    own = re.search(r"^Pss:\s+(\d+)", memory, flags=re.MULTILINE)
    kilobytes = int(own[1]) if own else 0
    return kilobytes / 1e3 + sum(proportional_memory(int(child)) for child in children)


def cost_of_a_kill(texts, whole, folder, kill_after):
    """Kill a preparation and run it again; return both times, and whether the result is the same
    as the one in `whole`."""
    killed, _ = prepare(texts, folder, kill_after)
    resumed, _ = prepare(texts, folder)
    same = [(folder / path.name).read_bytes() == path.read_bytes() for path in whole.glob("*.bin")]
    return {"killed_after_s": round(killed, 1), "then_s": round(resumed, 1), "same": all(same)}


if __name__ == "__main__":
    run(main)
