"""runtime/speed.py: the rates that bench.py shows beside its figures."""

import torch

from runtime.speed import measure_machine


def test_the_machine_is_measured():
    rates = measure_machine(torch.device("cpu"), size=128)
    assert list(rates) == ["float32_gflop_per_s", "bfloat16_gflop_per_s", "read_gb_per_s"]
    assert all(rate > 0 for rate in rates.values())
