"""optim.py: the parameter groups, AdamW, the schedule."""

import copy
import math

import pytest
import torch

from model import GPT, GPTConfig
from optim import adamw, lr_at

CONFIG = GPTConfig(block_size=13, vocab_size=11, n_layer=2, n_head=3, n_embd=21)
LR, DECAY, BETAS = 1e-2, 0.3, (0.8, 0.9)


def make():
    """A tiny model with a gradient on every parameter."""
    model = GPT(CONFIG, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = make()
    optimizer = adamw(model, LR, DECAY, BETAS)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups
              for p in group["params"]}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        matrix = name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight",
                                "c_proj.weight"))
        assert decays[id(p)] == (DECAY if matrix else 0.0), name
    assert all(group["lr"] == LR and group["betas"] == BETAS for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out():
    model = make()
    model.transformer.wpe.requires_grad_(False)
    optimizer = adamw(model, LR, DECAY, BETAS)
    before = model.transformer.wpe.weight.clone()
    optimizer.step()
    assert torch.equal(model.transformer.wpe.weight, before)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 12 * 2 + 3


def test_fused_on_cpu_and_not_where_there_is_no_kernel():
    assert all(group["fused"] for group in adamw(make(), LR, DECAY, BETAS).param_groups)
    on_meta = GPT(CONFIG).to("meta")
    assert not any(group["fused"] for group in adamw(on_meta, LR, DECAY, BETAS).param_groups)


def test_the_first_step_is_adamws():
    """After one step Adam's two averages, corrected, are the gradient and its square."""
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw(model, LR, DECAY, BETAS).step()
    for name, p in model.named_parameters():
        decay = DECAY if p.dim() == 2 else 0.0
        expected = before[name] * (1 - LR * decay) - LR * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_later_steps_are_those_of_torchs_plain_adamw():
    model = make()
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    ours = adamw(model, LR, DECAY, BETAS)
    plain = torch.optim.AdamW(
        [{"params": [p], "weight_decay": DECAY if p.dim() == 2 else 0.0}
         for p in other.parameters()], lr=LR, betas=BETAS, foreach=False, fused=False)
    for _ in range(3):
        ours.step()
        plain.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
            p.grad.mul_(-0.7).add_(0.1)
            q.grad.mul_(-0.7).add_(0.1)


PEAK, LEAST, WARMUP, END = 6e-4, 6e-5, 7, 53


def test_the_schedule_climbs_to_the_peak_and_falls_to_the_least():
    rates = [lr_at(i, PEAK, LEAST, WARMUP, END) for i in range(END + 5)]
    assert rates[0] == PEAK / (WARMUP + 1) > 0
    assert rates[WARMUP] == pytest.approx(PEAK)
    assert rates[(WARMUP + END) // 2] == pytest.approx((PEAK + LEAST) / 2)
    assert rates[END] == rates[END + 4] == LEAST
    assert all(a < b for a, b in zip(rates[:WARMUP], rates[1:], strict=False))
    assert all(a > b for a, b in zip(rates[WARMUP:END], rates[WARMUP + 1:], strict=False))


def nanogpt_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """karpathy/nanoGPT, train.py, get_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize(("warmup", "end"), [(WARMUP, END), (0, END), (1, 2)])
def test_the_schedule_is_nanogpts(warmup, end):
    for i in range(end + 3):
        expected = nanogpt_lr(i, PEAK, LEAST, warmup, end)
        assert lr_at(i, PEAK, LEAST, warmup, end) == pytest.approx(expected, rel=1e-12)


def test_the_schedules_edges():
    assert lr_at(0, PEAK, LEAST, 0, END) == pytest.approx(PEAK)  # no warm-up
    assert lr_at(4, PEAK, LEAST, WARMUP, 3) == PEAK * 5 / (WARMUP + 1)  # warm-up beyond the end
    assert lr_at(WARMUP, PEAK, LEAST, WARMUP, 3) == LEAST
    assert lr_at(WARMUP, PEAK, LEAST, WARMUP, WARMUP) == LEAST  # no division by zero
    assert lr_at(0, PEAK, LEAST, 0, 0) == LEAST
