"""runtime/cpu.py: freed memory is kept, dropout draws 16 bits for each number."""

import math
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from runtime import cpu
from runtime.cpu import dropout_by_bits


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
    """The number format stays; nothing is drawn where there is nothing to drop; any shape will do;
    a compiled graph has torch's own."""
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    torch.manual_seed(3)
    assert dropout_by_bits(x, 0.3).dtype == torch.bfloat16
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert dropout_by_bits(x, 0.3, training=False) is x and dropout_by_bits(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)
    for shape in ((0,), (), (2, 3, 5)):
        assert dropout_by_bits(torch.ones(shape), 0.3).shape == shape
    torch.compile(dropout_by_bits, backend="aot_eager", fullgraph=True)(x, 0.3)
