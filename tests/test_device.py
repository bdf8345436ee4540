"""runtime/device.py: the choice of device and number format, and the table of peaks."""

import pytest
import torch

import configurator
from runtime.device import describe, peak_flops, pick_device, pick_dtype
from runtime.processes import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
GPU = Runtime(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that claims to have two GPUs of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch, two_gpus):
    assert pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


def test_a_cuda_device_has_its_number(two_gpus):
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:2', GPU 2: torch sees 2 CUDA devices"):
        pick_device("cuda:2")
    with pytest.raises(ValueError, match="GPU 3: torch sees 2 CUDA devices.*as many processes"):
        pick_device("auto", local_rank=3)
    with pytest.raises(ValueError, match="device='cuda:200'"):
        pick_device("cuda:200")


def test_of_several_processes_each_tells_of_its_own_gpu_only(two_gpus, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, told in (("cuda", 1), ("gpu", 0)):
        with pytest.raises(SystemExit) as stopped:
            configurator.run(lambda name=device: pick_device(name, local_rank=3), argv=[])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("error: device='cuda', GPU 3") == told


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:x", "cuda:-1", "cpu:0:1"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"device='{name}': choose auto, cpu, cuda, cuda:0, mps"):
        pick_device(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "xla", "hpu", "privateuseone", "vulkan"])
def test_a_device_that_is_not_here_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device='{name}' is not available here; use --device=au"):
        pick_device(name)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device='cuda', GPU 0: torch sees 0 CUDA devices"):
        pick_device("cuda")


def test_named_dtypes():
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, torch.device("cpu")) == getattr(torch, name)
    for name in ("fp32", "float64", ""):
        with pytest.raises(ValueError, match=f"dtype='{name}': choose auto, float32, bfloat16, fl"):
            pick_dtype(name, torch.device("cpu"))


@pytest.mark.parametrize(("capability", "dtype"), [
    ((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16),
    ((9, 0), torch.bfloat16), ((10, 0), torch.bfloat16)])
def test_auto_dtype_on_cuda(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize(("avx512", "amx"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_auto_dtype_on_cpu_and_mps(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert pick_dtype("auto", torch.device("cpu")) == (
        torch.bfloat16 if avx512 or amx else torch.float32)
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_half_precision_on_mps_needs_a_torch_without_the_mask_bug(monkeypatch):
    mps, version = torch.device("mps"), type(torch.__version__)
    monkeypatch.setattr(torch, "__version__", version("2.12.1"))
    assert pick_dtype("float32", mps) == torch.float32
    for name in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"dtype='{name}': on mps torch 2.12.1 .*float32"):
            pick_dtype(name, mps)
        assert pick_dtype(name, torch.device("cpu")) == getattr(torch, name)
    monkeypatch.setattr(torch, "__version__", version("2.13.0"))
    assert pick_dtype("bfloat16", mps) == torch.bfloat16


def test_describe(monkeypatch):
    assert describe(CPU) == (f"device cpu ({torch.get_num_threads()} threads), dtype float32, "
                             "1 process")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    assert describe(Runtime(torch.device("cuda", 1), torch.bfloat16, world_size=8)) == (
        "device cuda:1 (NVIDIA X), dtype bfloat16, 8 processes")
    assert describe(Runtime(torch.device("mps"), torch.float32)).startswith("device mps, dtype")


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A40", 149.7e12), ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12),
    ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12), ("Tesla V100-SXM2-16GB", 125e12),
    ("Tesla V100-PCIE-32GB", 112e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("AMD Instinct MI300X", 1307e12),
    # never a number against another machine's peak
    ("NVIDIA RTX A4000", None), ("NVIDIA RTX 4000 Ada Generation", None), ("NVIDIA H20", None),
    ("NVIDIA GB200", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3080 Ti", None),
    ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("GRID T4-16Q", None), ("NVIDIA A40-48Q", None), ("AMD Radeon RX 7900 XTX", None),
])
def test_the_peak_is_this_devices_or_not_known(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU) == peak
    assert peak_flops(Runtime(GPU.device, torch.float32)) is None
    assert peak_flops(CPU) is None
