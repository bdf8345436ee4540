"""Draw text from a trained model. A checkpoint's folder is all it needs.

    python sample.py --out_dir=out/stdlib --start="def main("
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0
    echo "ROMEO:" | python sample.py --start=- --out_dir=out/shakespeare_char
"""

import codecs
import sys
from io import TextIOWrapper
from pathlib import Path

import torch

from configurator import run
from model import find_checkpoint, load_model
from runtime import compile_model, seed_for, setup
from tokenizer import Tokenizer


def main(
    init_from="resume",  # resume: the run in out_dir; or a checkpoint's folder, gpt2, gpt2-xl, ...
    out_dir="",  # the run's folder ('': the newest run in out/)
    checkpoint="best",  # which of the run's checkpoints: best or latest
    start="\n",  # the prompt; FILE:path reads a file, - standard input; <|endoftext|> is its token
    num_samples=10,  # samples to draw
    max_new_tokens=500,  # tokens in each, at most; a sample ends at end of text
    temperature=0.8,  # 0: always the likeliest token; 1: the model's own probabilities
    top_k=200,  # draw among the k likeliest tokens only; 0: among all
    seed=1337,  # of the drawing; the same on every device
    device="auto",  # cuda, mps, cpu, cuda:1
    dtype="auto",  # of matrix products: bfloat16 where native, else float32; float16
    compile="False",  # torch.compile: True, False, auto
):
    for key, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{key}={value}: must be 1 or more")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature={temperature}, top_k={top_k}: neither may be below 0")
    if checkpoint not in ("best", "latest"):
        raise ValueError(f"checkpoint={checkpoint!r}: choose best or latest; for another one give "
                         "its folder with --init_from=")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    runtime = setup(device, dtype)
    prompt = read_prompt(start)
    if init_from == "resume" or Path(init_from).is_dir():
        folder = init_from if init_from != "resume" else out_dir or newest_run(Path("out"))
        folder = find_checkpoint(folder, checkpoint)
        print(folder, file=sys.stderr)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
    else:
        from hf import load_gpt2

        model, tokenizer = load_gpt2(init_from)
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("start='': this model has no token to begin with; give it some text")
    model.to(runtime.device).eval()
    hidden = compile_model(model.hidden, compile, runtime)
    for number in range(num_samples):
        generator = torch.Generator().manual_seed(seed_for(seed, "sample", number))
        write_text(tokenizer, ids, generate(model, hidden, ids, max_new_tokens, temperature, top_k,
                                            generator, tokenizer, runtime))
        print("---------------", flush=True)


def read_prompt(start):
    """Return the prompt: the text itself, a file's (FILE:path) or standard input's (-)."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    try:
        if start == "-":
            return TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"start={start!r}: cannot be read as UTF-8 text "
                         f"({getattr(error, 'strerror', None) or error})") from error


def newest_run(folder):
    """Return the run in `folder` (itself, or below it) that was saved last."""
    pointers = [folder / "latest", *folder.glob("*/latest")]
    pointers = sorted((p for p in pointers if p.is_file()), key=lambda p: p.stat().st_mtime)
    if not pointers:
        raise ValueError(f"{folder}/ holds no run yet; train one with python train.py, or name a "
                         "run's folder with --out_dir=")
    return pointers[-1].parent


@torch.no_grad()
def generate(model, hidden, ids, max_new_tokens, temperature, top_k, generator, tokenizer, runtime):
    """Yield new token ids, one at a time, until end of text or max_new_tokens.

    hidden: model.hidden, or a compiled one. The last block_size tokens are what the model sees.
    The drawing is done on the CPU, so that a seed means the same on every device; ids beyond the
    tokenizer's vocabulary, which only pad the embedding, are never drawn.
    """
    ids = list(ids)
    for _ in range(max_new_tokens):
        seen = torch.tensor([ids[-model.config.block_size:]], device=runtime.device)  # (1, T)
        with runtime.autocast():
            logits = model.head(hidden(seen)[0, -1])  # (V,)
        logits = logits.float().cpu()[:tokenizer.vocab_size]
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite: either training diverged, or "
                             f"{runtime.dtype} is too narrow for this model; try --dtype=float32")
        token = draw(logits, temperature, top_k, generator)
        if token == tokenizer.eot:
            return
        ids.append(token)
        yield token


def draw(logits, temperature, top_k, generator):
    """Return one id drawn from logits (V,): softmax of logits / temperature, over the top_k."""
    if temperature == 0 or top_k == 1:
        return int(logits.argmax())
    logits, ids = logits.double(), torch.arange(len(logits))
    if 0 < top_k < len(logits):
        logits, ids = torch.topk(logits, top_k)
    # subtracting the largest first keeps a tiny temperature from overflowing
    probabilities = torch.softmax((logits - logits.max()) / temperature, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def write_text(tokenizer, prompt_ids, new_ids):
    """Print the prompt and then each token as it comes, holding back half of a UTF-8 character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(tokenizer.decode_bytes(prompt_ids)), end="", flush=True)
    for token in new_ids:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
