"""Measure sampling by turns in one process: ours, transformers' generate, and speculative decoding.

    python experiments/sampling.py speed --new_tokens=100 --repeats=3   # GPT-2 124M, random weights
    python experiments/sampling.py draft out/stdlib FILE.py --new_tokens=400
    python experiments/sampling.py draft out/large FILE.txt --draft=out/small

speed: greedy tokens/s of 1, 8 and 64 samples after a prompt of one token, beside 1 what reading the
weights once per token would allow, and the seconds until the first token after a prompt of 100; in
float32 on the CPU. draft: plain sampling of a run beside speculative decoding, by lookup or with a
smaller run, after prompts from a file: the text must be the same. Each line that is printed is
JSON. nanoGPT: python bench.py --suite=sample --compare=NANOGPT.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats.checkpoint import find_checkpoint, load_model  # noqa: E402
from inference.generate import generate, prepare_model  # noqa: E402
from inference.sampling import Sampling  # noqa: E402
from inference.speculate import Draft, Lookup, generate_with_proposals  # noqa: E402
from inference.writing import load_drafter  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.processes import setup  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

SIZES = {"124M": (12, 12, 768), "tiny": (2, 2, 64)}  # layers, heads, width


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "draft"))
    parser.add_argument("files", nargs="*")
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--draft", default="lookup")
    options = parser.parse_args()
    runtime = setup("cpu", "float32")
    if options.what == "speed":
        measure_speed(options, runtime)
    else:
        measure_draft(*options.files, options, runtime)


def measure_speed(options, runtime):
    """Print tokens/s of each side for three batch sizes, and seconds to the first token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # One model for each side, with random weights of the same size.
    layers, heads, width = SIZES[options.size]
    ours = prepare_model(GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width)), runtime)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_layer=layers, n_head=heads,
                                        n_embd=width)).eval()
    theirs.generation_config.eos_token_id = None

    def draw_ours(samples, length, count):
        generators = [torch.Generator() for _ in range(samples)]
        greedy = Sampling(0.0, 0, 1.0, 50304)
        list(generate(ours, [[0] * length] * samples, generators, count, greedy, None, runtime))

    def draw_theirs(samples, length, count):
        prompt = torch.zeros(samples, length, dtype=torch.long)
        theirs.generate(prompt, attention_mask=prompt + 1, do_sample=False, max_new_tokens=count,
                        pad_token_id=0)

    # The limit for one sample: each token reads all matrices but the positions' from memory.
    def read_weights(samples, length, count):
        for _ in range(count):
            for name, weight in ours.named_parameters():
                if weight.dim() == 2 and "wpe" not in name:
                    weight.sum()

    sides = {"flatgpt": draw_ours, "transformers": draw_theirs}
    for draw in sides.values():  # the first call allocates
        draw(1, 1, 3)
    for samples in (1, 8, 64):
        limit = {"reading": read_weights} if samples == 1 else {}
        times = by_turns({side: partial(draw, samples, 1, options.new_tokens)
                          for side, draw in (sides | limit).items()}, options.repeats)
        tokens = samples * options.new_tokens
        report({"samples": samples, "tokens_per_s": {
            side: [round(tokens / t, 1) for t in seconds] for side, seconds in times.items()}})
    times = by_turns({side: partial(draw, 1, 100, 1) for side, draw in sides.items()},
                     options.repeats)
    report({"prompt": 100, "seconds_to_first_token": times})


def measure_draft(run, path, options, runtime):
    """Print, for two temperatures, the tokens per pass and the speed beside plain sampling."""
    folder = find_checkpoint(run, "best")
    model, tokenizer = prepare_model(load_model(folder), runtime), Tokenizer.load(folder)
    drafter = load_drafter(options.draft, "best", tokenizer, runtime)
    ids = tokenizer.encode(Path(path).read_text("utf-8")).tolist()
    length = model.config.block_size // 2
    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature, 200, 1.0, tokenizer.vocab_size)
        passes, ratios = [], []
        for repeat in range(options.repeats):
            prompt, texts = ids[repeat * length:][:length], {}

            def draw(side, prompt=prompt, texts=texts, seed=repeat, sampling=sampling,
                     passes=passes):
                generator = torch.Generator().manual_seed(seed)
                rest = (generator, options.new_tokens, sampling, tokenizer.eot, runtime)
                if side == "plain":
                    steps = generate(model, [prompt], [generator], *rest[1:])
                else:
                    source = Lookup()
                    if options.draft != "lookup":
                        source = Draft(drafter, sampling, runtime)
                    steps = generate_with_proposals(model, source, prompt, *rest, passes)
                texts[side] = list(steps)

            times = by_turns({side: partial(draw, side) for side in ("plain", "draft")}, 1)
            assert texts["plain"] == texts["draft"]
            ratios.append(times["plain"][0] / times["draft"][0])
        report({"temperature": temperature, "tokens_per_pass": sum(passes) / len(passes),
                "times_as_fast": [round(ratio, 2) for ratio in ratios],
                "median": statistics.median(ratios)})


def by_turns(sides, repeats):
    """Return {side: seconds of each repeat}; in each repeat every side has its turn."""
    times = {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            begun = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - begun)
    return times


def report(figures):
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
