"""runtime.py: choices of device, dtype, backend and compilation, seeds, peaks."""

import itertools
import math
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from runtime import cpu, kernels, processes
from runtime.cpu import dropout_by_bits
from runtime.device import describe, peak_flops, pick_device, pick_dtype
from runtime.kernels import compile_model, pick_attention, use_fp8
from runtime.memory import checkpoint_activations, estimate_memory
from runtime.processes import Runtime, setup
from runtime.seeds import seed_for
from train import make_optimizer, train_step
from training.optim import adamw

CPU = Runtime(torch.device("cpu"), torch.float32)
GPU = Runtime(torch.device("cuda", 0), torch.bfloat16)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that claims to have two GPUs of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


# ---------------------------------------------------------------------- device


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


# ---------------------------------------------------------------------- number format


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


def test_autocast_is_for_matrix_products():
    a = torch.ones(3, 5)
    with CPU.autocast():
        assert not torch.is_autocast_enabled("cpu")
        assert (a @ a.T).dtype == torch.float32
    with Runtime(torch.device("cpu"), torch.bfloat16).autocast():
        assert (a @ a.T).dtype == torch.bfloat16
        assert (a + a).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("sizes, recompute, dtype", [
    (dict(n_layer=4, n_head=2, n_embd=64), False, torch.float32),
    (dict(n_layer=4, n_head=2, n_embd=64, dropout=0.2), False, torch.float32),
    (dict(n_layer=1, n_head=1, n_embd=16, vocab_size=9000), False, torch.float32),
    (dict(n_layer=4, n_head=2, n_embd=64), True, torch.float32),
    (dict(n_layer=4, n_head=2, n_embd=64), False, torch.bfloat16),
], ids=["layers", "dropout", "logits", "recompute", "bfloat16"])
def test_the_memory_estimate_is_what_training_takes(sizes, recompute, dtype, monkeypatch):
    """All tensors that there are at once, over two updates, as torch's profiler counts them."""
    monkeypatch.setattr(GPT, "chunk", 2**19)  # logits at a time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        model = GPT(GPTConfig(block_size=64, **{"vocab_size": 65, "bias": False, **sizes}))
        if recompute:
            checkpoint_activations(model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer = adamw(model, 1e-3, 0.1, (0.9, 0.95))
        for _ in range(2):
            batch = torch.randint(model.config.vocab_size, (2, 16, 64))
            train_step(model, optimizer, scaler, [tuple(batch)], 1.0, replace(CPU, dtype=dtype))
    changes = sorted((event.start_ns(), event.nbytes()) for event in
                     profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    peak = max(itertools.accumulate(size for _, size in changes))
    estimate = sum(estimate_memory(model, 16, dtype, recompute, logits_at_once=2**19))
    assert estimate == pytest.approx(peak, rel=0.15), (estimate, peak)


# ---------------------------------------------------------------------- what is faster on a CPU


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


# ---------------------------------------------------------------------- one process of some


def test_setup_of_one_process():
    runtime = setup("cpu", "bfloat16")
    assert runtime == Runtime(torch.device("cpu"), torch.bfloat16, 0, 0, 1)
    assert runtime.is_main
    tensor, model = torch.ones(2), torch.nn.Linear(2, 3)
    assert runtime.sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert runtime.wrap(model) is model
    runtime.synchronize()
    runtime.close()


def test_backends(monkeypatch):
    assert setup("cpu", "float32", "nccl").world_size == 1  # nanoGPT's default; nothing to join
    with pytest.raises(ValueError, match="backend='glo': choose auto, nccl or gloo"):
        setup("cpu", "float32", "glo")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="backend='nccl' needs CUDA, the device is cpu.*gloo"):
        setup("cpu", "float32", "nccl")


def test_the_allocator_s_segments_grow_on_a_gpu_unless_the_user_says_otherwise(monkeypatch,
                                                                                two_gpus):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(processes.sys, "platform", "linux")
    for given in ({}, {"PYTORCH_ALLOC_CONF": "backend:native"},
                  {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}):
        environment = dict(given)
        monkeypatch.setattr(processes.os, "environ", environment)
        setup("cpu")
        assert environment == given
        setup("cuda")
        assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_only_the_main_process_speaks(capsys):
    CPU.print_main("one", "line")
    Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2).print_main("nothing")
    assert capsys.readouterr().out == "one line\n"


def test_describe(monkeypatch):
    assert describe(CPU) == (f"device cpu ({torch.get_num_threads()} threads), dtype float32, "
                             "1 process")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    assert describe(Runtime(torch.device("cuda", 1), torch.bfloat16, world_size=8)) == (
        "device cuda:1 (NVIDIA X), dtype bfloat16, 8 processes")
    assert describe(Runtime(torch.device("mps"), torch.float32)).startswith("device mps, dtype")


# ---------------------------------------------------------------------- compilation


def broken(*args, **kwargs):
    raise RuntimeError("InvalidCxxCompiler: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more")


def test_compile_off_and_auto_do_not_compile_on_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    model = torch.nn.Linear(2, 3)
    for choice in ("False", "false", "0", "auto", "AUTO"):
        assert compile_model(model, choice, CPU) is model
    with pytest.raises(ValueError, match="compile='on': choose auto, True or False"):
        compile_model(model, "on", CPU)


def test_compile_auto_falls_back_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", broken)
    model = torch.nn.Linear(2, 3)
    assert compile_model(model, "auto", GPU) is model
    out = capsys.readouterr().out
    assert out.startswith("compile: off, a probe failed (RuntimeError: InvalidCxxCompiler: no com")
    assert out.count("\n") == 1


def test_compile_true_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="compile=True does not work here .*InvalidCxxCompiler"):
        compile_model(torch.nn.Linear(2, 3), "True", CPU)


def test_compile_compiles_where_the_probe_passes(monkeypatch):
    compiled, ones = [], torch.ones
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))  # there is no GPU here
    for choice, runtime in (("True", CPU), ("1", CPU), ("auto", GPU)):
        model = torch.nn.Linear(2, 3)
        assert compile_model(model, choice, runtime) is model
        assert compiled[-1] is model


# ---------------------------------------------------------------------- attention's kernel

HEADS = GPTConfig(block_size=13, n_layer=1, n_head=6, n_embd=30, n_kv_head=2)


@pytest.fixture
def own_order():
    """The choice ends with the test."""
    with torch.compiler.config.patch(cache_key_tag=""):
        yield
    kernels.PICKED.close()


def kernels_in_order():
    """Return the kernels that torch would try now, in their order."""
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


def test_the_kernels_are_timed_as_the_model_calls_them(monkeypatch, own_order):
    calls, own = [], kernels.F.scaled_dot_product_attention
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", lambda *args, **kwargs: (
        calls.append((args, kwargs, kernels_in_order())) or own(*args, **kwargs)))
    config = replace(HEADS, dropout=0.1)
    low = replace(CPU, dtype=torch.bfloat16)
    with monkeypatch.context() as patch:  # dropout: on a CPU no fused kernel has it
        patch.setattr(kernels, "FUSED", {"math": kernels.SDPBackend.MATH})
        assert pick_attention(config, 3, low, repeats=1).startswith("attention: math ")
    expected, calls[:] = calls[:], []
    model = GPT(replace(config, vocab_size=11))
    with low.autocast():
        model(*torch.zeros(2, 3, 13, dtype=torch.int64)).sum().backward()
    (theirs, kwargs, _), = calls
    for ours, its_kwargs, enabled in expected:
        assert len(expected) == 3 and enabled == [kernels.SDPBackend.MATH]
        for mine, model_s in zip(ours, theirs, strict=False):
            assert (mine.shape, mine.dtype, mine.stride()) == (
                model_s.shape, model_s.dtype, model_s.stride())
        assert all(kwargs[key] == its_kwargs[key] for key in its_kwargs)


def test_the_fastest_kernel_is_tried_first_and_the_others_after_it(monkeypatch, own_order):
    before, cost = kernels_in_order(), {"FLASH_ATTENTION": 5, "CUDNN_ATTENTION": 2, "MATH": 1}
    clock = [0.0]

    def attention(q, k, v, **kwargs):
        enabled, = kernels_in_order()
        if enabled.name not in cost:
            raise RuntimeError("No available kernel")
        clock[0] += cost[enabled.name]
        return q * k.sum() * v.sum()

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: clock[0])
    line = pick_attention(HEADS, 2, CPU)
    assert line == "attention: cudnn 2000.00 ms, flash 5000.00 ms, not efficient"
    assert [kernel.name for kernel in kernels_in_order()] == [
        "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert torch.compiler.config.cache_key_tag.split() == ["cudnn", "flash", "efficient"]
    cost["FLASH_ATTENTION"] = 1
    assert pick_attention(HEADS, 2, CPU).startswith("attention: flash 1000.00 ms, cudnn")
    assert kernels_in_order()[0].name == "FLASH_ATTENTION"
    # another process was slower with flash
    slow = replace(CPU, world_size=2)
    monkeypatch.setattr(Runtime, "all_max", lambda self, *times: [times[0] + 9, *times[1:]])
    assert pick_attention(HEADS, 2, slow).startswith("attention: cudnn 2000.00 ms, flash 10000.00")
    kernels.PICKED.close()
    assert kernels_in_order() == before


def test_with_kernels_picked_attention_is_the_same_with_and_without_a_mask(own_order):
    """And what does not take these is left out: on a CPU all but flash."""
    q, k, v = torch.randn(3, 2, 6, 13, 5)
    mask = torch.ones(13, 13, dtype=torch.bool).tril()
    attend = torch.nn.functional.scaled_dot_product_attention
    before = [attend(q, k, v, is_causal=True), attend(q, k, v, mask)]
    line = pick_attention(HEADS, 2, CPU)
    assert line.startswith("attention: flash ") and line.endswith(" ms, not cudnn, not efficient")
    torch.testing.assert_close([attend(q, k, v, is_causal=True), attend(q, k, v, mask)], before)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(kernels.FUSED))
def test_on_a_gpu_both_passes_use_the_kernel_that_was_picked(name, compiled, monkeypatch,
                                                             own_order):
    runtime = setup("cuda", "bfloat16")
    config = GPTConfig(block_size=128, vocab_size=64, n_layer=1, n_head=2, n_embd=128)
    monkeypatch.setattr(kernels, "FUSED", {name: kernels.FUSED[name]})
    if pick_attention(config, 2, runtime) == f"attention: not {name}":
        pytest.skip("this GPU does not have it")
    model = GPT(config).to(runtime.device)
    step = torch.compile(model) if compiled else model
    tokens = torch.zeros(2, 128, dtype=torch.int64, device=runtime.device)
    with runtime.autocast():
        step(tokens, tokens).sum().backward()  # traced before the profiler looks
    with torch.profiler.profile() as profiler, runtime.autocast():
        step(tokens, tokens).sum().backward()
    ran = {event.key for event in profiler.key_averages()}
    kernel = f"aten::_scaled_dot_product_{name}_attention"
    assert {kernel, f"{kernel}_backward"} <= ran, ran


# ---------------------------------------------------------------------- fp8


@pytest.mark.parametrize("runtime, capability", [(CPU, None), (GPU, (8, 0)), (GPU, (8, 6))])
def test_fp8_is_refused_where_there_is_none(runtime, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    name = r"cuda:0 \(NVIDIA A100-SXM4-80GB\)" if capability else "cpu"
    with pytest.raises(ValueError, match=f"capability 8.9 or higher .* here is device {name}"):
        use_fp8(GPT(HEADS), runtime)


def test_fp8_without_torchao_or_with_odd_sizes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match="fp8=True with block_size=13: .* multiple of 16"):
        use_fp8(GPT(HEADS), GPU)
    with pytest.raises(ValueError, match="fp8=True needs torchao .*pip install torchao=="):
        use_fp8(GPT(replace(HEADS, block_size=16)), GPU)


@pytest.mark.parametrize("runtime", [CPU, pytest.param(GPU, marks=[pytest.mark.gpu, NO_GPU])])
def test_fp8_keeps_the_weights_and_comes_close(runtime):
    """The emulation rounds as the hardware does: 3 bits after the first in what goes in, 2 in the
    gradients that come back, of numbers that are all scaled by their tensor's largest."""
    pytest.importorskip("torchao.float8")
    config = GPTConfig(block_size=16, vocab_size=48, n_layer=2, n_head=2, n_embd=32,
                       value_embeds=True, bias=True)
    model = GPT(config, torch.Generator().manual_seed(1)).to(runtime.device)
    batch = torch.randint(48, (2, 5, 16), generator=torch.Generator().manual_seed(2))

    def step():
        model.zero_grad()
        with runtime.autocast():
            loss = model(*batch.to(runtime.device)).mean()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, gradients = step()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    use_fp8(model, runtime, emulate=runtime is CPU)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    after = model.state_dict()
    assert list(after) == list(weights) and all(
        type(p) is torch.Tensor and torch.equal(p, weights[name]) for name, p in after.items())
    replaced = [name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(replaced) == 8 and not any(name.endswith("gate") for name in replaced)  # (2, 12)
    low_loss, low_gradients = step()
    assert low_loss != loss and low_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (low_gradients[name] - gradient).norm() < 0.2 * gradient.norm(), name
    for settings in (dict(optimizer="adamw"), dict(optimizer="muon", muon_lr=0.02, embed_lr=0.3)):
        optimizer = make_optimizer(model, dict(settings, learning_rate=1e-3, weight_decay=0.1,
                                               beta1=0.9, beta2=0.95), runtime)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            number for _, number in before}


# ---------------------------------------------------------------------- peaks, seeds


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


def test_seeds_are_a_pure_function_of_their_purpose():
    assert seed_for(1337, "init") == 4318679375150133952  # so that a run stays what it was
    purposes = [(1337, "init"), (1338, "init"), (1337, "dropout", 7, 0), (1337, "dropout", 0, 7),
                (1337, "dropout", 70), ("1337", "init")]
    seeds = [seed_for(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
