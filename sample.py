"""Sample text from a trained model. A checkpoint's folder is all that it needs.

    python sample.py --out_dir=out/stdlib --start="def main("
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0
    echo "ROMEO:" | python sample.py --start=- --out_dir=out/shakespeare_char
    python sample.py --interactive=True           # talk with the model, or write a text together
    python sample.py --show_probs=True            # how probable each token was, and the runners-up
    python sample.py --prompts=questions.jsonl --out=answers.jsonl
"""

import sys
import time
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from configurator import UserError, check_settings, run
from exchange.huggingface import load_gpt2
from formats.checkpoint import load_model, read_named
from inference.chat import talk
from inference.generate import prepare_model
from inference.probabilities import show_probabilities
from inference.prompts import check_out, encode_entries, read_prompts, write_file
from inference.sampling import Sampling
from inference.text_stream import TextStream, read_stops, text_pieces
from inference.writing import Writing, encode_prompt, load_drafter
from runtime.cpu import tune_cpu
from runtime.kernels import can_compile
from runtime.processes import setup
from text.chat import encode_messages, encode_question
from text.tokenizer import Tokenizer, gpt2_spec

LIMITS = {"num_samples": ">= 1", "max_new_tokens": ">= 1", "batch_size": ">= 1",
          "temperature": ">= 0", "top_k": ">= 0", "top_p": "> 0, <= 1", "min_p": ">= 0, <= 1",
          "repetition_penalty": "> 0",
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
    stop="",  # a text that ends a sample; several: a JSON list '["Q:", "\\n\\n"]'
    interactive=False,  # answer what is typed; /help lists the commands
    show_probs=False,  # print the probability of each token, and the runners-up
    prompts="",  # a .jsonl file with "prompt" or "messages" in each line: samples go to out
    out="",  # the .jsonl file to write
    batch_size=10,  # samples drawn together; more need more memory, and hardly more time
    # how a token is drawn
    temperature=0.8,  # 0: always the most probable token; 1: the model's own probabilities
    top_k=200,  # draw among this many most probable tokens only; 0: among all
    top_p=1.0,  # nucleus sampling: the smallest set of tokens with this total probability; 1: off
    min_p=0.0,  # only tokens with this share of the most probable one's probability; 0: off
    repetition_penalty=1.0,  # makes tokens that the text has less probable, as 1.2 does; 1: off
    seed=1337,  # of the random draws; a seed means the same on every device
    # the hardware
    device="auto",  # auto, cpu, mps, cuda or, of several GPUs, cuda:1
    dtype="auto",  # of matrix products: float32, bfloat16, float16; auto: bfloat16 where native
    draft="",  # the same text sooner: lookup, or the folder of a smaller model; docs/sampling.md
    compile="False",  # use torch.compile: True, False, or auto: where the device gains from it
):
    check_settings(locals(), LIMITS)
    if sys.stdout is None:
        raise UserError("standard output is closed: there is nowhere to print samples")
    # A terminal that lacks a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    stops = read_stops(stop)
    if draft and (interactive or show_probs or prompts):
        raise UserError(f"draft={draft!r}: is for plain samples; leave it out with --interactive, "
                        "--show_probs and --prompts")
    entries = []
    if prompts:
        check_out(out)
        entries = read_prompts(prompts)
    runtime = setup(device, dtype)
    tune_cpu(runtime.device)

    # The prompts, as token ids. Where they are typed or in a file, `start` is not used.
    prompt = read_prompt(start)
    model, tokenizer = load_model_and_tokenizer(init_from, out_dir, checkpoint)
    if not (interactive or prompts):
        prompt_ids = encode_prompt(prompt, tokenizer, model)
    ids_of_entries = encode_entries(entries, tokenizer, model, partial(encode_messages, tokenizer))

    # The model, ready to sample from.
    prepare_model(model, runtime)
    drafter = load_drafter(draft, checkpoint, tokenizer, runtime)
    sampling = Sampling(temperature, top_k, top_p, tokenizer.vocab_size, min_p, repetition_penalty)
    writing = Writing(model, tokenizer, sampling, stops, max_new_tokens, seed, runtime,
                      can_compile(compile, runtime), drafter)

    # One of the three ways to use it, or the samples, a batch at a time.
    if interactive:
        return talk(writing, partial(encode_question, tokenizer), LIMITS)
    begun, tokens = time.perf_counter(), 0
    if entries:
        tokens = write_file(writing, entries, ids_of_entries, out, num_samples, batch_size)
    elif show_probs:
        for number in range(num_samples):
            tokens += show_probabilities(writing, prompt_ids, number)
    else:
        if drafter is not None:
            batch_size = 1
        for first in range(0, num_samples, batch_size):
            numbers = range(first, min(first + batch_size, num_samples))
            tokens += print_samples(writing.steps(prompt_ids, numbers), len(numbers), prompt_ids,
                                    tokenizer, stops)
    seconds = time.perf_counter() - begun
    print(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.1f} tokens/s",
          file=sys.stderr)


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


def print_samples(steps, count, prompt_ids, tokenizer, stops=()):
    """Print a batch of `count` samples. steps: what `generate` yields. Return how many tokens were
    drawn."""
    # Print the first sample while it is drawn, and collect the others.
    streams = [TextStream(tokenizer, stops) for _ in range(count)]
    texts = [stream.prompt(prompt_ids) for stream in streams]
    print(texts[0], end="", flush=True)
    for pieces in text_pieces(steps, streams):
        print(pieces[0], end="", flush=True)
        for i, piece in enumerate(pieces):
            texts[i] += piece
    print("\n---------------", flush=True)

    # Print the others.
    for text in texts[1:]:
        print(f"{text}\n---------------", flush=True)
    return sum(stream.count for stream in streams)


if __name__ == "__main__":
    run(main)
