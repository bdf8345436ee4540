"""What a run leaves in its folder, and what a resumed run finds there.

    out/<run>/iter_000250/   model.safetensors, trainer.pt, tokenizer.json, meta.json, SHA256SUMS
    out/<run>/latest, best   which of them is the newest, and the one of the lowest validation loss

A checkpoint is whole or not there: it is written aside, every file and the folder are flushed to
the disk, then it is renamed, `latest` and `best` are switched, and only then old ones removed.
`sha256sum -c SHA256SUMS` checks one by hand. Nothing here is a pickle that could run code.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from configurator import UserError
from formats.files import flush_to_disk, hash_file, naming_write_errors, read_json, write_atomically
from model import GPT, GPTConfig
from runtime.processes import full_tensor

SUMS = "SHA256SUMS"


class Checkpoints:
    """Writes a run's checkpoints, one after the other. While entered with in_background, a thread
    writes them, from a copy in the host's memory, and the run waits only for the copy."""

    def __init__(self, run_dir, model, tokenizer, optimizer, scaler, keep, in_background, runtime):
        self.parts, self.runtime = (model, optimizer, scaler), runtime
        self.write = partial(write_checkpoint, run_dir, tokenizer, keep)
        self.config, self.commit, self.copies, self.job = model.config, git_commit(), {}, None
        self.thread = ThreadPoolExecutor(1) if in_background and runtime.is_main else None

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if self.thread:
            self.thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, meta, is_best):
        """Write a checkpoint. All processes call it, for each gives its part of a sharded model;
        the main one writes. Raises UserError where it, or the one before it in the background,
        cannot be written."""
        self.wait()
        state = {name: self.on_host(part.state_dict(), name) for name, part in
                 zip(("model", "optimizer", "scaler"), self.parts, strict=True)}
        if not self.runtime.is_main:
            return
        meta = {"model": asdict(self.config), **meta, "commit": self.commit,
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        if self.thread:
            self.job = self.thread.submit(self.write, state, meta, is_best)
        else:
            self.write(state, meta, is_best)

    def wait(self):
        """Wait for a checkpoint in the background, and raise its error."""
        job, self.job = self.job, None
        if job:
            job.result()

    def on_host(self, value, place):
        """Return a state_dict with its tensors whole and in the host's memory: on the main process,
        the same memory each time where they are to outlive the next update."""
        if isinstance(value, dict):
            return {key: self.on_host(part, (place, key)) for key, part in value.items()}
        if isinstance(value, list):
            return [self.on_host(part, (place, i)) for i, part in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        value = full_tensor(value.detach())
        if not self.runtime.is_main:
            return None
        if not self.thread:
            return value.cpu()
        if place not in self.copies:
            self.copies[place] = torch.empty(value.shape, dtype=value.dtype,
                                             pin_memory=value.is_cuda)
        return self.copies[place].copy_(value)


def write_checkpoint(run_dir, tokenizer, keep, state, meta, is_best):
    """Write a checkpoint aside, rename it, point `latest` (and `best`) at it, drop old ones.

    Raises UserError where it cannot be written: the one before is intact.
    """
    folder = run_dir / f"iter_{meta['iter_num']:06d}"
    aside, replaced = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with naming_write_errors(folder, "the checkpoints before it are as they were; make room, then go on "
                             "with --init_from=resume"):
            aside.mkdir()
            save_weights(state["model"], aside)
            torch.save({"optimizer": state["optimizer"], "scaler": state["scaler"]},
                       aside / "trainer.pt")
            tokenizer.save(aside)
            write_atomically(aside / "meta.json", json.dumps(meta, indent=1) + "\n")
            files = sorted(aside.iterdir())
            write_atomically(aside / SUMS, "".join(f"{hash_file(p)}  {p.name}\n" for p in files))
            for path in (*files, aside, run_dir / "metrics.jsonl"):
                flush_to_disk(path)
            if folder.exists():  # left by a kill before `latest` named it, or damaged
                os.replace(folder, replaced)
            os.replace(aside, folder)
            flush_to_disk(run_dir)
            for pointer in ("latest", "best") if is_best else ("latest",):
                write_atomically(run_dir / pointer, folder.name + "\n")
            flush_to_disk(run_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    best = run_dir / "best"  # not there while every validation loss was NaN
    kept = {folder.name, best.read_text("utf-8", "replace").strip() if best.is_file() else ""}
    for old in [*list_checkpoints(run_dir)[:-keep], *run_dir.glob("iter_*.old"), *run_dir.glob("iter_*.tmp")]:
        if old.name not in kept:
            shutil.rmtree(old)


def list_checkpoints(run_dir):
    """Return a run's checkpoint folders, the newest last."""
    found = [path for path in run_dir.glob("iter_*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]))


def git_commit():
    """Return the commit of this code, or '' where it is not a git checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---------------------------------------------------------------------- finding one, loading it


def newest_intact_checkpoint(run_dir):
    """Return (the newest whole checkpoint that `latest` does not come before, one line per damaged
    one that was passed over). Raises UserError where there is none."""
    if (run_dir / "model.safetensors").is_file():  # a checkpoint's own folder: that one or none
        return verify(run_dir), []
    passed, folders = [], list_checkpoints(run_dir)
    try:
        newest = find_checkpoint(run_dir)
        folders = folders[:folders.index(newest) + 1] if newest in folders else [newest]
    except ValueError as error:
        if not folders:
            raise
        passed.append(str(error).split(";")[0])
    for folder in reversed(folders):
        try:
            return verify(folder), [f"{why}; going on from {folder.name}" for why in passed]
        except ValueError as error:
            passed.append(str(error))
    raise UserError(f"{'; '.join(passed)}: no checkpoint before it is whole; start again with "
                     "--init_from=scratch")


def verify(folder):
    """Return the checkpoint's folder. Raises UserError where a file is missing or another than
    the one that was saved. Folders without SHA256SUMS (those of
    convert.py) are checked as they are loaded."""
    sums = folder / SUMS
    for line in sums.read_text("utf-8", "replace").splitlines() if sums.is_file() else ():
        wanted, _, name = line.partition("  ")
        path = folder / (Path(name).name or "?")
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {path.name} is missing")
        if hash_file(path) != wanted:
            raise UserError(f"{folder} is damaged: {path.name} is not the one that was saved")
    read_meta(folder)
    return folder


def read_meta(folder):
    """Return a checkpoint's meta.json. Raises UserError where it is not one that we write."""
    meta = read_json(folder / "meta.json")
    config, bad_steps = meta.get("config", {}), meta.get("bad_steps", [0, 0])
    for key, fits in (
            ("model", isinstance(meta.get("model", {}), dict)),
            ("config", isinstance(config, dict) and all(
                isinstance(config.get(name, ""), str) for name in ("mix", "dataset"))),
            ("iter_num", is_number(meta.get("iter_num", 0), int)),
            ("tokens", is_number(meta.get("tokens", 0), int)),
            ("minutes", is_number(meta.get("minutes", 0), float)),
            ("best_val_loss", is_number(meta.get("best_val_loss", 0), float)),
            ("bad_steps", isinstance(bad_steps, list) and len(bad_steps) == 2
             and all(is_number(value, float) for value in bad_steps)),
            ("shards", isinstance(meta.get("shards", []), list)
             and all(isinstance(shard, dict) for shard in meta.get("shards", [])))):
        if not fits:
            raise UserError(f"{folder / 'meta.json'}: damaged, {key} is {meta[key]!r:.50}")
    if "model" not in meta:
        raise UserError(f"{folder / 'meta.json'}: not a checkpoint's, it has no model")
    return meta


def is_number(value, kind):
    """Is it a number of that kind, 0 or more? A NaN is."""
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and not value < 0


def load_trainer(folder, optimizer, scaler):
    """Load the optimizer's and the scaler's state from a checkpoint's folder."""
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'trainer.pt'}: cannot be resumed ({reason})") from error


class NoFirstWeights(TorchFunctionMode):
    """While entered, nothing is drawn: what replaces it costs enough, and for a tensor of the meta
    device torch would first import its compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def without_weights(config):
    """Return a GPT on the meta device: its shapes, and no memory."""
    with torch.device("meta"), NoFirstWeights():
        return GPT(config)


def save_weights(weights, folder):
    """Write weights, those of a model or {name: tensor}, into an existing folder, as
    model.safetensors."""
    from safetensors.torch import save_file

    path = Path(folder) / "model.safetensors"
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read it


def load_model(folder, dropout=0.0):
    """Return the GPT of a checkpoint folder: its config from meta.json, its weights from
    model.safetensors. Raises UserError where either is missing, damaged or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = GPTConfig(**json.loads((folder / "meta.json").read_text("utf-8"))["model"])
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a checkpoint ({type(error).__name__}: {error})") from error
    return from_weights(replace(config, dropout=dropout), weights, folder)


def from_weights(config, weights, place):
    """Return the GPT with these weights, {name: tensor}, in float32. Raises UserError, naming
    the place that they are from, where a name or a size does not fit."""
    model = without_weights(config)  # the given ones take their place
    # a copy, because safetensors' tensors are the file itself, mapped into memory
    weights = {name: p.to(torch.float32, copy=True) for name, p in weights.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: the weights are another model's ({reason})") from error
    return model


def find_checkpoint(path, which="latest"):
    """Return the checkpoint folder that `path` names: itself, or, in a run's folder, the one of
    iter_000250/ and so on whose name is in the file `latest` or `best`. Raises UserError where
    there is none."""
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    pointer = path / which
    if not pointer.is_file():
        raise UserError(f"{path}: no checkpoint here ({pointer} is missing); train one, or name "
                         "another folder with --out_dir= or --init_from=")
    name = Path(pointer.read_text("utf-8", "replace").strip()).name  # never outside
    if name in ("", "..") or not (path / name).is_dir():
        raise UserError(f"{pointer} names {name!r}, which is not there")
    return path / name
