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
from configurator import configure  # noqa: E402
from formats.checkpoint import Checkpoints  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.processes import setup  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402


def main(repeats, flags):
    config = configure(train.main, ["--gradient_accumulation_steps=1", "--block_size=256", *flags])
    runtime = setup(config["device"], config["dtype"])
    model = GPT(GPTConfig(**{key: config[key] for key in train.MODEL_KEYS}))
    runtime.wrap(model)
    optimizer = train.make_optimizer(model, config, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
    tokens = torch.randint(50257, (config["batch_size"], config["block_size"]))
    tokens = tokens.to(runtime.device)

    def iteration():
        began = time.perf_counter()
        train.train_step(model, optimizer, scaler, [(tokens, tokens)], 1.0, runtime)
        runtime.synchronize()
        return time.perf_counter() - began

    times = {key: [] for key in ("iteration", "wait", "next", "wait async", "next async")}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").touch()
        kinds = [Checkpoints(Path(folder), model, Tokenizer({"kind": "bytes"}), optimizer, scaler,
                             1, kind, runtime) for kind in (False, True)]
        iteration(), iteration()
        for number in range(2, 2 + 2 * repeats + 2):
            times["iteration"] += [iteration(), iteration()]
            checkpoints, end = kinds[number % 2], " async" * (number % 2)
            began = time.perf_counter()
            checkpoints.save({"iter_num": number}, False)
            times["wait" + end].append(time.perf_counter() - began)
            times["next" + end].append(iteration())
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
