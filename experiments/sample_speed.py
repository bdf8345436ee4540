"""Tokens/s of sampling on this CPU: flatgpt, Hugging Face's generate, nanoGPT, by turns.

    python experiments/sample_speed.py NANOGPT_FOLDER [REPEATS]   # one line of JSON each

GPT-2 124M, random weights, float32, one sequence, greedy, 1,000 tokens after a prompt of one. For
nanoGPT, which reads the whole sequence for each token, the seconds of a token are measured at five
lengths and integrated. Each repeat also measures the rate at which the weights can be read.
"""

import importlib.util
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig  # noqa: E402
from runtime import Runtime  # noqa: E402
from sample import generate, next_tokens  # noqa: E402

TOKENS, LENGTHS, BATCH = 1000, (1, 250, 500, 750, 1000), 10


def main(nanogpt, repeats=3):
    import transformers

    transformers.logging.set_verbosity_error()
    spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt, "model.py"))
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = GPT(GPTConfig()).eval()
    nano = module.GPT(module.GPTConfig(dropout=0.0)).eval()
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50304)).eval()
    hf.generation_config.eos_token_id = None
    numbers = {name: [] for name in ("gb_per_s", "flatgpt", "flatgpt_batch", "hf", "nanogpt")}
    for _ in range(int(repeats)):
        numbers["gb_per_s"].append(read_rate(ours))
        numbers["flatgpt"].append(TOKENS / seconds(lambda: sample(ours, 1, TOKENS)))
        prompt = torch.zeros(1, 1, dtype=torch.long)
        numbers["hf"].append(TOKENS / seconds(lambda p=prompt: hf.generate(
            p, attention_mask=p + 1, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)))
        numbers["nanogpt"].append(TOKENS / nanogpt_seconds(nano))
        numbers["flatgpt_batch"].append(100 * BATCH / seconds(lambda: sample(ours, BATCH, 100)))
        print(json.dumps({name: round(values[-1], 3) for name, values in numbers.items()}),
              flush=True)
    print(json.dumps({"medians": {name: round(statistics.median(values), 3)
                                  for name, values in numbers.items()},
                      "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "transformers": transformers.__version__}))


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def sample(model, count, tokens):
    runtime = Runtime(torch.device("cpu"), torch.float32)
    step = partial(next_tokens, model, 50304, 0.0, 0, 1.0, runtime)
    generators = [torch.Generator() for _ in range(count)]
    assert len(list(generate(model, step, [0], generators, tokens, None, runtime))) == tokens


@torch.no_grad()
def nanogpt_seconds(model):
    """Seconds of TOKENS tokens: the trapezoids between the medians of three at each length."""
    cost = {}
    for length in LENGTHS:
        tokens = torch.zeros(1, length, dtype=torch.long)
        cost[length] = statistics.median(
            seconds(lambda t=tokens: model.generate(t, 1, top_k=1)) for _ in range(3))
    return sum((b - a) * (cost[a] + cost[b]) / 2
               for a, b in zip(LENGTHS, LENGTHS[1:], strict=False))


@torch.no_grad()
def read_rate(model):
    """Best of ten of the GB/s at which all weights are summed: nothing decodes faster."""
    weights = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in weights)
    return size / min(seconds(lambda: [p.sum() for p in weights]) for _ in range(10)) / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
