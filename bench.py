"""Benchmarks: training, sampling, evaluating, preparing, memory, start-up; ours beside others.

    python bench.py config/train_stdlib.py                    # train.py's settings, 1 micro-step
    python bench.py --random=True --n_layer=6 --compile=True  # random tokens: no dataset needed
    python bench.py config/train_stdlib.py --profile=True     # where an iteration's time goes
    python bench.py --suite=sample --compare=DIR --repeats=5  # beside the nanoGPT in DIR
    python bench.py --suite=sample --compare=transformers     # beside Hugging Face's generate
    python bench.py --suite=evaluate --compare=lm_eval        # beside EleutherAI's harness

It first measures how fast this machine multiplies and reads memory, which limits the tokens/s. Then
it measures ours and theirs in turn, in a new process each time, and prints each figure's median,
minimum and maximum over the repeats, and those of the ratio of ours to theirs within a repeat.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from configurator import UserError, check_settings, keyword_defaults, run

# Those come before torch: they set how long its threads spin (runtime/__init__.py).
# isort: split
import numpy as np
import torch

import train
from documents.corpus import Files
from evaluation.speed import time_questions
from formats.dataset import read_dataset_meta
from formats.files import naming_write_errors
from formats.weights import empty_model
from inference.generate import Sampling, generate, prepare_model
from model import GPT
from runtime.child import figures_of_python, run_python
from runtime.cpu import tune_cpu
from runtime.device import pick_device, pick_dtype
from runtime.kernels import can_compile, compiles_by_default, pick_attention
from runtime.memory import peak_memory, resident_memory
from runtime.processes import is_main_process, launched_by_torchrun, setup
from runtime.profiler import profile as profile_operators
from runtime.speed import comparison_table, flops_per_token, measure_machine
from text.tokenizer import load_tokenizer
from training.batches import BatchSource
from training.log import mfu
from training.sequences import Mixture, parse_mix
from training.setup import (
    build_training,
    check_combinations,
    follow_documents,
    memory_needed,
    model_config,
    split_batch,
)

ROOT = Path(__file__).resolve().parent
PEERS = str(ROOT / "experiments" / "peers.py")
OURS = "flatgpt"
GPT2_VOCABULARY = 50257
DEFAULTS = {"gradient_accumulation_steps": 1}  # instead of train.py's
TEXTS = "texts.jsonl"  # what suite prepare prepares, in a temporary folder
LIMITS = {"suite": ("train", "sample", "evaluate", "prepare", "memory", "start"),
          "iterations": ">= 1", "warmup": ">= 1", "repeats": ">= 1", "new_tokens": ">= 1",
          "samples": ">= 1", "questions": ">= 1"}
LIBRARIES = {"transformers": "sample", "lm_eval": "evaluate"}  # which suite compares with them


def main(
    suite="train",  # what to measure: train, sample, evaluate, prepare, memory or start
    compare="",  # a folder with nanoGPT, measured in turn with ours; or transformers, or lm_eval
    repeats=3,  # processes on each side
    log="",  # a file to which each repeat is appended as a line of JSON
    iterations=20,  # train: timed iterations
    warmup=5,  # train: iterations before them that are not timed
    random=False,  # train, memory: random tokens of GPT-2's vocabulary instead of a dataset's
    profile=False,  # train: write a torch.profiler trace, print the operators that take longest
    trace="bench_trace.json",  # the trace's file, for ui.perfetto.dev
    new_tokens=200,  # sample: tokens drawn after a prompt of one token, greedily
    samples=1,  # sample: sequences drawn together; the others always draw one
    questions=100,  # evaluate: each with four choices, as long as HellaSwag's
    text="",  # prepare: a .jsonl or .jsonl.gz with a field text; '': Python's standard library
    megabytes=20.0,  # prepare: how much of it, cut into documents of 5,000 characters
    child=False,  # measure ours once, in this process, and print it as JSON
    **settings,
):
    options = {key: value for key, value in locals().items() if key != "settings"}
    c = SimpleNamespace(**options, **settings)
    with tempfile.TemporaryDirectory() as folder:
        # A child gets the folder of random tokens from its parent.
        if c.random and not c.child:
            c.dataset, c.mix = write_random_tokens(Path(folder)), ""
        check(c)

        # As the child of another bench.py, or one of torchrun's processes: measure ours here.
        if c.child or c.profile or launched_by_torchrun():
            time_ours = {"sample": time_samples, "evaluate": time_scores}.get(c.suite, time_steps)
            figures = time_ours(c)
            if figures and is_main_process():
                print(json.dumps(figures))
            return

        # Measure the machine.
        device = pick_device(c.device)
        machine = measure_machine(device)
        limit = limit_of_tokens_per_s(c, device, machine)
        print("this machine: " + ", ".join(f"{key} {rate:,.1f}" for key, rate in machine.items()))
        append_log(c.log, {"argv": sys.argv[1:], "torch": torch.__version__, "device": str(device),
                           "threads": torch.get_num_threads(), **machine})

        # Who is compared: ours first.
        sides = [OURS]
        if c.suite == "prepare":
            write_texts(c.text, c.megabytes, Path(folder, TEXTS))
            sides.append("tiktoken")
        if c.compare:
            sides.append(Path(c.compare).resolve().name)

        # Measure all sides in turn, so that each meets the same changes of the machine's speed.
        rows = {side: [] for side in sides}
        for repeat in range(c.repeats):
            for side in sides:
                print(f"repeat {repeat + 1} of {c.repeats}: {side}", file=sys.stderr, flush=True)
                row = measure(side, c, device, Path(folder))
                if limit:
                    row["of_the_limit"] = row["tokens_per_s"] / limit
                    # The limit is that of one sequence, and the others draw one.
                    if side == OURS and c.suite == "sample":
                        row["of_the_limit"] /= c.samples
                rows[side].append(row)
                append_log(c.log, {"suite": c.suite, "side": side, "repeat": repeat, **row})
    print(comparison_table(rows))


def write_random_tokens(folder):
    """Write a dataset of random tokens in nanoGPT's layout, which both sides read; return it."""
    for split, count in (("train", 2_000_000), ("val", 200_000)):
        tokens = np.random.default_rng(count).integers(0, GPT2_VOCABULARY, count, np.uint16)
        tokens.tofile(folder / f"{split}.bin")
    return str(folder)


def check(c):
    """Raise UserError for what cannot be measured."""
    check_settings(vars(c), LIMITS | train.LIMITS)
    check_combinations(c)
    if c.profile and c.suite != "train":
        raise UserError(f"profile=True: suite={c.suite} has none, suite=train has")
    if c.suite != LIBRARIES.get(c.compare, c.suite):
        raise UserError(f"compare={c.compare!r}: is for suite={LIBRARIES[c.compare]}; name a "
                        "folder with nanoGPT")
    if c.suite == "evaluate" and c.compare not in ("", "lm_eval"):
        raise UserError(f"compare={c.compare!r}: suite=evaluate compares with lm_eval alone")
    if c.compare in ("", *LIBRARIES):
        return

    # The other side must be a nanoGPT, and its dataset must be prepared.
    scripts = {"prepare": "data/openwebtext/prepare.py", "sample": "model.py"}
    script = scripts.get(c.suite, "train.py")
    if not Path(c.compare, script).is_file():
        raise UserError(f"compare={c.compare!r}: has no {script}; give the folder of a nanoGPT")
    tokens = Path(c.compare, "data", c.dataset, "train.bin")
    if script == "train.py" and not tokens.is_file():
        raise UserError(f"{tokens} is missing; prepare it there")


def limit_of_tokens_per_s(c, device, machine):
    """Return the tokens/s of one sequence that this machine allows; None for the other suites.

    Training cannot be faster than its matrix products, and sampling not faster than reading every
    weight for every token.
    """
    # The other suites have no such limit.
    if c.suite not in ("train", "sample"):
        return None
    model = empty_model(model_config(c, vocabulary_size(c)))
    dtype = pick_dtype(c.dtype, device)
    if c.suite == "sample":
        return machine["read_gb_per_s"] * 1e9 / (dtype.itemsize * model.parameter_count())
    if dtype == torch.float32:
        return machine["float32_gflop_per_s"] * 1e9 / flops_per_token(model)
    return machine["bfloat16_gflop_per_s"] * 1e9 / flops_per_token(model)


def vocabulary_size(c):
    """Return that of the dataset; for sampling, or where it has no meta.json, that of GPT-2."""
    if c.suite in ("sample", "evaluate"):
        return GPT2_VOCABULARY
    # Of several datasets the first will do, as all have the same tokenizer.
    first_dataset = next(iter(parse_mix(c.mix, c.dataset)))
    meta = read_dataset_meta(first_dataset)
    if meta:
        return meta["vocab_size"]
    return GPT2_VOCABULARY


# ---------------------------------------------------------------------- ours, in this process


class IterationTime(NamedTuple):
    reading: float  # seconds to read the next batches
    whole: float  # seconds of the iteration, reading included


def time_steps(c):
    """Return the figures of train.py's own iteration; each one after the warm-up is timed alone.
    The memory is what came on top of the process as it was before the model was made. Return None
    where the iterations are profiled instead."""
    runtime = setup(c.device, c.dtype, c.backend)
    tune_cpu(runtime.device)
    memory_before = resident_memory(runtime.device)

    # Set up as train.py does; the weights are always random.
    sizes = split_batch(c, runtime.world_size)
    datasets = parse_mix(c.mix, c.dataset)
    data = Mixture(datasets, "train", c.block_size)
    model = GPT(model_config(c, vocabulary_size(c)))
    if c.align_documents or c.mask_documents:
        follow_documents(c, data, model, load_tokenizer(*datasets))
    training = build_training(c, model, runtime)
    if runtime.is_cuda:
        runtime.print_main(pick_attention(model, runtime))
    batches = BatchSource(partial(train.load_batches, data, sizes=sizes, c=c,
                                  vocab_size=model.config.vocab_size, runtime=runtime))

    # Warm up; then profile three iterations, or time as many as were asked for.
    time_more = partial(time_iterations, batches, training, c.grad_clip, runtime)
    warmup_times = time_more(range(c.warmup))
    if c.profile:
        profile_operators(partial(time_more, range(c.warmup, c.warmup + 3)), runtime, c.trace)
        return None
    times = time_more(range(c.warmup, c.warmup + c.iterations))
    runtime.close()

    # The figures: medians over the iterations.
    seconds = statistics.median(t.whole for t in times)
    sequences = sizes.micro_steps * runtime.world_size * c.batch_size
    tokens_per_s = sequences * c.block_size / seconds
    estimate = memory_needed(c, model, c.batch_size, runtime)
    return {"ms": 1000 * seconds, "tokens_per_s": tokens_per_s,
            **mfu(model, tokens_per_s, runtime), "warmup_s": sum(t.whole for t in warmup_times),
            "batch_source_share": statistics.median(t.reading / t.whole for t in times),
            "memory_mb": (peak_memory(runtime.device) - memory_before) / 1e6,
            "estimated_memory_mb": sum(estimate) / 1e6}


def time_iterations(batches, training, grad_clip, runtime, numbers):
    """Run the iterations of these numbers as train.py does; return the IterationTime of each."""
    times = []
    for number in numbers:
        # Update the weights.
        start = time.perf_counter()
        train.train_step(training, batches.take(number), grad_clip, runtime)
        # Read the next batches, while a GPU is at work. Then wait for it.
        before = time.perf_counter()
        batches.prefetch(number + 1)
        reading = time.perf_counter() - before
        runtime.synchronize()
        times.append(IterationTime(reading, time.perf_counter() - start))
    return times


def time_samples(c):
    """Return the tokens/s of sample.py's own loop, greedy, with random weights. Like a step of
    training, a step of decoding is compiled where the settings and the device say so."""
    runtime = setup(c.device, c.dtype)
    tune_cpu(runtime.device)
    model = prepare_model(GPT(model_config(c, vocabulary_size(c))), runtime)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, vocab_size=model.config.vocab_size)
    generators = [torch.Generator() for _ in range(c.samples)]
    compiled = can_compile(c.compile, runtime)

    # Five tokens before the clock starts: the first products choose their kernels, and a graph is
    # compiled, and recorded when it runs again.
    for new_tokens in (5, c.new_tokens):
        start = time.perf_counter()
        list(generate(model, [[0]] * c.samples, generators, new_tokens, greedy, None, runtime,
                      compiled))
        seconds = time.perf_counter() - start
    return {"tokens_per_s": c.samples * c.new_tokens / seconds}


def time_scores(c):
    """Return the questions/s of evaluate.py's own scorer, with random weights."""
    runtime = setup(c.device, c.dtype)
    tune_cpu(runtime.device)
    model = prepare_model(GPT(model_config(c, vocabulary_size(c))), runtime)
    tokens_at_once = c.batch_size * c.block_size
    return {"questions_per_s": time_questions(model, runtime, c.questions, tokens_at_once)}


# ---------------------------------------------------------------------- each side, in a process


def measure(side, c, device, folder):
    """Let new processes measure a side once; return its figures."""
    if c.suite == "prepare":
        return measure_preparing(side, c, device, folder)
    if side != OURS:
        return measure_peer(side, c, device, folder)
    if c.suite == "start":
        return measure_start(c, device, folder)
    # The other suites: bench.py itself in a child, which measures ours alone.
    flags = as_flags({**vars(c), "child": True, "compare": "", "log": ""})
    return figures_of_python("bench.py", *flags, cwd=ROOT)


def measure_preparing(side, c, device, folder):
    """Ours and nanoGPT's script as whole processes; of tiktoken the encoding alone."""
    texts = folder / TEXTS
    start = time.perf_counter()
    if side == OURS:
        run_python("prepare.py", f"--input={texts}", f"--dataset={folder}/ours",
                   "--tokenizer=gpt2", "--val_fraction=0.0005", "--overwrite=True", cwd=ROOT)
    else:
        figures = measure_peer(side, c, device, folder)
    seconds = time.perf_counter() - start
    if side == "tiktoken":
        seconds = figures["seconds"]
    return {"seconds": seconds, "mb_per_s": texts.stat().st_size / 1e6 / seconds}


def measure_start(c, device, folder):
    """Seconds to the first iteration of train.py, and of sample.py for one token of that run."""
    settings = {key: getattr(c, key) for key in keyword_defaults(train.main)}
    # Train for one iteration.
    out_dir = f"--out_dir={folder}/ours"
    lines = run_python("train.py", *as_flags(settings), "--max_iters=1", "--eval_interval=1",
                       "--eval_tokens=0", "--eval_iters=1", "--log_interval=1", out_dir, cwd=ROOT)
    first_iteration = next(line for line in lines if re.match(r"iter +0\b", line.text))
    # Sample one token.
    start = time.perf_counter()
    run_python("sample.py", out_dir, "--num_samples=1", "--max_new_tokens=1",
               f"--device={device}", cwd=ROOT)
    return {"train_s": first_iteration.seconds, "sample_s": time.perf_counter() - start}


def measure_peer(side, c, device, folder):
    """Return what experiments/peers.py measures: nanoGPT in its folder, or a library."""
    suite, checkout = c.suite, c.compare
    if side == "tiktoken" or side in LIBRARIES:
        suite, checkout = side, ROOT
    # The settings, and what only we can find out.
    spec = {**vars(c), "device": str(device), "folder": str(folder),
            "texts": str(folder / TEXTS), "threads": os.cpu_count(),
            "micro_steps": split_batch(c, 1).micro_steps,
            "compiles": compiles_by_default(device),
            "dtype": str(pick_dtype(c.dtype, device)).removeprefix("torch.")}
    # A new cache for Hugging Face's datasets: the old one has the results of the last repeat.
    cache = tempfile.mkdtemp(dir=folder)
    return figures_of_python(PEERS, suite, json.dumps(spec), cwd=checkout,
                             HF_DATASETS_CACHE=cache)


def as_flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def write_texts(source, megabytes, path):
    """Write that much text as documents of 5,000 characters. source: see main's `text`."""
    if source and not Path(source).is_file():
        raise UserError(f"text={source!r}: no such file; give a .jsonl or .jsonl.gz")
    # The standard library holds files of any encoding, so nothing is refused.
    paths = [Path(source)]
    if not source:
        paths = sorted(Path(os.__file__).parent.rglob("*.py"))
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for _, text, _ in Files(paths, bad_text="replace"):
            for i in range(0, len(text), 5000):
                size += out.write(json.dumps({"text": text[i:i + 5000]}) + "\n")
            if size > megabytes * 1e6:
                break


# ---------------------------------------------------------------------- the figures


def append_log(log, row):
    if log:
        with naming_write_errors(Path(log), "run it again"), open(log, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    argv = [arg.replace("--real_data=False", "--random=True") for arg in sys.argv[1:]]  # nanoGPT's
    run(main, base=train.main, more_defaults=lambda settings: DEFAULTS, argv=argv)
