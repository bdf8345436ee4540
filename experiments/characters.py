"""nanoGPT's two character models by the clock: whole processes, nanoGPT's and then ours.

    python experiments/characters.py --compare=DIR                    # 4 layers, 128 wide, to 1.88
    python experiments/characters.py --compare=DIR --size=large --minutes=40

DIR is a checkout of nanoGPT, both have prepared shakespeare_char. The small one runs nanoGPT's
README command to its end. Of the large one nanoGPT runs `iterations` iterations, and its time to
NANOGPT_BEST is worked out from them; ours gets so many minutes, and its schedule follows them.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import UserError, run  # noqa: E402

NANOGPT_BEST = 1750  # iterations to its best loss, 1.47 to 1.48 (its README; its issue 211)
SIZES = {"small": ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64",
                   "--dropout=0.0"], "large": []}
THEIRS = {"small": ["--batch_size=12", "--eval_iters=20", "--max_iters=2000",
                    "--lr_decay_iters=2000"],
          "large": ["--eval_iters=1", "--log_interval=1"]}
OURS = {"small": ["--max_iters=160", "--lr_decay_iters=160", "--muon_lr=0.07", "--eval_iters=15",
                  "--eval_interval=160"],
        "large": ["--max_iters=100000"]}


def main(
    compare="",  # a checkout of nanoGPT
    size="small",  # or large
    repeats=3,  # small: of both, by turns
    iterations=4,  # large: of nanoGPT
    minutes=30.0,  # large: ours
    out_dir="out/characters",  # of our last run
):
    if size not in SIZES:
        raise UserError(f"size={size!r}: choose {' or '.join(SIZES)}")
    if not (Path(compare) / "train.py").is_file():
        raise UserError(f"compare={compare!r}: no train.py there; name a checkout of nanoGPT")
    large = size == "large"
    limit = [f"--max_iters={iterations}", "--eval_interval=100000"] if large else []
    commands = {
        "nanoGPT": (compare, ["config/train_shakespeare_char.py", "--device=cpu",
                              "--compile=False", *SIZES[size], *THEIRS[size], *limit]),
        "ours": (ROOT, ["config/train_shakespeare_char_modern.py", "--device=cpu", *SIZES[size],
                        *OURS[size], f"--out_dir={Path(out_dir).resolve()}",
                        *[f"--max_minutes={minutes}"] * large])}
    seconds = {name: [] for name in commands}
    for _ in range(1 if large else repeats):
        for name, (folder, flags) in commands.items():
            spent, text = timed(folder, flags)
            losses = [float(loss) for loss in re.findall(r"val[_ ]loss ([\d.]+)", text)]
            each = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", text)][1:]
            seconds[name].append(spent)
            if large and name == "nanoGPT":
                seconds[name][-1] = spent = NANOGPT_BEST * statistics.median(each) / 1000
            print(json.dumps({"who": name, "size": size, "seconds": round(spent, 2),
                              "val_losses": losses, **({"ms": each} if large else {})}), flush=True)
    _, text = timed(ROOT, ["--init_from=resume", f"--out_dir={Path(out_dir).resolve()}",
                           "--eval_only=True", "--eval_iters=100"])
    print(re.search(r"step .*", text)[0])
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    medians = [f"{name} {statistics.median(found):.1f}" for name, found in seconds.items()]
    print(f"seconds: {', '.join(medians)}; {statistics.median(ratios):.1f} times as fast "
          f"({min(ratios):.1f} to {max(ratios):.1f})")


def timed(folder, flags):
    """Return (seconds of the whole process, what it printed)."""
    with tempfile.TemporaryDirectory() as aside:
        if folder != ROOT:
            flags = [*flags, f"--out_dir={aside}"]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", *flags], cwd=folder, text=True,
                              capture_output=True)
        if done.returncode:
            raise UserError(f"{folder}: train.py ended with {done.returncode}: "
                             f"{done.stderr.strip()[-300:]}")
        return time.perf_counter() - began, done.stdout


if __name__ == "__main__":
    run(main)
