"""The items of gpu_session.py that are more than one of our commands. The last line that each
prints is JSON: its figures. Settings are those of train.py.

    python experiments/gpu_items.py facts
    python experiments/gpu_items.py train config/train_gpt2.py --max_iters=6 --out_dir=out/gpu

facts, attention, ceilings: the machine. tests, numerics, train, processes, resume, sample: ours.
nanogpt: the peer. The function of that name, here or in gpu_machine.py, says what its figures are.
"""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import wraps
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as train_script  # noqa: E402
from configurator import run  # noqa: E402
from experiments.gpu_machine import attention, ceilings, facts, relative_error  # noqa: E402
from experiments.peers import train_flags  # noqa: E402
from formats.checkpoint import load_model, read_named  # noqa: E402
from formats.run_folder import read_metrics  # noqa: E402
from formats.shards import TokenReader  # noqa: E402
from inference.generate import Sampling, generate, prepare_model  # noqa: E402
from model import GPT  # noqa: E402
from runtime.child import run_python  # noqa: E402
from runtime.device import pick_device  # noqa: E402
from runtime.kernels import compiles_by_default  # noqa: E402
from runtime.memory import peak_memory  # noqa: E402
from runtime.processes import Runtime, setup, shard_model  # noqa: E402
from training.resume import checkpoint_settings  # noqa: E402
from training.setup import build_training, model_config, split_batch  # noqa: E402

PEER = ROOT / ".peer/nanoGPT"


def as_flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


# ---------------------------------------------------------------------- ours


def tests(files="tests", **settings):
    """The tests that need a GPU: how many passed, and which failed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "4", "--dist=loadfile", "-p",
         "no:cacheprovider", "-rf", *files.split()], cwd=ROOT, text=True, capture_output=True)
    print(done.stdout, done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout[-500:])
    figures = {word: int(number) for number, word in counts}
    return {**figures, "failures": re.findall(r"^FAILED (\S+)", done.stdout, flags=re.M)}


# Ways to compute the same loss, {name: (number format, what is set)}.
WAYS = {"eager float32": ("float32", dict(compile="False")),
        "eager": ("bfloat16", dict(compile="False")),
        "compiled": ("bfloat16", dict(compile="True")),
        "compiled, computed twice": ("bfloat16", dict(compile="True",
                                                      activation_checkpointing=True))}


def numerics(**settings):
    """A loss and its gradients in several ways, of the same weights and tokens, beside eager
    float32 without TF32 and without chunks: the loss's difference, and the largest relative error
    of a matrix's gradient and of another's. compile=False leaves out the compiled ways."""
    c = SimpleNamespace(**settings)
    runtime = setup(c.device, "float32")
    torch.set_float32_matmul_precision("highest")
    tokens = torch.randint(50257, (c.batch_size, c.block_size + 1),
                           generator=torch.Generator().manual_seed(1)).to(runtime.device)
    tokens[:, ::50] = 0  # documents of 50 tokens, where they are masked
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model = new_model(c).to(runtime.device)
    expected_loss, expected = loss_and_gradients(model, model, batch, runtime)
    figures = {"loss": expected_loss}
    for way, (dtype, changes) in WAYS.items():
        if c.compile == "False" and changes["compile"] == "True":
            continue
        # Build it as train.py does; nothing that an earlier way compiled may serve.
        torch._dynamo.reset()
        runtime = setup(c.device, dtype)
        training = build_training(SimpleNamespace(**{**settings, **changes}), new_model(c), runtime)
        loss, gradients = loss_and_gradients(training.wrapped, training.model, batch, runtime)
        # A scalar's gradient is a sum of large numbers of both signs: it is judged apart.
        worst = {"matrix": 0.0, "other": 0.0}
        for name, gradient in gradients.items():
            kind = "matrix" if gradient.dim() == 2 else "other"
            worst[kind] = max(worst[kind], relative_error(gradient, expected[name]))
        figures[way] = {"loss": loss - expected_loss, **worst}
    return figures


def new_model(c):
    """Return a GPT with the same weights each time."""
    model = GPT(model_config(c, 50257), torch.Generator().manual_seed(1))
    if c.mask_documents:
        model.document_start = 0
    return model


def loss_and_gradients(wrapped, model, batch, runtime):
    """Return the mean loss, and {name: float32 gradient}."""
    with runtime.autocast():
        loss = wrapped(*batch).mean()
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters()}


def train(shard_alone=False, **settings):
    """train.py in this process: its losses, its time, and what the compiler did.

    shard_alone: let FSDP2 shard the model over this one process.
    """
    if shard_alone:
        use_fsdp_alone()
    # Note when each update was given to the device; the first one waits for the compiler.
    start, updates, step = time.perf_counter(), [], train_script.train_step

    def timed_step(*arguments):
        result = step(*arguments)
        updates.append(time.perf_counter() - start)
        return result

    train_script.train_step = timed_step
    train_script.main(**settings)
    # The figures.
    rows = read_metrics(Path(settings["out_dir"]) / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = {row["iter"]: round(row["val_loss"], 4) for row in rows if "val_loss" in row}
    ms = [row["ms"] for row in steps[2:]] or [0.0]
    other_s = updates[-1] - updates[0] - sum(row["ms"] for row in steps[1:]) / 1000
    return {"losses": [round(row["loss"], 4) for row in steps[:6]], "val_losses": evaluations,
            "ms": statistics.median(ms), "slowest_ms": max(ms),
            "tokens_per_s": max((row["tokens_per_s"] for row in steps), default=0),
            "first_update_s": updates[0], "seconds": time.perf_counter() - start,
            "evaluating_and_saving_s": other_s,
            "memory_gb": peak_memory(pick_device(settings["device"])) / 1e9, **compiler_figures()}


def compiler_figures():
    """Return how many graphs were compiled, where they break, why any was compiled again."""
    compiled = torch._dynamo.utils.get_compilation_metrics()
    again = [f"{graph.co_name}: {graph.recompile_reason}" for graph in compiled
             if graph.recompile_reason]
    breaks = torch._dynamo.utils.counters["graph_break"]
    print("compiled again:", *again, sep="\n")
    print("graph breaks:", *breaks.items(), sep="\n")
    return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(breaks.values()), "compiled_again": len(again),
            "compile_s": sum(graph.entire_frame_compile_time_s or 0 for graph in compiled)}


def use_fsdp_alone():
    """Let Runtime.wrap shard over one process: NCCL allows a GPU only one, and this needs one."""
    os.environ.update(one_process_of(1, 0, free_port()))

    def wrap(runtime, model, fsdp):
        runtime.init_process_group()
        return shard_model(model, runtime)

    Runtime.wrap = wrap


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_process_of(count, rank, port):
    """Return the environment that torchrun gives to a process; all of them use the first GPU."""
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def processes(**settings):
    """A run on one process, and on two that share the device and talk by gloo: the largest
    difference of their losses."""
    folders = [Path(settings["out_dir"], name) for name in ("one", "two")]
    commands = [[sys.executable, "train.py", *as_flags(
        {**settings, "backend": "gloo", "out_dir": folder})] for folder in folders]
    subprocess.run(commands[0], cwd=ROOT, check=True)
    port = free_port()
    ranks = [subprocess.Popen(commands[1], cwd=ROOT,
                              env=os.environ | one_process_of(2, rank, port))
             for rank in range(2)]
    codes = [rank.wait() for rank in ranks]
    return {"exit_codes": codes, **compare_losses(*folders)}


def resume(shard_alone=False, **settings):
    """A run in one go, and one that SIGTERM ended halfway and that was resumed: the largest
    difference of their losses."""
    folders = [Path(settings["out_dir"], name) for name in ("whole", "halves")]
    whole, halves = [[sys.executable, __file__, "train", f"--shard_alone={shard_alone}",
                      *as_flags({**settings, "out_dir": folder})] for folder in folders]
    subprocess.run(whole, cwd=ROOT, check=True)
    # Stop the second run when it has logged half of its iterations.
    halfway = re.compile(rf"iter +{settings['max_iters'] // 2}/")
    with subprocess.Popen(halves, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            print(line, end="")
            if halfway.match(line):
                process.send_signal(signal.SIGTERM)
    subprocess.run([*halves, "--init_from=resume"], cwd=ROOT, check=True)
    return {"stopped_with": process.returncode, **compare_losses(*folders)}


def compare_losses(*folders):
    """Return how many losses two runs have, and the largest difference of two."""
    one, other = [{row["iter"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")
                   if "loss" in row} for folder in folders]
    return {"losses": [len(one), len(other)],
            "largest_difference": max(abs(one[i] - other[i]) for i in one.keys() & other.keys())}


def sample(new_tokens=200, **settings):
    """Greedy samples, eager and, but for compile=False, compiled, three times for each batch:
    milliseconds per token each time, and how many tokens are the same. out_dir: a run; '': random
    weights."""
    runtime, out_dir = setup(settings["device"], settings["dtype"]), settings["out_dir"]
    if out_dir:
        model = read_named(out_dir, "latest", load_model)
    else:
        model = new_model(SimpleNamespace(**settings))
    prepare_model(model, runtime)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, vocab_size=model.config.vocab_size)
    # A prompt of random tokens; each batch has a cache of its own.
    prompt = torch.randint(greedy.vocab_size, (8,), generator=torch.Generator().manual_seed(1))
    figures, ids = {}, {}
    ways = (False,) if settings["compile"] == "False" else (False, True)
    for B, compiled in product((1, 10), ways):
        name, ms = f"{'compiled' if compiled else 'eager'} B={B}", []
        for _ in range(3):
            start = time.perf_counter()
            ids[name] = list(generate(
                model, [prompt.tolist()] * B, [torch.Generator() for _ in range(B)], new_tokens,
                greedy, None, runtime, compiled))
            ms.append(1000 * (time.perf_counter() - start) / new_tokens)
        figures[f"{name} ms"] = [round(number, 3) for number in ms]
        if compiled:
            pairs = zip(ids[f"eager B={B}"], ids[name], strict=True)
            figures[f"same B={B}"] = sum(one == other for one, other in pairs)
    return figures


# ---------------------------------------------------------------------- the peer


def nanogpt(**settings):
    """nanoGPT's train.py on the same tokens: its validation losses, of other sequences than ours,
    and its milliseconds per iteration."""
    c = SimpleNamespace(**settings)
    folder = Path(c.out_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The token files in its layout.
    for split in ("train", "val"):
        reader = TokenReader(c.dataset, split)
        (folder / f"{split}.bin").write_bytes(reader.read(0, reader.tokens))
    # Its flags: those of bench.py's peer, and a whole run's.
    device = pick_device(c.device)
    spec = {**settings, "dataset": folder, "folder": folder, "device": device,
            "micro_steps": split_batch(c, 1).micro_steps, "compiles": compiles_by_default(device)}
    same = ("eval_interval", "eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "min_lr")
    flags = train_flags(spec) + as_flags({key: settings[key] for key in same})
    start = time.perf_counter()
    text = "\n".join(line.text for line in run_python("train.py", *flags, cwd=PEER))
    print(text)
    losses = re.findall(r"step (\d+): .*val loss ([\d.]+)", text)
    ms = [float(number) for number in re.findall(r"time ([\d.]+)ms", text)]
    return {"val_losses": {int(number): float(loss) for number, loss in losses},
            "ms": statistics.median(ms[2:]), "seconds": time.perf_counter() - start}


ITEMS = {item.__name__: item for item in (
    facts, attention, ceilings, tests, numerics, train, processes, resume, sample, nanogpt)}


def printing(item):
    """Return an item's function as one that prints the figures."""
    @wraps(item)
    def main(**settings):
        print(json.dumps(item(**settings)))

    return main


if __name__ == "__main__":
    chosen, *argv = sys.argv[1:] or ["--help"]
    if chosen not in ITEMS:
        sys.exit(f"{chosen}: choose {', '.join(ITEMS)}")
    run(printing(ITEMS[chosen]), base=train_script.main, argv=argv,
        more_defaults=checkpoint_settings)
