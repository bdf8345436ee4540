"""runtime/cpu.py: freed memory is kept, dropout draws 16 bits for each number."""

import math
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from runtime import cpu
from runtime.cpu import dropout_by_bits, use_fast_dropout


def test_a_cpu_alone_is_tuned(monkeypatch):
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)
    assert cpu.tune_cpu(torch.device("cuda", 0)) == ""
    assert cpu.tune_cpu(torch.device("cpu")) == "cpu: freed memory is kept"
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: False)
    assert cpu.tune_cpu(torch.device("cpu")) == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """A process that takes and frees 40 MB many times faults its pages once."""
    code = ("import resource, numpy\nfrom runtime import cpu\n"
            "if {}: assert cpu.keep_freed_memory()\n"
            "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "numpy.ones(5_000_000); before = faults()\n"
            "for i in range(5): numpy.ones(5_000_000)\n"
            "print(faults() - before)")
    given, kept = (int(subprocess.run([sys.executable, "-c", code.format(keep)], text=True,
                                      check=True, cwd=ROOT, capture_output=True).stdout)
                   for keep in (False, True))
    assert given > 50 and kept < given / 10  # 50: where pages are of 2 MB


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert cpu.keep_freed_memory.__wrapped__() is False
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert cpu.keep_freed_memory.__wrapped__() is False


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.8, 0.999])
def test_dropout_by_bits_has_the_share_and_no_pattern(p):
    n = 400_000
    torch.manual_seed(5)
    y = dropout_by_bits(torch.full((n + 1,), 7.0), p)
    kept = (y != 0).float()
    torch.testing.assert_close(y, kept * 7 / (1 - p))
    share = 1 - p
    deviation = 5 * math.sqrt(p * share / n)
    assert kept.mean().item() == pytest.approx(share, abs=deviation + 2**-16)
    for lag in (1, 2, 3, 4, 8):  # the four numbers of one draw, and of neighbours
        pairs = (kept[lag:] * kept[:-lag]).mean().item()
        deviation = 5 * math.sqrt(share**2 * (1 - share**2) / n)
        assert pairs == pytest.approx(share**2, abs=deviation + 2**-15)


def test_dropout_by_bits_draws_what_earlier_runs_drew():
    """So that their losses stay the same; and the generator has moved on by as many draws."""
    torch.manual_seed(8)
    x = torch.ones(3, 5, requires_grad=True)
    y = dropout_by_bits(x, 0.25)
    assert (y * 0.75).tolist() == [[0, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    y.sum().backward()
    assert torch.equal(x.grad, y)
    following = torch.rand(1)
    torch.manual_seed(8)
    torch.empty(4, dtype=torch.int64).random_(-2**63, None)
    assert torch.equal(following, torch.rand(1))


def test_dropout_by_bits_is_dropout():
    """The number format stays; nothing is drawn where there is nothing to drop; any shape will
    do."""
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    torch.manual_seed(3)
    assert dropout_by_bits(x, 0.3).dtype == torch.bfloat16
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert dropout_by_bits(x, 0.3, training=False) is x and dropout_by_bits(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)
    for shape in ((0,), (), (2, 3, 5)):
        assert dropout_by_bits(torch.ones(shape), 0.3).shape == shape


@pytest.mark.parametrize("mask", ["causal", "documents", "none"])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_is_torch_s_but_for_the_mask_of_dropout(dtype, kv_heads, mask,
                                                                       monkeypatch):
    """To the last bit, forward and backward, so that earlier runs' losses stay the same."""
    documents = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    masks = {"documents": (documents[:, None] == documents).tril(), "causal": None, "none": None}
    options = dict(attn_mask=masks[mask], is_causal=mask == "causal", scale=0.3,
                   enable_gqa=kv_heads != 6)
    torch.manual_seed(4)
    qkv = [torch.randn(3, heads, 7, 5).to(dtype) for heads in (6, kv_heads, kv_heads)]

    def outputs(attend, dropout_p):
        inputs = [x.clone().requires_grad_() for x in qkv]
        y = attend(*inputs, dropout_p=dropout_p, **options)
        y.backward(torch.ones_like(y))
        return [y, *(x.grad for x in inputs)]

    # torch's own, in which dropout is so improbable that it only chooses the kernel
    theirs = outputs(torch.nn.functional.scaled_dot_product_attention, 1e-30)
    monkeypatch.setattr(cpu, "dropout_by_bits", lambda x, p: x)
    for ours, their in zip(outputs(cpu.attention_with_dropout, 1e-30), theirs, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, their)


def test_attention_s_dropout_zeroes_weights_and_keeps_the_mean():
    q = torch.zeros(64, 2, 7, 5)  # all weights are 1/7
    v = torch.ones(64, 2, 7, 5)
    torch.manual_seed(4)
    y = cpu.attention_with_dropout(q, q, v, dropout_p=0.25)
    kept = y[..., 0] * 7 * 0.75  # of seven weights, how many were kept
    torch.testing.assert_close(kept, kept.round())
    assert len(kept.round().unique()) > 3 and y.mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(cpu.attention_with_dropout(q, q, v), v)  # dropout_p is 0


def test_a_model_on_a_cpu_draws_all_its_masks_by_bits(monkeypatch):
    """And on a GPU none."""
    config = GPTConfig(block_size=13, vocab_size=11, n_layer=2, n_head=1, n_embd=7, dropout=0.25)
    model = GPT(config)
    tokens = torch.zeros(2, 13, dtype=torch.int64)
    calls = []
    own = dropout_by_bits
    monkeypatch.setattr(cpu, "dropout_by_bits", lambda *args: calls.append(args) or own(*args))
    use_fast_dropout(model, torch.device("cuda", 0))
    model(tokens, tokens)
    assert not calls
    use_fast_dropout(model, torch.device("cpu"))
    model(tokens, tokens)
    assert len(calls) == 1 + 2 * 3  # the embedding; in each layer attention, and two outputs
    torch.manual_seed(8)
    first = model(tokens, tokens)
    torch.manual_seed(9)
    assert not torch.equal(model(tokens, tokens), first)
    model.eval()
    assert torch.equal(model(tokens, tokens), model(tokens, tokens))


# ---------------------------------------------------------------------- products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("changes", [{}, {"tied": False, "softcap": 15.0, "bias": False}])
def test_fast_products_are_the_usual_ones_but_for_rounding(changes, monkeypatch):
    model = GPT(GPTConfig(block_size=61, vocab_size=97, n_layer=2, n_head=2, n_embd=46, **changes),
                torch.Generator().manual_seed(1)).eval()
    called, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, weight, *rest: (
        called.append(tuple(weight.shape)), product(x, weight, *rest))[1])
    monkeypatch.setattr(cpu, "LARGE", 46 * 97)
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: True)
    few, many = torch.arange(64).view(4, 16), torch.arange(65).view(5, 13)
    expected = [model.logits(tokens) for tokens in (few, many)]
    cpu.use_fast_products(model, torch.device("cpu"))

    # The large matrices: of a block two, one that widens and one that narrows, and the head.
    with torch.no_grad():
        torch.testing.assert_close(model.logits(few), expected[0], atol=1e-5, rtol=1e-5)
        wide, narrow = (184, 46), (46, 184)
        assert called == [(138, 46), wide, narrow, (138, 46), wide, narrow, (97, 46)]
        called.clear()

        # Many rows, and other number formats, are torch's own product.
        assert model.logits(many).equal(expected[1])
        with torch.autocast("cpu", torch.bfloat16):
            model.logits(few)
        model.bfloat16().logits(few)
    assert not called


@pytest.mark.parametrize(("maker", "has_mkl", "slow"), [
    ("AMD64 Family 25, AuthenticAMD", True, True), ("GenuineIntel", True, False),
    ("AuthenticAMD", False, False)])
def test_only_amd_leaves_mkl(maker, has_mkl, slow, monkeypatch):
    def no_file(path, encoding):
        raise OSError

    monkeypatch.setattr(cpu.platform, "processor", lambda: maker)
    monkeypatch.setattr(cpu.Path, "read_text", no_file)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu.mkl_is_slow.__wrapped__() is slow
    # Where it is not, a model stays as it is.
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: slow)
    model = GPT(GPTConfig(block_size=7, vocab_size=13, n_layer=1, n_head=1, n_embd=8))
    cpu.use_fast_products(model, torch.device("cpu"))
    assert ("head" in vars(model)) is slow
