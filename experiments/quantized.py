"""Weights in int8 beside float32: memory, tokens per second, validation loss.

    python experiments/quantized.py --out_dir=out/stdlib --dataset=stdlib      # the loss
    python experiments/quantized.py --tokens=64    # memory and speed: GPT-2 124M, random weights

Both models take turns, --rounds times; the speed is that of the fastest turn, batch 1. The loss is
computed in blocks, and once more one token at a time with the cache, as sampling does, where the
products round to bfloat16. "int4" is not in the product: its loss is that of weights rounded to
4 bits, in groups of 32 with a scale and an offset each, in the blocks' matrices alone.
"""

import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import run  # noqa: E402
from formats.checkpoint import open_checkpoint  # noqa: E402
from formats.shards import TokenReader  # noqa: E402
from inference.generate import Sampling, generate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.cpu import use_fast_products  # noqa: E402
from runtime.processes import setup  # noqa: E402
from runtime.quantized import quantize  # noqa: E402

GROUP = 32


def main(
    out_dir="",  # a run whose loss is measured; '': GPT-2 124M with random weights, no loss
    dataset="stdlib",  # the one that it was trained on
    blocks=32,  # of its validation split
    tokens=64,  # to generate in each turn
    rounds=5,  # turns
    dtype="float32",  # of matrix products: float32 or bfloat16
    cpu_time=False,  # count processor seconds of one thread: for a machine on which others work
):
    runtime, clock = setup("cpu", dtype), time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    if out_dir:
        model = open_checkpoint(out_dir, "best").load_model().eval()
    else:
        model = GPT(GPTConfig(), torch.Generator().manual_seed(1)).eval()
    models = {"float32": model, "int8": copy.deepcopy(model)}
    quantize(models["int8"])
    use_fast_products(model, runtime.device)

    # memory
    for name, m in models.items():
        print(f"{name}: {bytes_of(m) / 1e6:.1f} MB, {bytes_of(m) / bytes_of(model):.3f} of float32")

    # speed, by turns
    speeds = {name: 0.0 for name in models}
    for _ in range(rounds):
        for name, m in models.items():
            speeds[name] = max(speeds[name], tokens_per_second(m, tokens, runtime, clock))
    for name, speed in speeds.items():
        print(f"{name}: {speed:.2f} tokens/s, {speed / speeds['float32']:.2f} of float32")

    # loss
    if out_dir:
        models["int4"] = copy.deepcopy(model)
        round_to_4_bits(models["int4"])
        inputs, targets = read_blocks(dataset, blocks, model.config.block_size)
        for way in (loss_in_blocks, loss_token_by_token):
            first = way(model, inputs, targets)
            for name, m in models.items():
                loss = way(m, inputs, targets)
                print(f"{way.__name__}: {name} {loss:.5f}, {loss / first - 1:+.3%}")


def bytes_of(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def tokens_per_second(model, count, runtime, clock):
    """Return the speed of greedy sampling after the first token."""
    sampling = Sampling(0.0, 0, 1.0, model.config.vocab_size)
    steps = generate(model, [[1]], [torch.Generator()], count + 1, sampling, None, runtime)
    next(steps)
    start = clock()
    made = sum(1 for _ in steps)
    return made / (clock() - start)


def read_blocks(dataset, blocks, block_size):
    """Return (inputs, targets), each (blocks, T), from the start of the validation split."""
    rows = TokenReader(dataset, "val").rows(np.array([0]), blocks * block_size + 1)
    ids = torch.from_numpy(rows[0])
    return ids[:-1].view(blocks, -1), ids[1:].view(blocks, -1)


@torch.inference_mode()
def loss_in_blocks(model, inputs, targets):
    return model(inputs, targets).double().mean().item()


@torch.inference_mode()
def loss_token_by_token(model, inputs, targets):
    """The same loss for 8 sequences at a time, fed one token after the other."""
    total = 0.0
    for first in range(0, len(inputs), 8):
        part = inputs[first:first + 8]
        cache = model.make_cache(len(part))
        for t in range(part.shape[1]):
            logits = model.head(model.hidden(part[:, t:t + 1], cache, t)[:, -1])
            total += torch.nn.functional.cross_entropy(
                logits, targets[first:first + 8, t], reduction="sum").item()
    return total / targets.numel()


@torch.no_grad()
def round_to_4_bits(model):
    for name, layer in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc")):
            groups = layer.weight.view(len(layer.weight), -1, GROUP)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = (high - low) / 15
            layer.weight.copy_((((groups - low) / step).round() * step + low).view_as(layer.weight))


if __name__ == "__main__":
    run(main)
