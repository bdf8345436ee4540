"""Where a run happens: device, number format, compilation, random numbers, processes.

Everything that depends on the hardware or on torchrun's environment is decided here, once, and
said in one line. Needs torch alone.
"""

import atexit
import ctypes
import hashlib
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bfloat16/float16 peak of one device, FLOP/s, by words of its name; the first match counts.
# From the makers' data sheets, without sparsity, with float32 sums; compared with torchtitan's list
# (torchtitan/tools/utils.py, which links the sheets) and nanochat's (nanochat/common.py).
PEAK_FLOPS = (
    ("B200", 2250e12), ("B100", 1750e12), ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("GH200", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A30", 165e12), ("A10G", 70e12),
    ("A10", 125e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12), ("RTX 4080", 97.5e12), ("RTX 3090", 71e12), ("RTX 3080", 59.5e12),
    ("V100-PCIE", 112e12), ("V100", 125e12), ("T4", 65e12), ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # one of its two dies, each of which is a device
)
OTHER_DEVICE = r" (Ti|SUPER|D|Laptop|Max-Q|MIG)\b|-\d+[ABCQ]$"  # another, or a part of one

# attention without its matrix (T, T) in memory, by names of our own
FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}
PICKED = ExitStack()  # holds the order that pick_attention found


@dataclass(frozen=True)
class Runtime:
    """One process's place: its device, its number format, its rank among world_size processes."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    backend: str = "gloo"  # between processes

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Matrix products in self.dtype, the rest as torch.autocast says; off for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def say(self, *text, **kwargs):
        """Print, on the main process only."""
        if self.is_main:
            print(*text, flush=True, **kwargs)

    def synchronize(self):
        """Wait until the device has done what it was given."""
        if self.device.type in ("cuda", "mps", "xpu"):
            getattr(torch, self.device.type).synchronize()

    def sum(self, tensor):
        """Sum a tensor over all processes, in place; return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)  # SUM: gloo has no average
        return tensor

    def agree(self, *numbers):
        """Return of each number the largest that a process has. Between CPUs: no GPU waits."""
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def wrap(self, model, fsdp=False):
        """Return the model on its device, ready for training: with several processes in DDP, where
        each has all of it, or with fsdp=True in FSDP2 (Zhao et al. 2023, arXiv 2304.11277), where
        each has a part of each parameter, and a block is whole only while it is at work."""
        if not fsdp or self.world_size == 1:
            model.to(self.device)
        if self.world_size == 1:
            return model
        self.join()
        if fsdp:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
            low = {} if self.dtype == torch.float32 else {"param_dtype": self.dtype,
                                                          "reduce_dtype": torch.float32}
            for part in (*model.transformer.h, model):  # the model's own: all that is in no block
                fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**low))
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def join(self):
        """Meet the other processes that torchrun started. So late, by `wrap`, because until then
        each of them finds a user's mistake alone, and ends with its line and not with a timeout."""
        # torchrun --max-restarts keeps its store, in which the old processes' addresses still are
        store, *_ = next(dist.rendezvous("env://", self.rank, self.world_size))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        # with NCCL gloo too, for what the processes agree on without their GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.backend == "nccl" else self.backend,
                                store=store, rank=self.rank, world_size=self.world_size)

    def accumulate(self, model, last):
        """Return the context of one micro-step: DDP sums gradients over processes in the last one
        only. FSDP2 does in each, because it keeps no whole gradients."""
        return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        """Leave the other processes, once joined; after an error without waiting for them."""
        if self.world_size == 1:
            return
        # gloo's threads need Python's lock to drop the last tensors, and torch would hold it while
        # it waits for them to end, which seized one of 14 runs up: let them do it now
        time.sleep(0.1)
        if kind in (None, SystemExit):
            dist.destroy_process_group()

    def close(self):
        self.__exit__(None)


def setup(device="auto", dtype="auto", backend="auto"):
    """Return the Runtime of this process.

    Raises ValueError for a device, dtype or backend that is unknown or not to be had here.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(device, local_rank if "RANK" in os.environ else None)
    dtype = pick_dtype(dtype, device)
    if device.type == "cuda":
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and sys.platform == "linux":
            # fewer gaps in its memory; torch reads it at the first tensor there
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)  # before any other use, or each rank fills GPU 0
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    if backend not in ("auto", "nccl", "gloo"):
        raise ValueError(f"backend={backend!r}: choose auto, nccl or gloo")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size > 1 and backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend='nccl' needs CUDA, the device is {device.type}; "
                         "use --backend=gloo or auto")
    return Runtime(device, dtype, rank, local_rank, world_size, backend)


def pick_device(name, local_rank=None):
    """Return the torch.device: for 'auto' cuda, then mps, then cpu; with torchrun the local GPU."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: choose auto, cpu, cuda, cuda:0, mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index or 0 if local_rank is None else local_rank
        if not 0 <= index < count:
            raise ValueError(f"device={name!r}, GPU {index}: torch sees {count} CUDA devices here; "
                             "use --device=auto, or as many processes as there are GPUs")
        return torch.device("cuda", index)
    if device.type == "mps" and not has_mps or device.type == "meta":
        raise ValueError(f"device={name!r} is not to be had here; use --device=auto")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError):
        raise ValueError(f"device={name!r} is not to be had here; use --device=auto") from None
    return device


def pick_dtype(name, device):
    """Return the torch.dtype of matrix products: for 'auto' bfloat16 where the hardware multiplies
    it natively (CUDA from compute capability 8.0, CPUs with AMX or AVX512-BF16), else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                               or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: choose auto, {', '.join(DTYPES)}")
    if device.type == "mps" and name != "float32" and torch.__version__ < (2, 13):
        raise ValueError(f"dtype={name!r}: on mps torch {torch.__version__} lets a token see later "
                         "ones (pytorch issue 195910); use --dtype=float32, or torch 2.13")
    return DTYPES[name]


def compile_model(model, choice, runtime):
    """Return torch.compile(model) where `choice` and the machine allow it, else the model.

    choice: 'auto' (on CUDA, unless a probe fails), 'True' (raises ValueError where it fails) or
    'False'. On CPU and MPS 'auto' is off: compiling takes longer than short runs save.
    """
    choice = choice.lower()
    if choice not in ("auto", "true", "1", "false", "0"):
        raise ValueError(f"compile={choice!r}: choose auto, True or False")
    if choice in ("false", "0") or choice == "auto" and runtime.device.type != "cuda":
        return model
    try:
        probe = torch.compile(lambda x: (x * x).sin() + 1)
        probe(torch.ones(8, device=runtime.device))
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if choice != "auto":
            raise ValueError(f"compile=True does not work here ({cause}); "
                             "use --compile=False") from error
        runtime.say(f"compile: off, a probe failed ({cause})")
        return model
    return torch.compile(model)


def pick_attention(config, batch_size, runtime, repeats=10):
    """Time attention, forward and backward, at the model's sizes with each fused kernel; let torch
    try the fastest first from now on, on all processes alike; return a line that says so.

    What a kernel does not take, such as a mask, goes to the next, at last to the one that is not
    fused. A compiled graph keeps the kernel that was first when it was traced; torch's cache of
    graphs does not know of kernels (pytorch issue 185449), so its key gets a tag.
    """
    PICKED.close()
    H, K = config.n_head, config.kv_heads
    heads = torch.randn(batch_size, config.block_size, H + 2 * K, config.head_dim,
                        device=runtime.device, dtype=runtime.dtype).transpose(1, 2)
    q, k, v = (part.detach().requires_grad_() for part in heads.split([H, K, K], 1))

    def seconds(kernel):
        times = []
        try:
            for _ in range(2 + repeats):
                runtime.synchronize()
                began = time.perf_counter()
                with sdpa_kernel(kernel):
                    y = F.scaled_dot_product_attention(q, k, v, dropout_p=config.dropout,
                                                       is_causal=True, enable_gqa=K != H)
                torch.autograd.grad(y, (q, k, v), y)
                runtime.synchronize()
                times.append(time.perf_counter() - began)
        except RuntimeError:  # it does not take these, or memory is short
            return math.inf
        return statistics.median(times[2:])  # the first ones set it up

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a kernel does not take these
        times = dict(zip(FUSED, runtime.agree(*map(seconds, FUSED.values())), strict=True))
    best = min(times.values())  # as fast up to noise: as listed, the same in each run
    order = sorted(FUSED, key=lambda name: times[name] > 1.05 * best)
    PICKED.enter_context(sdpa_kernel([*(FUSED[name] for name in order), SDPBackend.MATH],
                                     set_priority=True))
    atexit.register(PICKED.close)  # before torch is taken down
    torch.compiler.config.cache_key_tag = " ".join(
        [os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", ""), *order])
    return "attention: " + ", ".join(
        f"{name} {1000 * times[name]:.2f} ms" if math.isfinite(times[name]) else f"not {name}"
        for name in order)


def use_fp8(model, runtime, emulate=False):
    """Let torchao multiply the blocks' matrices as 8-bit floats, each tensor scaled to its largest
    number (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"), but for sizes that are no
    multiple of 16. Fast where compiled. The weights, as optimizers and checkpoints see them, stay
    the same tensors of the same names. emulate: rounds alike, on any device.

    Raises ValueError where the device cannot, or torchao is missing."""
    if not emulate and (runtime.device.type != "cuda"
                        or torch.cuda.get_device_capability(runtime.device) < (8, 9)):
        raise ValueError("fp8=True needs a CUDA GPU of compute capability 8.9 or higher (Ada, H100 "
                         f"and later), here is {describe(runtime)}; leave fp8 out")
    if model.config.block_size % 16:
        raise ValueError(f"fp8=True with block_size={model.config.block_size}: it must be a "
                         "multiple of 16, as all sizes of such products")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"fp8=True needs torchao ({error}); pip install torchao==0.18.0, or leave "
                         "fp8 out") from error
    convert_to_float8_training(
        model.transformer.h, config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda m, name: m.in_features % 16 == m.out_features % 16 == 0)


class Signals:
    """While entered, SIGINT, SIGTERM and SIGUSR1 are a wish that the training loop looks at between
    two iterations; a second SIGINT or SIGTERM ends the process at once.

    wish: 0, or the number of the signal that came last.
    """
    STOP = (signal.SIGINT, signal.SIGTERM)
    SAVE = getattr(signal, "SIGUSR1", 0)  # not on Windows

    def __init__(self):
        self.wish, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only it may
            for number in filter(None, (*self.STOP, self.SAVE)):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if number in self.STOP:
            self.wish = number
            for other in self.STOP:
                signal.signal(other, signal.SIG_DFL)
        self.wish = self.wish or number

    def saved(self):
        """Forget a wish to save, once it is fulfilled."""
        self.wish = 0 if self.wish == self.SAVE else self.wish


def tune_cpu(device):
    """Choose what is faster on a CPU, and on no other device: what happens to freed memory, and how
    dropout draws (experiments/speed.md)."""
    if device.type == "cpu":
        keep_freed_memory()
        draw_dropout_by_bits()


@cache
def keep_freed_memory():
    """Tell glibc to keep what is freed for the next allocation. Else it gives each large tensor
    back to the system, and the next one's pages are mapped and zeroed again, with a fault each.
    Return whether there is a glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:  # musl
        mallopt = None
    # of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD; 1 is success
    return bool(mallopt) and all([mallopt(-4, 0), mallopt(-1, -1), mallopt(-2, 1 << 26)])


@cache
def draw_dropout_by_bits():
    """Let torch's bernoulli_ on the CPU, which is dropout's mask, take 16 random bits for each
    number: a quarter of a draw of the generator instead of two whole ones. Probabilities are then
    multiples of 2**-16. Return what must be kept for as long as that is to last."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces torch's own
        library.impl("bernoulli_.float", bernoulli_by_bits, "CPU", allow_override=True)
    return library


def bernoulli_by_bits(x, p=0.5, *, generator=None):
    """Fill x with 1 where a random 16-bit number is among the p * 2**16 smallest, else with 0."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    ones = round(p * 2**16) - 2**15
    if ones == 2**15:
        return x.fill_(1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits = draws.random_(-2**63, None, generator=generator).view(torch.int16)
    return x.copy_((bits[:x.numel()] < ones).view(x.shape))


def recompute_blocks(model):
    """Let the backward pass compute each block again, with the same dropout, instead of keeping
    what is inside it (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def memory_needed(model, batch_size, dtype, recompute=False):
    """Return an estimate of the bytes that training holds at its peak: (weights, gradients and
    AdamW's two moments, with autocast's copies; what a micro-step keeps for its backward pass).

    Per token and layer about 17 numbers of the model's width (Korthikanti et al. 2022, "Reducing
    Activation Recomputation"), and with dropout its two masks; attention's matrix where it is kept,
    which is with dropout on a CPU: three times. recompute: per layer its input alone, and one layer
    whole. Of the logits, the float32 log-softmax, its gradient and theirs, of a chunk at the most.
    """
    config, half = model.config, dtype != torch.float32
    on_cpu = next(model.parameters()).device.type == "cpu"
    state = (18 if half else 16) * sum(p.numel() for p in model.parameters())
    wide = 38 if half else 68  # bytes, of which half: some are float32 all the same
    layer = wide * config.n_embd
    if config.dropout:
        layer += (8 if on_cpu else 2) * config.n_embd
        layer += 12 * config.n_head * config.block_size if on_cpu else 0
    tokens = batch_size * config.block_size
    logits = min(tokens * config.vocab_size, model.chunk) * 12
    layers = tokens * (layer + 4 * config.n_embd * config.n_layer if recompute
                       else layer * config.n_layer)
    return state, layers + logits


def memory_there(device):
    """Return the bytes of the device's memory that are free or ours, or None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def peak_flops(runtime):
    """Return the device's dense peak in FLOP/s for its number format, or None: not known."""
    if runtime.device.type != "cuda" or runtime.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(runtime.device)
    if re.search(OTHER_DEVICE, name):
        return None
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def describe(runtime):
    """Return one line: device, number format, processes."""
    name = (torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda"
            else f"{torch.get_num_threads()} threads" if runtime.device.type == "cpu" else "")
    return (f"device {runtime.device}{f' ({name})' if name else ''}, "
            f"dtype {str(runtime.dtype).removeprefix('torch.')}, "
            f"{runtime.world_size} process{'es' * (runtime.world_size > 1)}")


def whole(tensor):
    """Return a tensor that FSDP2 shares out over the processes, gathered; others as they are. All
    processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(p, tensor):
    """Return a tensor, whole on all processes, shared out as a parameter of its shape is."""
    if not hasattr(p, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def seed_for(*purpose):
    """Return a 63-bit seed that is a pure function of its arguments, such as (seed, 'dropout', 7).

    The random numbers of an iteration then need no saved state: a resumed run draws the same.
    """
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
