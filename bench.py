"""Measure this machine and what we make of it: training, sampling, preparing, memory, start.

    python bench.py config/train_stdlib.py                    # any of train.py's settings
    python bench.py --random=True --n_layer=6 --compile=True  # random tokens: no dataset needed
    python bench.py config/train_stdlib.py --profile=True     # where an iteration's time goes
    python bench.py --suite=sample --compare=DIR --repeats=5  # beside the nanoGPT in DIR
    python bench.py --suite=sample --compare=transformers     # beside Hugging Face's generate

Each repeat is a process of its own, by turns with those it is compared with. Prints each figure's
median, smallest and largest, and the same of its ratio within a repeat. First it measures the
machine: how fast it multiplies and reads, which gives the limit that tokens/s are shown beside.
"""

import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from configurator import UserError, run
from formats.checkpoint import without_weights
from formats.shards import read_dataset_meta
from inference.generate import cast_weights, generate, next_tokens
from model import GPT
from runtime.cpu import tune_cpu
from runtime.device import pick_device, pick_dtype
from runtime.kernels import compile_model, pick_attention, use_fp8
from runtime.memory import checkpoint_activations, estimate_memory
from runtime.processes import setup
from text.tokenizer import load_tokenizer
from training.log import mfu
from training.sequences import Mixture, parse_mix

ROOT = Path(__file__).resolve().parent
PEERS = str(ROOT / "experiments" / "peers.py")
SUITES = ("train", "sample", "prepare", "memory", "start")
PEER_KEYS = ("batch_size block_size n_layer n_head n_embd dropout bias learning_rate weight_decay "
             "beta1 beta2 grad_clip").split()  # that nanoGPT's train.py has too


def main(
    suite="train",  # train, sample, prepare, memory or start
    compare="",  # a folder with nanoGPT's files, measured by turns; sample: or transformers
    repeats=3,  # processes of each
    log="",  # a file that gets each repeat as a line of JSON
    iterations=20,  # train: that are timed
    warmup=5,  # train: that are not, before them
    random=False,  # train, memory: random tokens of GPT-2's vocabulary instead of the dataset's
    profile=False,  # train: write a torch.profiler trace, print the operators that take longest
    trace="bench_trace.json",  # the trace's file, for ui.perfetto.dev
    new_tokens=200,  # sample: tokens after a prompt of one, greedy
    samples=1,  # sample: drawn together; only ours can
    text="",  # prepare: a .jsonl or .jsonl.gz with a field text; '': Python's standard library
    megabytes=20.0,  # prepare: how much of it, cut into documents of 5,000 characters
    child=False,  # measure ours once, in this process, and print it as JSON
    **settings,
):
    options = {key: value for key, value in locals().items() if key != "settings"}
    check(options)
    train.check(settings)
    with tempfile.TemporaryDirectory() as folder:
        if random and not child:
            settings["dataset"], settings["mix"] = random_tokens(Path(folder)), ""
        if child or profile or "RANK" in os.environ:  # torchrun has started the processes
            row = (time_samples if suite == "sample" else time_steps)(options, settings)
            if row and os.environ.get("RANK", "0") == "0":
                print(json.dumps(row))
            return
        device = pick_device(settings["device"])
        dtype = pick_dtype(settings["dtype"], device)
        model = make_model(settings, suite in ("sample", "prepare"), "meta")
        machine = measure_machine(device)
        reach = limit(suite, model, dtype, machine)
        print("this machine: " + ", ".join(f"{key} {value:,.1f}" for key, value in machine.items()))
        note(log, {"argv": sys.argv[1:], "torch": torch.__version__, "device": str(device),
                   "threads": torch.get_num_threads(), **machine})
        sides = {"train": step_sides, "memory": step_sides, "sample": sample_sides,
                 "prepare": prepare_sides, "start": start_sides}[suite](
                     options, settings, device, Path(folder))
        rows = {name: [] for name in sides}
        for repeat in range(repeats):
            for name, measure in sides.items():
                row = measure()
                if reach:
                    together = samples if name == "flatgpt" and suite == "sample" else 1
                    row["of_the_limit"] = row["tokens_per_s"] / together / reach
                rows[name].append(row)
                note(log, {"suite": suite, "side": name, "repeat": repeat, **row})
    print(table(rows))


def check(options):
    """Raise ValueError for what cannot be measured."""
    if options["suite"] not in SUITES:
        raise UserError(f"suite={options['suite']!r}: choose {', '.join(SUITES)}")
    for key in ("iterations", "warmup", "repeats", "new_tokens", "samples"):
        if options[key] < 1:
            raise UserError(f"{key}={options[key]}: must be 1 or more")
    folder = options["compare"]
    if folder == "transformers" and options["suite"] != "sample":
        raise UserError("compare='transformers': suite=sample alone can do that; name a folder")
    needs = {"prepare": "data/openwebtext/prepare.py", "sample": "model.py"}.get(
        options["suite"], "train.py")
    if folder not in ("", "transformers") and not Path(folder, needs).is_file():
        raise UserError(f"compare={folder!r}: has no {needs}; give the folder of a nanoGPT")
    if options["profile"] and options["suite"] != "train":
        raise UserError(f"profile=True: suite={options['suite']} has none, suite=train has")


# ---------------------------------------------------------------------- the machine


@torch.no_grad()
def measure_machine(device, size=0):
    """Return the GFLOP/s of a square matrix product and the GB/s at which memory is read, each the
    best of some. size: of the matrix; 0: 1024 on a CPU, else 8192."""
    size = size or (1024 if device.type == "cpu" else 8192)
    wait = getattr(torch, device.type).synchronize if device.type != "cpu" else lambda: None

    def best(function, times=8):
        return min(seconds_of(lambda: (function(), wait())) for _ in range(times))

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, size, device=device).to(dtype)
        key = f"{str(dtype).removeprefix('torch.')}_gflop_per_s"
        rates[key] = 2 * size**3 / best(lambda x=x: x @ x) / 1e9
    x = torch.ones(size * size * 64, device=device)  # 256 MB on a CPU: no cache holds it
    return {**rates, "read_gb_per_s": 4 * x.numel() / best(x.sum) / 1e9}


def seconds_of(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def limit(suite, model, dtype, machine):
    """Return the tokens/s that this machine allows, for one sample: of training, whose matrix
    products nothing beats, or of sampling, which reads each weight for each token. Else None."""
    half = dtype != torch.float32
    rate = machine["bfloat16_gflop_per_s" if half else "float32_gflop_per_s"]
    return {"train": rate * 1e9 / model.flops_per_token(),
            "sample": machine["read_gb_per_s"] * 1e9 / ((2 if half else 4)
                                                        * model.parameter_count())}.get(suite)


def make_model(settings, is_random, device):
    """Return the settings' GPT, with the dataset's vocabulary, or, where it is random, GPT-2's."""
    meta = None if is_random else read_dataset_meta(next(iter(parse_mix(settings["mix"],
                                                                settings["dataset"]))))
    config = train.model_config(train.pad_vocab_size(meta["vocab_size"] if meta else 50257),
                                {key: settings[key] for key in train.MODEL_KEYS})
    return without_weights(config) if device == "meta" else GPT(config)


# ---------------------------------------------------------------------- ours, in this process


def time_steps(options, settings):
    """Return the figures of train.py's own step: each iteration after the warm-up is timed alone.
    The memory is what came on top of the process as it was before the model."""
    runtime = setup(settings["device"], settings["dtype"], settings["backend"])
    tune_cpu(runtime.device)
    before = memory_of(runtime.device, "VmRSS")
    micro_steps = train.split_batch(settings, runtime.world_size)
    data = Mixture(parse_mix(settings["mix"], settings["dataset"]), "train",
                   settings["block_size"])
    model = make_model(settings, False, "cpu").to(runtime.device)
    if settings["align_documents"] or settings["mask_documents"]:
        train.follow_documents(settings, data, model, load_tokenizer(
            *parse_mix(settings["mix"], settings["dataset"])))
    if settings["fp8"]:
        use_fp8(model, runtime)
    if settings["activation_checkpointing"]:
        checkpoint_activations(model)
    optimizer = train.make_optimizer(model, settings, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    wrapped = compile_model(runtime.wrap(model), settings["compile"], runtime)
    if runtime.device.type == "cuda":
        runtime.print_main(pick_attention(model.config, settings["batch_size"], runtime))

    def iteration(number):
        """Return the seconds of (reading the batches, the whole iteration)."""
        began = time.perf_counter()
        batches = train.load_batches(data, number, micro_steps, settings, model, runtime)
        read = time.perf_counter() - began
        train.train_step(wrapped, optimizer, scaler, batches, settings["grad_clip"], runtime)
        runtime.synchronize()
        return read, time.perf_counter() - began

    warmup = options["warmup"]
    first = sum(whole for _, whole in map(iteration, range(warmup)))
    if options["profile"]:
        return print_profile(iteration, warmup, options["trace"], runtime)
    times = [iteration(warmup + number) for number in range(options["iterations"])]
    runtime.close()
    seconds = statistics.median(whole for _, whole in times)
    tokens = micro_steps * runtime.world_size * settings["batch_size"] * settings["block_size"]
    estimate = sum(estimate_memory(model, settings["batch_size"], runtime.dtype,
                                   settings["activation_checkpointing"], model.chunk))
    return {"ms": 1000 * seconds, "tokens_per_s": tokens / seconds,
            **mfu(model, tokens / seconds, runtime), "warmup_s": first,
            "batch_source_share": statistics.median(read / whole for read, whole in times),
            "memory_mb": (memory_of(runtime.device) - before) / 1e6,
            "estimated_memory_mb": estimate / 1e6}


def memory_of(device, kind="VmHWM"):
    """Return the most bytes held so far: the GPU's tensors, or the process's resident memory; what
    it holds now with VmRSS. (getrusage's ru_maxrss is at first that of the process before it.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(rf"{kind}:\s+(\d+)", status.read_text())[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_profile(iteration, first, trace, runtime):
    """Profile three iterations: the operators that take longest, and a trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(3):
            iteration(first + number)
    key = f"self_{'cuda' if runtime.device.type == 'cuda' else 'cpu'}_time_total"
    runtime.print_main(profiler.key_averages().table(sort_by=key, row_limit=15))
    if runtime.is_main:
        profiler.export_chrome_trace(trace)
        print(f"trace: {trace}")


def time_samples(options, settings):
    """Return the tokens/s of sample.py's own loop, greedy, with random weights."""
    runtime = setup(settings["device"], settings["dtype"])
    tune_cpu(runtime.device)
    model = make_model(settings, True, "cpu").to(runtime.device).eval()
    cast_weights(model, runtime.dtype)
    step = partial(next_tokens, model, model.config.vocab_size, 0.0, 0, 1.0, runtime)
    count, tokens = options["samples"], options["new_tokens"]
    generators = [torch.Generator() for _ in range(count)]

    def draw(tokens):
        return list(generate(model, step, [0], generators, tokens, None, runtime))

    draw(2)  # the first products choose their kernels
    return {"tokens_per_s": count * tokens / seconds_of(lambda: draw(tokens))}


# ---------------------------------------------------------------------- each side, in a process


def process(*command, cwd=ROOT, **environment):
    """Return [(seconds since it began, line)] of what a Python process prints. Raises UserError
    with its last line where it fails."""
    began = time.perf_counter()
    with subprocess.Popen(
            [sys.executable, *command], cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}) as running:
        lines = [(time.perf_counter() - began, line.strip()) for line in running.stdout]
    if running.returncode:
        raise UserError(f"{command[0]} in {cwd} ended with exit code {running.returncode}: "
                         f"{lines[-1][1] if lines else ''}")
    return lines


def child(*command, **place):
    """Return the line of JSON that a Python process prints."""
    return next(json.loads(line) for _, line in process(*command, **place) if line[:1] == "{")


def our_child(options, settings):
    flags = [f"--{key}={value}" for key, value in {**settings, **options, "child": True}.items()]
    return child("bench.py", *flags)


def step_sides(options, settings, device, folder):
    """Return {name: function that measures it once}, for suites train and memory."""
    sides, peer = {"flatgpt": partial(our_child, options, settings)}, options["compare"]
    if not peer:
        return sides
    last = options["warmup"] + options["iterations"] - 1
    flags = [*peer_flags(peer, settings, device), f"--max_iters={last}", "--log_interval=1",
             "--eval_interval=1000000", f"--out_dir={folder}/peer"]
    tokens = train.split_batch(settings, 1) * settings["batch_size"] * settings["block_size"]

    def theirs():
        row = child(PEERS, "steps", *flags, cwd=peer)
        ms = statistics.median(row["ms"][options["warmup"]:])
        return {"ms": ms, "tokens_per_s": 1000 * tokens / ms, "memory_mb": row["memory_mb"]}

    return {**sides, name_of(peer): theirs}


def peer_flags(peer, settings, device):
    """Return what gives nanoGPT's train.py our settings; on a CPU those of its README."""
    dataset, micro_steps = settings["dataset"], train.split_batch(settings, 1)
    if not Path(peer, "data", dataset, "train.bin").is_file():
        raise UserError(f"{peer}/data/{dataset}/train.bin is missing; prepare it there")
    return [*(f"--{key}={settings[key]}" for key in PEER_KEYS), f"--dataset={dataset}",
            f"--gradient_accumulation_steps={micro_steps}", "--eval_iters=1", f"--device={device}",
            *(["--compile=False"] if device.type != "cuda" else [])]


def sample_sides(options, settings, device, folder):
    sides, peer = {"flatgpt": partial(our_child, options, settings)}, options["compare"]
    spec = {key: settings[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    spec = json.dumps({**spec, "tokens": options["new_tokens"], "device": str(device)})
    if peer == "transformers":
        sides[peer] = lambda: child(PEERS, "transformers", spec)
    elif peer:
        sides[name_of(peer)] = lambda: child(PEERS, "sample", spec, cwd=peer)
    return sides


def prepare_sides(options, settings, device, folder):
    """Ours and nanoGPT's script as whole processes; of tiktoken itself the encoding alone."""
    texts, documents = write_texts(options["text"], options["megabytes"], folder)
    size, peer = texts.stat().st_size / 1e6, options["compare"]

    def whole(*command, **environment):
        seconds = seconds_of(lambda: process(*command, **environment))
        return {"seconds": seconds, "mb_per_s": size / seconds}

    def raw():
        row = child(PEERS, "tiktoken", str(texts), str(os.cpu_count()))
        return {**row, "mb_per_s": size / row["seconds"]}

    sides = {"flatgpt": lambda: whole(
        "prepare.py", f"--input={texts}", f"--dataset={folder}/ours", "--tokenizer=gpt2",
        "--val_fraction=0.0005", "--overwrite=True"), "tiktoken": raw}
    if peer:
        script = Path(peer, "data/openwebtext/prepare.py").read_text("utf-8")
        copy = folder / "prepare.py"  # it writes beside itself
        # it wants as many validation documents, one in 2,000, as batches
        batches = f"total_batches = {min(1024, 1 + documents // 4000)}"
        copy.write_text(script.replace("total_batches = 1024", batches), "utf-8")
        sides[name_of(peer)] = lambda: whole(PEERS, "prepare", str(texts), str(copy),
                                             HF_DATASETS_CACHE=tempfile.mkdtemp(dir=folder))
    return sides


def write_texts(source, megabytes, folder):
    """Write so much text as a .jsonl; return its path and its documents, 5,000 characters each."""
    path, size, documents = folder / "texts.jsonl", 0, 0
    if source and not Path(source).is_file():
        raise UserError(f"text={source!r}: no such file; give a .jsonl or .jsonl.gz")
    if source:
        opened = gzip.open if source.endswith(".gz") else open
        with opened(source, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
    else:
        texts = (path.read_text("utf-8", "replace") for path in
                 sorted(Path(os.__file__).parent.rglob("*.py")))
    with open(path, "w", encoding="utf-8") as out:
        for text in texts:
            for i in range(0, len(text), 5000):
                size += out.write(json.dumps({"text": text[i:i + 5000]}) + "\n")
                documents += 1
            if size > megabytes * 1e6:
                break
    return path, documents


def start_sides(options, settings, device, folder):
    """Seconds to the first iteration of train.py, and of sample.py for one token of that run."""
    peer = options["compare"]
    once = ("--max_iters=1", "--eval_interval=1", "--eval_iters=1", "--log_interval=1")

    def measure(cwd, flags, out):
        lines = process("train.py", *flags, *once, f"--out_dir={out}", cwd=cwd)
        flags = [f"--out_dir={out}", "--num_samples=1", "--max_new_tokens=1", f"--device={device}"]
        return {"train_s": next(at for at, line in lines if re.match(r"iter +0\b", line)),
                "sample_s": seconds_of(lambda: process("sample.py", *flags, cwd=cwd))}

    sides = {"flatgpt": lambda: measure(
        ROOT, [f"--{key}={value}" for key, value in settings.items()], f"{folder}/ours")}
    if peer:
        flags = peer_flags(peer, settings, device)
        sides[name_of(peer)] = lambda: measure(peer, flags, f"{folder}/peer")
    return sides


def name_of(peer):
    return Path(peer).resolve().name


def random_tokens(folder):
    """Write a dataset of random tokens in nanoGPT's layout, which both sides read; return it."""
    for split, count in (("train", 2_000_000), ("val", 200_000)):
        np.random.default_rng(count).integers(0, 50257, count, np.uint16).tofile(
            folder / f"{split}.bin")
    return str(folder)


# ---------------------------------------------------------------------- what is said


def note(log, row):
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table(rows):
    """Return {side: its repeats' figures} as lines: median, least and most; a ratio is ours by
    another's, within a repeat."""
    ours, *others = rows
    columns = [("", rows[ours][0])]
    for name in rows:
        columns.append((name, {key: [row[key] for row in rows[name]] for key in rows[name][0]}))
        if name in others:
            columns.append((f"{ours} / {name}", {
                key: [a[key] / (b[key] or math.nan)
                      for a, b in zip(rows[ours], rows[name], strict=True)]
                for key in rows[name][0] if key in rows[ours][0]}))
    lines = ["".join(f"{title:<34}" for title, _ in columns)]
    for key in rows[ours][0]:
        cells = [f"{statistics.median(v[key]):,.4g} ({min(v[key]):,.4g} to {max(v[key]):,.4g})"
                 if key in v else "" for _, v in columns[1:]]
        lines.append("".join(f"{cell:<34}" for cell in (key, *cells)))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run(main, base=train.main)
