"""How long a run waits for a checkpoint, written at once and in the background.

    python experiments/checkpoint_stall.py 5 --n_layer=6 --n_head=6 --n_embd=384 --batch_size=8

Times train.py's own step with random tokens; every third iteration is followed by a checkpoint, of
either kind by turns, so many times each. Prints, in iterations, the time until the run goes on, and
how much longer the next iteration takes, while the thread is writing. The last line is JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bench import RandomTokens  # noqa: E402
from checkpoint import Checkpoints  # noqa: E402
from configurator import configure  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime import setup  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def main(repeats, flags):
    config = configure(train.main, ["--gradient_accumulation_steps=1", "--block_size=256", *flags])
    runtime = setup(config["device"], config["dtype"])
    model = GPT(GPTConfig(**{key: config[key] for key in train.MODEL_KEYS}))
    runtime.wrap(model)
    optimizer = train.make_optimizer(model, config, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
    data = RandomTokens(50257, config["block_size"])

    def iteration(number):
        began = time.perf_counter()
        batches = train.load_batches(data, number, 1, config, model, runtime)
        train.train_step(model, optimizer, scaler, batches, 1.0, runtime)
        runtime.synchronize()
        return time.perf_counter() - began

    times = {key: [] for key in ("iteration", "wait", "next", "wait async", "next async")}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        Path(folder, "metrics.jsonl").touch()
        kinds = [Checkpoints(Path(folder), model, Tokenizer({"kind": "bytes"}), optimizer, scaler,
                             1, kind, runtime) for kind in (False, True)]
        iteration(0), iteration(1)
        for number in range(2, 2 + 2 * repeats + 2):
            times["iteration"] += [iteration(3 * number), iteration(3 * number + 1)]
            checkpoints, end = kinds[number % 2], " async" * (number % 2)
            began = time.perf_counter()
            checkpoints.save({"iter_num": number}, False)
            times["wait" + end].append(time.perf_counter() - began)
            times["next" + end].append(iteration(3 * number + 2))
            checkpoints.wait()
        kinds[1].thread.shutdown()
    base = statistics.median(times["iteration"])
    row = {"iteration_s": base, "parameters": model.parameter_count()}
    for key in ("wait", "wait async", "next", "next async"):  # each kind's first one allocates
        found = [seconds / base - key.startswith("next") for seconds in times[key][1:]]
        row[key] = [min(found), statistics.median(found), max(found)]
        print(f"{key:<12} {row[key][1]:.2f} iterations ({row[key][0]:.2f} to {row[key][2]:.2f})")
    print(json.dumps(row))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
