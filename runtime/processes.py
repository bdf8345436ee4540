"""Where a run happens: device, number format, compilation, random numbers, processes.

Everything that depends on the hardware or on torchrun's environment is decided here, once, and
said in one line. Needs torch alone.
"""

import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError
from runtime.device import pick_device, pick_dtype


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

    def print_main(self, *text, **kwargs):
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

    def all_max(self, *numbers):
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

    Raises UserError for a device, dtype or backend that is unknown or not to be had here.
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
        raise UserError(f"backend={backend!r}: choose auto, nccl or gloo")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size > 1 and backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend='nccl' needs CUDA, the device is {device.type}; "
                         "use --backend=gloo or auto")
    return Runtime(device, dtype, rank, local_rank, world_size, backend)


def full_tensor(tensor):
    """Return a tensor that FSDP2 shares out over the processes, gathered; others as they are. All
    processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(p, tensor):
    """Return a tensor, whole on all processes, shared out as a parameter of its shape is."""
    if not hasattr(p, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
