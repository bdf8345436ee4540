"""The weights of a checkpoint: model.safetensors, and the GPT that has them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from configurator import UserError
from formats.files import read_json
from model import GPT, GPTConfig
from runtime.quantized import KINDS, replace_matrices


def load_model(folder, dropout=0.0):
    """Return the GPT of a checkpoint folder: its config from meta.json, its weights from
    model.safetensors, quantized if meta.json says so. Raises UserError where either is missing,
    damaged or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # read both files
    folder = Path(folder)
    try:
        meta = read_json(folder / "meta.json")
        config, kind = GPTConfig(**meta["model"]), meta.get("quantized", "")
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a checkpoint ({type(error).__name__}: {error})") from error
    # a model of those sizes, with those weights
    if kind and kind not in KINDS:
        raise UserError(f"{folder}: its weights are quantized to {kind!r:.60}; this version knows "
                        f"{', '.join(KINDS)}")
    return model_with_weights(replace(config, dropout=dropout), weights, folder, kind)


def model_with_weights(config, weights, source, kind=""):
    """Return the GPT with these weights, {name: tensor}, in float32, or quantized to this kind.
    Raises UserError, naming the source that they are from, where a name or a size does not fit."""
    model = empty_model(config)
    if kind:
        replace_matrices(model)
    # a copy, because safetensors' tensors are the file itself, mapped into memory
    copies = {}
    for name, tensor in weights.items():
        dtype = torch.float32
        if kind and name.endswith(".integers"):
            dtype = tensor.dtype
        copies[name] = tensor.to(dtype, copy=True)
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: the weights are another model's ({reason})") from error
    return model


def empty_model(config):
    """Return a GPT on torch's meta device: shapes without memory, for weights to be loaded into."""
    with torch.device("meta"), SkipRandomInit():
        return GPT(config)


class SkipRandomInit(TorchFunctionMode):
    """While entered, no random weights are drawn. On the meta device there is nothing to draw, but
    torch would import its compiler for it, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def save_weights(weights, folder, filename="model.safetensors"):
    """Write weights, those of a model or {name: tensor}, into an existing folder."""
    from safetensors.torch import save_file

    path = Path(folder) / filename
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    tensors = {name: p.detach().cpu().contiguous() for name, p in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})  # which some versions of transformers want
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read it
