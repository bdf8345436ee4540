"""What bench.py runs of others, each in a process of its own, in the folder of their checkout:

    python experiments/peers.py steps --batch_size=12 ...   # nanoGPT's train.py with these flags
    python experiments/peers.py sample '{"n_layer": 12, ...}'      # its model.py's generate
    python experiments/peers.py transformers '{"n_layer": 12, ...}'  # Hugging Face's generate
    python experiments/peers.py tiktoken TEXTS.jsonl THREADS  # encode_ordinary_batch alone
    python experiments/peers.py prepare TEXTS.jsonl SCRIPT   # its openwebtext script, of those

Their files are imported as they are. The last line that is printed is JSON.
"""

import contextlib
import io
import json
import re
import runpy
import statistics
import sys
import time


def steps(*flags):
    """Milliseconds of each iteration as train.py logs them, and the memory that came on top of the
    process as it was when torch was imported."""
    import numpy  # noqa: F401
    import torch

    before, out = resident("VmRSS"), io.StringIO()
    sys.argv = ["train.py", *flags]
    with contextlib.redirect_stdout(out):
        runpy.run_path("train.py", run_name="__main__")
    memory = resident("VmHWM") - before
    if torch.cuda.is_initialized():
        memory = torch.cuda.max_memory_allocated()
    times = re.findall(r"time ([0-9.]+)ms", out.getvalue())
    return {"ms": [float(ms) for ms in times], "memory_mb": memory / 1e6}


def resident(kind):
    """Return the bytes of memory that this process has, VmRSS, or has had at most, VmHWM."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"{kind}:\s+(\d+)", file.read())[1])
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sample(spec):
    """It reads the whole sequence for each token: the seconds of one token are measured at five
    lengths, and integrated with trapezoids."""
    import torch

    from model import GPT, GPTConfig

    spec, cost = json.loads(spec), {}
    tokens, device = spec.pop("tokens"), spec.pop("device")
    model = GPT(GPTConfig(**spec)).to(device).eval()
    for length in sorted({1 + i * (tokens - 1) // 4 for i in range(5)}):
        prompt = torch.zeros(1, length, dtype=torch.long, device=device)
        cost[length] = statistics.median(
            seconds_of(lambda p=prompt: model.generate(p, 1, top_k=1).tolist()) for _ in range(3))
    at = list(cost)
    seconds = cost[1] + sum((b - a) * (cost[a] + cost[b]) / 2
                            for a, b in zip(at, at[1:], strict=False))
    return {"tokens_per_s": tokens / seconds}


def transformers(spec):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    spec = json.loads(spec)
    config = GPT2Config(vocab_size=50304, n_positions=spec["block_size"], n_layer=spec["n_layer"],
                        n_head=spec["n_head"], n_embd=spec["n_embd"])
    model = GPT2LMHeadModel(config).to(spec["device"]).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.zeros(1, 1, dtype=torch.long, device=spec["device"])
    seconds = seconds_of(lambda: model.generate(
        prompt, attention_mask=prompt + 1, max_new_tokens=spec["tokens"], do_sample=False,
        pad_token_id=0).tolist())
    return {"tokens_per_s": spec["tokens"] / seconds}


def tiktoken(texts, threads):
    import tiktoken

    with open(texts, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = tiktoken.get_encoding("gpt2").encode_ordinary_batch
    return {"seconds": seconds_of(lambda: [
        encode(texts[i:i + 1024], num_threads=int(threads)) for i in range(0, len(texts), 1024)])}


def prepare(texts, script):
    """load_dataset reads the given documents; all else is the script's."""
    import datasets

    own = datasets.load_dataset
    datasets.load_dataset = lambda name, num_proc: own("json", data_files=texts)
    return {"seconds": seconds_of(lambda: runpy.run_path(script, run_name="__main__"))}


def seconds_of(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.path[0] = ""  # the checkout, not the folder of this file
    what = {f.__name__: f for f in (steps, sample, transformers, tiktoken, prepare)}[sys.argv[1]]
    print(json.dumps(what(*sys.argv[2:])))
