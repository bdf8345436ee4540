"""Measure others for bench.py, each in a process of its own, in the folder of their checkout.

    python experiments/peers.py train SPEC    # nanoGPT; or memory, sample, prepare, start
    python experiments/peers.py transformers SPEC   # Hugging Face's generate
    python experiments/peers.py lm_eval SPEC        # the scorer of EleutherAI's harness, HFLM
    python experiments/peers.py tiktoken SPEC       # encode_ordinary_batch alone

SPEC is JSON: the options of bench.py, the settings of train.py, and what bench.measure_peer adds.
Their files are imported as they are. The last line that is printed is JSON: the figures.
"""

import contextlib
import io
import json
import re
import runpy
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

# settings that nanoGPT's train.py has too
SETTINGS = ("batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias",
            "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "dataset", "device",
            "dtype")
# the sizes that its GPTConfig has too
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias")


def train_flags(spec):
    """Return the flags that give nanoGPT's train.py our settings; on a CPU those of its README."""
    flags = [f"--{key}={spec[key]}" for key in SETTINGS]
    flags += [f"--gradient_accumulation_steps={spec['micro_steps']}", "--eval_iters=1",
              "--log_interval=1", f"--out_dir={spec['folder']}/peer"]
    if not spec["compiles"]:
        flags.append("--compile=False")
    return flags


def train(spec):
    """Suites train and memory: the median milliseconds of an iteration, as train.py logs them, and
    the memory that came on top of the process as it was when torch was imported."""
    import numpy  # noqa: F401
    import torch

    # It counts iterations from 0, and the last one is max_iters.
    before = resident_memory("VmRSS")
    sys.argv = ["train.py", *train_flags(spec), "--eval_interval=1000000",
                f"--max_iters={spec['warmup'] + spec['iterations'] - 1}"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path("train.py", run_name="__main__")
    memory = resident_memory("VmHWM") - before
    if torch.cuda.is_initialized():
        memory = torch.cuda.max_memory_allocated()

    times = re.findall(r"time ([0-9.]+)ms", output.getvalue())
    ms = statistics.median(float(text) for text in times[spec["warmup"]:])
    tokens = spec["micro_steps"] * spec["batch_size"] * spec["block_size"]
    return {"ms": ms, "tokens_per_s": 1000 * tokens / ms, "memory_mb": memory / 1e6}


def resident_memory(key):
    """Return the bytes of memory that this process has, VmRSS, or has had at most, VmHWM."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"{key}:\s+(\d+)", file.read())[1])
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sample(spec):
    """nanoGPT reads the whole sequence for each token: the seconds of one token are measured at
    five lengths, and integrated with trapezoids."""
    import torch

    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**{key: spec[key] for key in SIZES})).to(spec["device"]).eval()
    tokens = spec["new_tokens"]
    # In the number format of ours, as its sample.py does it.
    dtype = getattr(torch, spec["dtype"])
    torch.backends.cuda.matmul.allow_tf32 = True
    autocast = torch.autocast(torch.device(spec["device"]).type, dtype, dtype != torch.float32)
    cost = {}  # {length: seconds of one token}
    for length in sorted({1 + i * (tokens - 1) // 4 for i in range(5)}):
        prompt = torch.zeros(1, length, dtype=torch.long, device=spec["device"])
        generate = partial(model.generate, prompt, 1, top_k=1)
        with autocast:
            cost[length] = statistics.median(seconds_of(generate) for _ in range(3))

    lengths = list(cost)
    seconds = cost[1]
    for a, b in zip(lengths, lengths[1:], strict=False):
        seconds += (b - a) * (cost[a] + cost[b]) / 2
    return {"tokens_per_s": tokens / seconds}


def make_gpt2(spec):
    """Return transformers' GPT-2 of our sizes with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50304, n_positions=spec["block_size"], n_layer=spec["n_layer"],
                        n_head=spec["n_head"], n_embd=spec["n_embd"])
    return GPT2LMHeadModel(config).to(spec["device"], getattr(torch, spec["dtype"])).eval()


def transformers(spec):
    import torch

    model = make_gpt2(spec)
    model.generation_config.eos_token_id = None
    prompt = torch.zeros(1, 1, dtype=torch.long, device=spec["device"])
    generate = partial(model.generate, prompt, attention_mask=prompt + 1, do_sample=False,
                       max_new_tokens=spec["new_tokens"], pad_token_id=0)
    seconds = seconds_of(generate)
    return {"tokens_per_s": spec["new_tokens"] / seconds}


def lm_eval(spec):
    """Questions/s of the harness's HFLM, which reads each choice with the whole context, a batch of
    ours in tokens at a time."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from evaluation.speed import questions_like_hellaswag

    pairs = questions_like_hellaswag(spec["questions"])
    requests = [(("", str(i)), *pair) for i, pair in enumerate(pairs)]
    tokenizer = PreTrainedTokenizerFast(  # which HFLM needs, and does not use for token ids
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a", pad_token="a")
    longest = max(len(context) + len(choice) for _, context, choice in requests)
    batch_size = max(1, spec["batch_size"] * spec["block_size"] // longest)
    harness = HFLM(make_gpt2(spec), tokenizer=tokenizer, batch_size=batch_size)
    harness._loglikelihood_tokens(requests[:8], disable_tqdm=True)
    score = partial(harness._loglikelihood_tokens, requests, disable_tqdm=True)
    return {"questions_per_s": len(requests) / 4 / seconds_of(score)}


def tiktoken(spec):
    import tiktoken

    with open(spec["texts"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = tiktoken.get_encoding("gpt2").encode_ordinary_batch

    def encode_all():
        for i in range(0, len(texts), 1024):
            encode(texts[i:i + 1024], num_threads=spec["threads"])

    return {"seconds": seconds_of(encode_all)}


def prepare(spec):
    """Run nanoGPT's openwebtext script; only its load_dataset is replaced, and reads our texts.
    bench.py times the whole process."""
    import datasets

    # It needs as many validation documents, one in 2,000, as it has batches; and it writes beside
    # itself, so what runs is a copy.
    with open(spec["texts"], encoding="utf-8") as file:
        batches = min(1024, 1 + sum(1 for _ in file) // 4000)
    script = Path("data/openwebtext/prepare.py").read_text("utf-8")
    copy = Path(spec["folder"], "prepare.py")
    copy.write_text(script.replace("total_batches = 1024", f"total_batches = {batches}"), "utf-8")

    load_dataset = datasets.load_dataset
    datasets.load_dataset = lambda name, num_proc: load_dataset("json", data_files=spec["texts"])
    runpy.run_path(str(copy), run_name="__main__")
    return {}


def start(spec):
    """Seconds to the first iteration of train.py, and of sample.py for one token of that run."""
    # What they print as errors comes out as ours, and so is the last line that bench.py sees.
    command = [sys.executable, "-u", "train.py", *train_flags(spec), "--max_iters=1",
               "--eval_interval=1"]
    begun = time.perf_counter()
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if re.match(r"iter +0\b", line):
                train_seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(process.returncode)

    command = [sys.executable, "sample.py", f"--out_dir={spec['folder']}/peer", "--num_samples=1",
               "--max_new_tokens=1", f"--device={spec['device']}"]
    begun = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.DEVNULL)
    if process.returncode:
        sys.exit(process.returncode)
    return {"train_s": train_seconds, "sample_s": time.perf_counter() - begun}


def seconds_of(function):
    """Return how long a call takes; a tensor that it returns is fetched from the device."""
    begun = time.perf_counter()
    result = function()
    if hasattr(result, "tolist"):
        result.tolist()
    return time.perf_counter() - begun


SUITES = {"train": train, "memory": train, "sample": sample, "transformers": transformers,
          "lm_eval": lm_eval, "tiktoken": tiktoken, "prepare": prepare, "start": start}

if __name__ == "__main__":
    sys.path[0] = ""  # the checkout, not the folder of this file
    suite, given_spec = sys.argv[1:]
    print(json.dumps(SUITES[suite](json.loads(given_spec))))
