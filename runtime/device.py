"""Which device, which number format, and what the device can do."""

import re

import torch

from configurator import UserError

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


def pick_device(name, local_rank=None):
    """Return the torch.device: for 'auto' cuda, then mps, then cpu; with torchrun the local GPU."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r}: choose auto, cpu, cuda, cuda:0, mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index or 0 if local_rank is None else local_rank
        if not 0 <= index < count:
            raise UserError(f"device={name!r}, GPU {index}: torch sees {count} CUDA devices here; "
                             "use --device=auto, or as many processes as there are GPUs")
        return torch.device("cuda", index)
    if device.type == "mps" and not has_mps or device.type == "meta":
        raise UserError(f"device={name!r} is not to be had here; use --device=auto")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError):
        raise UserError(f"device={name!r} is not to be had here; use --device=auto") from None
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
        raise UserError(f"dtype={name!r}: choose auto, {', '.join(DTYPES)}")
    if device.type == "mps" and name != "float32" and torch.__version__ < (2, 13):
        raise UserError(f"dtype={name!r}: on mps torch {torch.__version__} lets a token see later "
                         "ones (pytorch issue 195910); use --dtype=float32, or torch 2.13")
    return DTYPES[name]


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
