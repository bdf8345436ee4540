"""Draw text from a trained model. A checkpoint's folder is all it needs.

    python sample.py --out_dir=out/stdlib --start="def main("
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0
    echo "ROMEO:" | python sample.py --start=- --out_dir=out/shakespeare_char
"""

import codecs
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path

import torch

from configurator import UserError, run
from formats.checkpoint import find_checkpoint, load_model
from inference.generate import cast_weights, generate, next_tokens
from runtime.cpu import tune_cpu
from runtime.kernels import compile_model
from runtime.processes import setup
from runtime.seeds import seed_for
from text.tokenizer import Tokenizer, gpt2_spec


def main(
    init_from="resume",  # resume: the run in out_dir; or a checkpoint's folder, gpt2, gpt2-xl, ...
    out_dir="",  # the run's folder ('': the newest run in out/)
    checkpoint="best",  # which of the run's checkpoints: best or latest
    start="\n",  # the prompt; FILE:path reads a file, - standard input; <|endoftext|> is its token
    num_samples=10,  # samples to draw
    max_new_tokens=500,  # tokens in each, at most; a sample ends at end of text
    temperature=0.8,  # 0: always the likeliest token; 1: the model's own probabilities
    top_k=200,  # draw among the k likeliest tokens only; 0: among all
    top_p=1.0,  # and of those among the fewest that have this probability together; 1: all
    batch_size=10,  # samples drawn together, which costs little more time than one, but memory
    seed=1337,  # of the drawing; the same on every device
    device="auto",  # cuda, mps, cpu, cuda:1
    dtype="auto",  # of matrix products: bfloat16 where native, else float32; float16
    compile="False",  # torch.compile: True, False, auto
):
    for key, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens),
                       ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{key}={value}: must be 1 or more")
    if temperature < 0 or top_k < 0:
        raise UserError(f"temperature={temperature}, top_k={top_k}: neither may be below 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
    if checkpoint not in ("best", "latest"):
        raise UserError(f"checkpoint={checkpoint!r}: choose best or latest; for another one give "
                         "its folder with --init_from=")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    runtime = setup(device, dtype)
    tune_cpu(runtime.device)
    prompt = read_prompt(start)
    if init_from == "resume" or Path(init_from).is_dir():
        folder = init_from if init_from != "resume" else out_dir or newest_run(Path("out"))
        folder = find_checkpoint(folder, checkpoint)
        print(folder, file=sys.stderr)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
    else:
        from formats.huggingface import load_gpt2

        model, tokenizer = load_gpt2(init_from), Tokenizer(gpt2_spec())
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eot]
    if ids == [None]:
        raise UserError("start='': this model has no token to begin with; give it some text")
    cast_weights(model.to(runtime.device).eval(), runtime.dtype)
    step = partial(next_tokens, model, tokenizer.vocab_size, temperature, top_k, top_p, runtime)
    fixed_step = None
    if compile_model(step, compile, runtime) is not step:
        fixed_step = torch.compile(step, mode="reduce-overhead", fullgraph=True)  # one CUDA graph
    for first in range(0, num_samples, batch_size):
        generators = [torch.Generator().manual_seed(seed_for(seed, "sample", number))
                      for number in range(first, min(first + batch_size, num_samples))]
        write_texts(tokenizer, ids, len(generators), generate(
            model, step, ids, generators, max_new_tokens, tokenizer.eot, runtime, fixed_step))


def read_prompt(start):
    """Return the prompt: the text itself, a file's (FILE:path) or standard input's (-)."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    try:
        if start == "-":
            return TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"start={start!r}: cannot be read as UTF-8 text "
                         f"({getattr(error, 'strerror', None) or error})") from error


def newest_run(folder):
    """Return the run in `folder` (itself, or below it) that was saved last."""
    pointers = [folder / "latest", *folder.glob("*/latest")]
    pointers = sorted((p for p in pointers if p.is_file()), key=lambda p: p.stat().st_mtime)
    if not pointers:
        raise UserError(f"{folder}/ holds no run yet; train one with python train.py, or name a "
                         "run's folder with --out_dir=")
    return pointers[-1].parent


def write_texts(tokenizer, prompt_ids, count, steps):
    """Print the samples of a batch: the first as it comes, the others after it."""
    others = [[] for _ in range(count - 1)]

    def first_ids():
        for first, *rest in steps:
            for ids, token in zip(others, rest, strict=True):
                if token is not None:
                    ids.append(token)
            if first is not None:
                yield first

    for new_ids in (first_ids(), *others):
        write_text(tokenizer, prompt_ids, new_ids)
        print("---------------", flush=True)


def write_text(tokenizer, prompt_ids, new_ids):
    """Print the prompt and then each token as it comes, holding back half of a UTF-8 character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(tokenizer.decode_bytes(prompt_ids)), end="", flush=True)
    for token in new_ids:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
