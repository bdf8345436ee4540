"""What the loss in chunks costs: training/loss.py beside the same by torch.utils.checkpoint, and
beside all logits at once.

    python experiments/chunked_loss.py --repeats=5

The head of GPT-2 124M (768 x 50,304) for 1,536 tokens, forward and backward, in float32. Each
repeat is a process of its own, by turns. Prints seconds and the memory on top of what the process
had, each as median and range, and each repeat as a line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import check_settings, run  # noqa: E402
from formats.weights import empty_model  # noqa: E402
from model import IGNORE, GPTConfig  # noqa: E402
from runtime.child import figures_of_python  # noqa: E402
from runtime.memory import peak_memory, resident_memory  # noqa: E402
from training.loss import LOGITS_AT_ONCE, chunk_losses  # noqa: E402

WAYS = ("by hand", "by checkpoint", "at once")


def main(
    repeats=5,  # processes for each way
    tokens=1536,  # whose losses are computed
    updates=4,  # forward and backward passes in a process; the first is not counted
    way="",  # measure this way once, in this process
):
    check_settings({"repeats": repeats, "updates": updates}, {"repeats": ">= 1", "updates": ">= 2"})
    if way:
        print(json.dumps(measure(way, tokens, updates)))
        return
    rows = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name in WAYS:
            row = figures_of_python(__file__, f"--way={name}", f"--tokens={tokens}",
                                    f"--updates={updates}", cwd=ROOT)
            print(json.dumps({"way": name, **row}), flush=True)
            rows[name].append(row)
    for name in WAYS:
        for key in ("seconds", "memory_mb"):
            found = [row[key] for row in rows[name]]
            ratios = [row[key] / ours[key] for row, ours in zip(rows[name], rows[WAYS[0]],
                                                               strict=True)]
            print(f"{name:<14} {key:<10} {statistics.median(found):,.2f} ({min(found):,.2f} to "
                  f"{max(found):,.2f}); by ours {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f})")


def measure(way, tokens, updates):
    """Return the seconds of a forward and a backward pass, and the memory they need."""
    # a GPT that is nothing but its head
    generator = torch.Generator().manual_seed(1)
    model = empty_model(GPTConfig(n_layer=1, n_head=1, n_embd=768, block_size=1))
    weight = torch.randn(model.config.vocab_size, 768, generator=generator) * 0.02
    model.transformer.wte.weight = torch.nn.Parameter(weight)
    x = torch.randn(tokens, 768, generator=generator, requires_grad=True)
    targets = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
    losses = {"by hand": chunk_losses, "by checkpoint": checkpoint_losses,
              "at once": lambda model: None}
    losses[way](model)

    # time each pass but the first
    before, seconds = resident_memory(x.device), []
    for _ in range(updates):
        start = time.perf_counter()
        model.token_losses(x, targets).sum().backward()
        seconds.append(time.perf_counter() - start)
        x.grad = weight.grad = model.transformer.wte.weight.grad = None
    return {"seconds": statistics.median(seconds[1:]),
            "memory_mb": (peak_memory(x.device) - before) / 1e6}


def checkpoint_losses(model):
    """Let a model compute its losses in chunks whose logits are computed twice."""
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)

    def losses_of_chunk(x, targets):
        logits = model.head(x).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")

    def token_losses(x, targets):
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses_of_chunk, *chunk, use_reentrant=False)
                          for chunk in chunks])

    model.token_losses = token_losses


if __name__ == "__main__":
    run(main)
