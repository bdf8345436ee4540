"""Time train.py's own step on this machine.

    python bench.py config/train_stdlib.py                   # any of train.py's settings
    python bench.py --random=True --n_layer=6 --compile=True # random tokens: no dataset needed
    python bench.py config/train_stdlib.py --profile=True    # where the time goes

After warm-up each iteration is timed alone. Prints the median, the spread, tokens/s, MFU where the
hardware's peak is known, the share of the batch source, and peak memory.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch

import train
from configurator import run
from metrics import mfu
from model import GPT, GPTConfig
from runtime import compile_model, describe, setup
from tokens import Mixture, load_meta, parse_mix


def main(
    iterations=20,  # that are timed
    warmup=5,  # that are not, before them
    random=False,  # random tokens instead of the dataset's
    profile=False,  # write a torch.profiler trace and print the operators that take longest
    trace="bench_trace.json",  # the trace's file, for ui.perfetto.dev
    **settings,
):
    for key, value in (("iterations", iterations), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{key}={value}: must be 1 or more")
    train.check(settings)
    runtime = setup(settings["device"], settings["dtype"], settings["backend"])
    micro_steps = train.split_batch(settings, runtime.world_size)
    mix = parse_mix(settings["mix"], settings["dataset"])
    meta = None if random else load_meta(next(iter(mix)))
    vocab_size = meta["vocab_size"] if meta else 50257
    sizes = {key: settings[key] for key in train.MODEL_KEYS}
    model = GPT(GPTConfig(vocab_size=train.padded(vocab_size), **sizes)).to(runtime.device)
    data = (RandomTokens(vocab_size, settings["block_size"]) if random else
            Mixture(mix, "train", settings["block_size"]))
    optimizer = train.make_optimizer(model, settings, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    wrapped = compile_model(runtime.wrap(model), settings["compile"], runtime)
    runtime.say(f"{describe(runtime)}; torch {torch.__version__}; "
                f"{model.parameter_count():,} parameters")

    def iteration(number):
        """Return the seconds of (reading the batches, the whole iteration)."""
        began = time.perf_counter()
        batches = train.load_batches(data, number, micro_steps, settings, model, runtime)
        read = time.perf_counter() - began
        train.train_step(wrapped, optimizer, scaler, batches, settings["grad_clip"], runtime)
        runtime.synchronize()
        return read, time.perf_counter() - began

    for number in range(warmup):
        iteration(number)
    if profile:
        print_profile(iteration, warmup, trace, runtime)
    else:
        times = [iteration(warmup + number) for number in range(iterations)]
        tokens = micro_steps * runtime.world_size * settings["batch_size"] * settings["block_size"]
        print_times(times, tokens, model, runtime)
    runtime.close()


class RandomTokens:
    """Stands in for a Mixture: ids drawn anew for each iteration, from a seed of its number."""

    folder = "random tokens"

    def __init__(self, vocab_size, block_size):
        self.vocab_size, self.block_size = vocab_size, block_size

    def sequences(self, numbers, seed):
        rng = np.random.default_rng(int(numbers[0]))
        return rng.integers(0, self.vocab_size, (len(numbers), self.block_size + 1)), None


def print_times(times, tokens, model, runtime):
    """Print the table; the last line is the same as JSON."""
    whole = sorted(seconds for _, seconds in times)
    median = statistics.median(whole)
    row = {
        "ms_median": 1000 * median,
        "ms_min": 1000 * whole[0],
        "ms_max": 1000 * whole[-1],
        "tokens_per_s": tokens / median,
        **mfu(model, tokens / median, runtime),
        "batch_source_share": statistics.median(read / seconds for read, seconds in times),
        "peak_memory_mb": peak_memory(runtime) / 1e6,
    }
    for key, value in row.items():
        runtime.say(f"{key:<20} {value:>12,.4g}" if value < 10 else f"{key:<20} {value:>12,.1f}")
    runtime.say(json.dumps({**row, "iterations": len(times), "tokens_per_iter": tokens}))


def peak_memory(runtime):
    """Return the most bytes held so far: the GPU's tensors, or the process's resident memory."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_profile(iteration, first, trace, runtime):
    """Profile three iterations: the operators that take longest, and a trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(3):
            iteration(first + number)
    key = f"self_{'cuda' if runtime.device.type == 'cuda' else 'cpu'}_time_total"
    runtime.say(profiler.key_averages().table(sort_by=key, row_limit=15))
    if runtime.is_main:
        profiler.export_chrome_trace(trace)
        print(f"trace: {trace}")


if __name__ == "__main__":
    run(main, base=train.main)
