"""Sample text from a trained model. A checkpoint's folder is all that it needs.

    python sample.py --out_dir=out/stdlib --start="def main("
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0
    echo "ROMEO:" | python sample.py --start=- --out_dir=out/shakespeare_char
    python sample.py --chat=True --out_dir=out/chats
"""

import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path

import torch

from configurator import UserError, check_settings, run
from exchange.huggingface import load_gpt2
from formats.checkpoint import load_model, read_named
from inference.chat import Conversation, TokenPrinter, talk
from inference.generate import Sampling, cast_weights, generate
from runtime.cpu import tune_cpu
from runtime.kernels import can_compile
from runtime.processes import setup
from runtime.seeds import seed_for
from text.chat import encode_question
from text.tokenizer import Tokenizer, gpt2_spec

LIMITS = {"num_samples": ">= 1", "max_new_tokens": ">= 1", "batch_size": ">= 1",
          "temperature": ">= 0", "top_k": ">= 0", "top_p": "> 0, <= 1",
          "checkpoint": ("best", "latest")}


def main(
    # the model
    init_from="resume",  # resume: the run in out_dir; or a checkpoint's folder, gpt2, gpt2-xl, ...
    out_dir="",  # the run's folder; '': the newest run in out/
    checkpoint="best",  # which of the run's checkpoints: best or latest
    # the prompt and its samples
    start="\n",  # the prompt; FILE:path reads a file, - standard input; <|endoftext|> is its token
    num_samples=10,  # how many samples to draw
    max_new_tokens=500,  # most tokens to add to the prompt; a sample also ends at end of text
    chat=False,  # talk with a model that was trained on conversations; Ctrl-D ends it
    batch_size=10,  # samples drawn together; more need more memory, and hardly more time
    # how a token is drawn
    temperature=0.8,  # 0: always the most probable token; 1: the model's own probabilities
    top_k=200,  # draw among this many most probable tokens only; 0: among all
    top_p=1.0,  # nucleus sampling: the smallest set of tokens with this total probability; 1: off
    seed=1337,  # of the random draws; a seed means the same on every device
    # the hardware
    device="auto",  # auto, cpu, mps, cuda or, of several GPUs, cuda:1
    dtype="auto",  # of matrix products: float32, bfloat16, float16; auto: bfloat16 where native
    compile="False",  # use torch.compile: True, False, or auto: where the device gains from it
):
    check_settings(locals(), LIMITS)
    if sys.stdout is None:
        raise UserError("standard output is closed: there is nowhere to print samples")
    # A terminal that lacks a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    runtime = setup(device, dtype)
    tune_cpu(runtime.device)

    # The prompt, as token ids. An empty one becomes the token with which documents begin.
    prompt = read_prompt(start)
    model, tokenizer = load_model_and_tokenizer(init_from, out_dir, checkpoint)
    prompt_ids = tokenizer.encode_prompt(prompt)
    if not prompt_ids:
        if tokenizer.eot is None:
            raise UserError("start='': this model has no end-of-text token; give it a prompt")
        prompt_ids = [tokenizer.eot]

    # The model, ready to sample from.
    model.to(runtime.device).eval()
    cast_weights(model, runtime.dtype)
    compiled = can_compile(compile, runtime)

    # A conversation.
    sampling = Sampling(temperature, top_k, top_p, tokenizer.vocab_size)
    if chat:
        generator = torch.Generator().manual_seed(seed_for(seed, "sample", 0))
        conversation = Conversation(model, tokenizer, max_new_tokens, sampling, generator, runtime,
                                    compiled)
        return talk(conversation, partial(encode_question, tokenizer), tokenizer)

    # The samples, a batch at a time. Each has a generator of its own, so that it is the same
    # whatever the batch size is.
    for first in range(0, num_samples, batch_size):
        numbers = range(first, min(first + batch_size, num_samples))
        generators = [torch.Generator().manual_seed(seed_for(seed, "sample", i)) for i in numbers]
        steps = generate(model, [prompt_ids] * len(numbers), generators, max_new_tokens, sampling,
                         tokenizer.eot, runtime, compiled)
        print_samples(steps, len(numbers), prompt_ids, tokenizer)


def read_prompt(start):
    """Return the prompt: the text itself, a file's (FILE:path) or standard input's (-)."""
    if start == "-" and sys.stdin is None:
        raise UserError("start='-': standard input is closed; give the prompt itself, or FILE:path")
    try:
        if start == "-":
            return TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
        if start.startswith("FILE:"):
            return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"start={start!r}: cannot be read ({error.strerror}); name a file of "
                        "text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"start={start!r}: is not UTF-8 text ({error}); convert it") from error
    return start


def load_model_and_tokenizer(init_from, out_dir, checkpoint):
    """Return the GPT and the Tokenizer of a checkpoint, whose folder is printed, or of GPT-2."""
    if init_from == "resume" and out_dir:
        folder = out_dir
    elif init_from == "resume":
        folder = newest_run(Path("out"))
    elif Path(init_from).is_dir():
        folder = init_from
    else:
        return load_gpt2(init_from), Tokenizer(gpt2_spec())
    return read_named(folder, checkpoint, load_folder)


def load_folder(folder):
    print(folder, file=sys.stderr)
    return load_model(folder), Tokenizer.load(folder)


def newest_run(folder):
    """Return the run that saved a checkpoint last: `folder` itself or a folder in it."""
    # Each checkpoint that a run saves rewrites the run's file `latest`.
    pointers = [path for path in (folder / "latest", *folder.glob("*/latest")) if path.is_file()]
    if not pointers:
        raise UserError(f"{folder}/ has no run yet; train one with python train.py, or name a "
                        "run's folder with --out_dir=")
    return max(pointers, key=lambda path: path.stat().st_mtime).parent


def print_samples(steps, count, prompt_ids, tokenizer):
    """Print a batch of `count` samples. steps: what `generate` yields."""
    # Print the first sample while it is drawn, and collect the others.
    printer = TokenPrinter(tokenizer)
    printer.print(prompt_ids)
    other_samples = [[] for _ in range(count - 1)]
    for first_id, *other_ids in steps:
        if first_id is not None:
            printer.print([first_id])
        for sample, new_id in zip(other_samples, other_ids, strict=True):
            if new_id is not None:
                sample.append(new_id)
    printer.end()
    print("---------------", flush=True)

    # Print the others.
    for sample in other_samples:
        printer = TokenPrinter(tokenizer)
        printer.print(prompt_ids + sample)
        printer.end()
        print("---------------", flush=True)


if __name__ == "__main__":
    run(main)
