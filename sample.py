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

from configurator import run
from model import find_checkpoint, load_model
from runtime import compile_model, seed_for, setup, tune_cpu
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
            raise ValueError(f"{key}={value}: must be 1 or more")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature={temperature}, top_k={top_k}: neither may be below 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if checkpoint not in ("best", "latest"):
        raise ValueError(f"checkpoint={checkpoint!r}: choose best or latest; for another one give "
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
        from hf import load_gpt2

        model, tokenizer = load_gpt2(init_from)
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("start='': this model has no token to begin with; give it some text")
    hold_in(model.to(runtime.device).eval(), runtime.dtype)
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


def hold_in(model, dtype):
    """Convert the matrices to the number format of the products once, not at each token. The
    position embedding stays float32, and so does the token embedding where it is only looked up,
    and with them the residual stream, as under autocast."""
    looked_up = ("wpe.weight",) if model.config.tied else ("wpe.weight", "wte.weight")
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.endswith(looked_up):
            p.data = p.data.to(dtype)


@torch.inference_mode()
def generate(model, step, ids, generators, max_new_tokens, eot, runtime, fixed_step=None):
    """Yield the next token of each sample, a list of B ids, until all have ended or max_new_tokens.
    A sample that has ended, at end of text, has None there.

    generators: B of them, one for each sample; ids: the prompt of all. step, fixed_step: see
    next_tokens; the second, if any, is given tensors of the same shapes at each token. The model
    sees the last block_size tokens of the prompt and what follows; when that is more than
    block_size, it forgets all but the newest half of a block, whose positions begin at 0 again.
    Forgetting one token at a time would shift all positions, and so cost a whole block each time.
    """
    B, size, device = len(generators), model.config.block_size, runtime.device
    rows, ended = [list(ids) for _ in generators], [False] * B
    cache = model.make_cache(B, runtime.dtype)  # (n_layer, 2, B, H, block_size, D)
    if fixed_step:
        torch._dynamo.mark_static_address(cache)  # or CUDA graphs would copy it
    position = torch.zeros((), dtype=torch.int64, device=device)
    begin, filled = max(0, len(ids) - size), 0  # the first token in view; tokens in the cache
    for number in range(max_new_tokens):
        if len(rows[0]) - begin > size:
            begin, filled = len(rows[0]) - (size + 1) // 2, 0
        chances = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
        different = B if number else 1  # rows: at first all have the prompt, which is read once
        seen = torch.tensor([row[begin + filled:] for row in rows[:different]], device=device)
        if filled and fixed_step:
            new, finite = fixed_step(seen, cache, position.fill_(filled), chances.to(device))
        else:
            new, finite = step(seen, cache[:, :, :different], filled, chances)  # (B,), ()
            if different < B:
                cache[:, :, 1:] = cache[:, :, :1]
        filled += seen.shape[1]
        *new, finite = torch.cat((new, finite[None])).tolist()  # the only wait for the device
        if not finite:
            raise ValueError("the logits are not finite: either training diverged, or "
                             f"{runtime.dtype} is too narrow for this model; try --dtype=float32")
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        ended = [end or token == eot for end, token in zip(ended, new, strict=True)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, new, strict=True)]


def next_tokens(model, vocab_size, temperature, top_k, top_p, runtime, tokens, cache, start,
                chances):
    """Token ids (B, T) at positions from `start` on, of which the cache holds the earlier ones,
    to (ids (B,), int64: are all logits finite? ()). Where all B rows are the same, one will do.

    Ids beyond vocab_size, which only pad the embedding, are never drawn. The drawing is CUDA's or
    the CPU's, never another device's: MPS has no float64 and a history of wrong draws.
    """
    with runtime.autocast():
        logits = model.head(model.hidden(tokens, cache, start)[:, -1])  # (B, V)
    place = runtime.device if runtime.device.type == "cuda" else "cpu"
    logits, chances = logits[:, :vocab_size].float().to(place), chances.to(place)
    ids = draw(logits.expand(len(chances), -1), temperature, top_k, top_p, chances)
    return ids, logits.isfinite().all().long()


def draw(logits, temperature, top_k, top_p, chances):
    """Return one id for each row of logits (B, V), from softmax(logits / temperature) over the
    top_k, and of those over the nucleus of top_p (Holtzman et al. 2020, section 3.1).

    chances: (B,) float64 in [0, 1): each row's place in its cumulative distribution, so that a
    seed, which gives them, means the same on every device and for every batch size.
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or top_p < 1:
        logits, ids = logits.topk(k)  # each (B, k), the largest first
    else:
        ids = torch.arange(k, device=logits.device).expand_as(logits)
    logits = logits.double()
    # subtracting the largest first keeps a tiny temperature from overflowing
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    sums = torch.softmax(logits, -1).cumsum(-1)  # (B, k)
    whole = sums[:, -1:]  # (B, 1)
    if top_p < 1:
        last = torch.searchsorted(sums, top_p * whole).clamp(max=k - 1)  # of the nucleus
        whole = sums.gather(-1, last)
    place = torch.searchsorted(sums, chances[:, None] * whole, right=True).clamp(max=k - 1)
    return ids.gather(-1, place)[:, 0]  # (B,)


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
