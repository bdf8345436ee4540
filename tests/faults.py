"""Kill, fill, corrupt and fuzz: what a training run survives, counted.

    python tests/faults.py --minutes=10 --seed=1  # prints kills, resumes, equal, lost, tracebacks

Runs are tiny, in processes of their own. A killed run must end as the uninterrupted one, metrics
and weights bit for bit; whatever else is done to it ends in one line, never in a traceback.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUN = ("import sys, train, configurator; train.draw_loss = id; "
       "configurator.run(train.main, more_defaults=train.checkpoint_defaults)")
FLAGS = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=13", "--batch_size=2",
         "--gradient_accumulation_steps=2", "--max_iters=60", "--eval_interval=3", "--eval_iters=2",
         "--learning_rate=1e-2", "--warmup_iters=2", "--dropout=0.1", "--device=cpu",
         "--dtype=float32", "--compile=False"]


def main(minutes=10.0, seed=1):
    rng, counts, ends = random.Random(seed), Counter(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_data(folder)
        began = time.monotonic()
        run_of(folder / "whole", data)
        seconds = time.monotonic() - began
        counts["fuzzed"] = fuzz(rng, 1000, counts)
        rounds = [lambda: kill(rng, folder, data, seconds, counts),
                  lambda: fill(rng, folder, data, counts),
                  lambda: corrupt_checkpoint(rng, folder, data, counts),
                  lambda: corrupt_tokens(rng, folder, data, counts)]
        for number in range(10**9):
            if number >= len(rounds) and time.monotonic() > ends:
                break
            rounds[number % len(rounds)]()
    print(json.dumps(dict(sorted(counts.items()))))
    return counts


def prepare_data(folder):
    import prepare

    rng = random.Random(7)
    words = "the cat sat on a mat and saw dog run".split()
    (folder / "words.txt").write_text(
        ".\n".join(" ".join(rng.choices(words, k=7)) for _ in range(90)))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(dataset=f"{folder}/data", input=f"{folder}/words.txt", tokenizer="chars")
    return folder / "data"


def start(out_dir, data, *flags, **options):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *FLAGS, f"--out_dir={out_dir}", f"--dataset={data}",
         "--init_from=auto", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def run_of(out_dir, data, *flags, counts=None, **options):
    """Run to the end; return (exit code, error output). Counts a traceback, and says it."""
    process = start(out_dir, data, *flags, **options)
    _, error = process.communicate()
    if counts is None:
        assert process.returncode == 0, error
    elif "Traceback" in error or process.returncode not in (0, 2):
        counts["tracebacks"] += 1
        print(error, file=sys.stderr)
    return process.returncode, error


def end_of(out_dir):
    """Return what must be equal: the metrics without their timings, the last weights."""
    rows = [json.loads(line) for line in open(out_dir / "metrics.jsonl")]
    rows = [{key: value for key, value in row.items()
             if key not in ("ms", "tokens_per_s", "mfu")} for row in rows]
    last = (out_dir / "latest").read_text().strip()
    return rows, (out_dir / last / "model.safetensors").read_bytes()


def compare(folder, counts):
    equal = end_of(folder / "run") == end_of(folder / "whole")
    counts["equal" if equal else "lost"] += 1


def kill(rng, folder, data, seconds, counts):
    """Kill one run several times, at random moments and while a checkpoint is being written."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(rng.randint(1, 5)):
        process = start(out, data)
        if rng.random() < 0.5:  # as soon as the next checkpoint is being written, or a bit later
            until, seen = time.monotonic() + seconds, set(out.glob("iter_*"))
            while process.poll() is None and time.monotonic() < until:
                if set(out.glob("iter_*.tmp")) - seen:
                    time.sleep(rng.random() * 0.01)
                    counts["kills_while_saving"] += 1
                    break
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 1) * seconds)
        if process.poll() is None:
            process.kill()
            counts["kills"] += 1
        error = process.communicate()[1]
        counts["tracebacks"] += "Traceback" in error
    run_of(out, data, counts=counts)
    counts["resumes"] += 1
    compare(folder, counts)


def fill(rng, folder, data, counts):
    """Let no file grow beyond a size, as on a full disk; then make room and resume."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    limit = rng.randint(500, 30_000)
    code, error = run_of(out, data, counts=counts, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    counts["filled"] += code == 2 and error.count("\n") == 1
    run_of(out, data, counts=counts)
    counts["resumes"] += 1
    compare(folder, counts)


def change(rng, path):
    """Change a few bytes of a file, cut it short, empty it or remove it."""
    raw, how = bytearray(path.read_bytes()), rng.choice(["bytes", "bytes", "cut", "empty", "gone"])
    if how == "gone":
        return path.unlink()
    for _ in range(rng.randint(1, 4) if how == "bytes" else 0):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    end = {"bytes": len(raw), "cut": rng.randrange(len(raw)), "empty": 0}[how]
    path.write_bytes(raw[:end])


def corrupt_checkpoint(rng, folder, data, counts):
    """Damage a file of the newest checkpoint, or a pointer, of a run that was stopped halfway."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    run_of(out, data, "--max_iters=30", "--lr_decay_iters=600000")
    newest = out / (out / "latest").read_text().strip()
    change(rng, rng.choice([*newest.iterdir(), out / "latest", out / "best"]))
    code, _ = run_of(out, data, "--max_iters=60", counts=counts)
    counts["checkpoints_corrupted"] += 1
    if code == 0:
        counts["resumes"] += 1
        compare(folder, counts)
    else:
        counts["refused"] += 1


def corrupt_tokens(rng, folder, data, counts):
    """Damage a file of the dataset: the run is refused, or goes on with other tokens."""
    out, copy = folder / "run", folder / "copy"
    for path in (out, copy):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(data, copy)
    change(rng, rng.choice([path for path in copy.iterdir() if path.is_file()]))
    code, _ = run_of(out, copy, "--max_iters=10", counts=counts)
    counts["datasets_corrupted"] += 1
    counts["refused"] += code == 2


def fuzz(rng, number, counts):
    """Call train's command line with that many sets of wrong and right settings, in this process:
    those that pass the checks end before a model is made."""
    import configurator
    import train

    keys = list(configurator.keyword_defaults(train.main))
    values = ["", "0", "-1", "1", "7", "1e400", "nan", "0.5", "True", "a:1,b:2", "\x00", "é", "=",
              "99999999999999999999", "../..", "/dev/null", "[]", "None", "a:,", ":1", "cuda:99"]
    lines = ["batch_size = None", "import os", "x = 1", "def f(:", "raise SystemExit('no')", "1/0",
             "n_layer = '3'", "dataset = b'x'", "seed = 2", "learning_rate = [1]", "\x00", "é = 1"]
    stop = ValueError("far enough")

    class Enough(Exception):
        pass

    def enough(*args):
        raise Enough from stop

    setup, train.setup = train.setup, enough
    try:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(number):
                config = Path(folder) / "config.py"
                config.write_text("\n".join(rng.choices(lines, k=rng.randint(0, 3))), "utf-8")
                argv = [rng.choice(["--", "--", "--", "-", ""]) + rng.choice([
                    rng.choice(keys), rng.choice(keys)[:-1]]) + rng.choice(["=", "=", " "])
                    + rng.choice(values) for _ in range(rng.randint(0, 4))]
                argv += [str(config)] * rng.randint(0, 1)
                error = io.StringIO()
                try:
                    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(error):
                        configurator.run(train.main, more_defaults=train.checkpoint_defaults,
                                         argv=argv)
                except (Enough, SystemExit):
                    counts["fuzzed_refused"] += "error:" in error.getvalue()
                except BaseException as wrong:
                    counts["tracebacks"] += 1
                    print(f"{argv}\n{config.read_text('utf-8')}\n{wrong!r}", file=sys.stderr)
    finally:
        train.setup = setup
    return number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    found = main(**vars(parser.parse_args()))
    sys.exit(1 if found["lost"] or found["tracebacks"] else 0)
