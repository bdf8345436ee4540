"""Checkpoints: what a run leaves in its folder, and what a resumed run finds there.

    out/<run>/iter_000250/   model.safetensors  weights, under nanoGPT's names (weights.py)
                             trainer.pt         state of the optimizers and of float16's scaler
                             tokenizer.json     the dataset's tokenizer
                             meta.json          {"model": GPTConfig, "config": the run's settings,
                                                "iter_num", "tokens", "val_loss", "shards", ...}
                             SHA256SUMS         of the files above; `sha256sum -c SHA256SUMS`
    out/<run>/latest, best   the name of the newest one, and of the one with the lowest loss

A checkpoint is whole or not there: it is written under another name, every file and the folder are
flushed to the disk, then the folder is renamed, `latest` and `best` are switched, and only then are
old ones removed. Nothing here is a pickle that could run code. With LoRA there is adapter/ too.
"""

import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError
from formats.files import (
    flush_to_disk,
    hash_file,
    naming_write_errors,
    read_json,
    write_atomically,
    write_json,
)
from formats.foreign import refuse_others
from formats.weights import load_model, save_weights
from model import GPTConfig
from runtime.processes import full_tensor

SUMS = "SHA256SUMS"


# ---------------------------------------------------------------------- opening one


class Checkpoint(NamedTuple):
    """A checkpoint's folder whose files are those that were saved."""
    folder: Path
    meta: dict  # meta.json

    def load_model(self, dropout=0.0):
        """Return its GPT, on the CPU, in float32."""
        return load_model(self.folder, dropout)


def refuse_quantized(checkpoint, what):
    """Raise UserError where the weights of a Checkpoint are quantized, and so cannot be `what`."""
    kind = checkpoint.meta.get("quantized")
    if kind:
        raise UserError(f"{checkpoint.folder}: its weights are quantized to {kind}, so they cannot "
                        f"be {what}; use those that they were made from, "
                        f"{checkpoint.meta.get('source')}")


def find_checkpoint(path, which="latest"):
    """Return the checkpoint folder that `path` names: itself; or, in a run's folder, the one that
    the file `latest` or `best` names. Raises UserError where there is none."""
    path = Path(path)
    pointer = path / which
    if not pointer.is_file():
        refuse_others(path)
    if (path / "model.safetensors").is_file():
        return path
    if not pointer.is_file():
        runs = {str(found.parent) for folder in (path, Path("out"))
                for found in folder.glob("*/latest")}
        raise UserError(f"{path}: no checkpoint here ({pointer} is missing); train one, or name "
                        "another folder with --out_dir= or --init_from=; runs: "
                        f"{', '.join(sorted(runs)) or 'none'}")
    text = pointer.read_text("utf-8", "replace").strip()
    if "\n" in text:
        raise UserError(f"{pointer} is damaged: it names more than one checkpoint; name one")
    name = Path(text).name  # never outside of the run
    if name in ("", "..") or not (path / name).is_dir():
        raise UserError(f"{pointer} names {name!r}, which is not there")
    return path / name


def open_checkpoint(path, which="latest"):
    """Return the Checkpoint that `path` names (see find_checkpoint). Raises UserError where a file
    is missing or is not the one that was saved."""
    return read_named(path, which, read_verified)


def read_named(path, which, read):
    """Return read(folder) of the folder that find_checkpoint finds. Where a run that trains there
    removes it meanwhile, look once more."""
    folder = find_checkpoint(path, which)
    try:
        return read(folder)
    except (UserError, OSError):
        newer = find_checkpoint(path, which)
        if newer == folder:
            raise
        return read(newer)


def read_verified(folder):
    """Return the Checkpoint of a folder. Raises UserError as open_checkpoint does."""
    try:
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
                 for file in sorted(folder.rglob("*"))]
        verify_sums(folder, tuple(files))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); try again") from error
    return Checkpoint(folder, read_meta(folder))


def open_newest(run_dir):
    """Return (the newest intact Checkpoint of a run, one line for each damaged one before it in the
    search). Raises UserError where there is none."""
    if (run_dir / "model.safetensors").is_file():  # a checkpoint's own folder: that one or none
        return open_checkpoint(run_dir), []
    # the one that `latest` names, and those before it
    problems, folders = [], list_checkpoints(run_dir)
    try:
        newest = find_checkpoint(run_dir)
        if newest in folders:
            folders = folders[:folders.index(newest) + 1]
        else:
            folders = [newest]
    except UserError as error:
        if not folders:
            raise
        problems.append(str(error).split(";")[0])
    # the newest of them that is intact
    for folder in reversed(folders):
        try:
            checkpoint = open_checkpoint(folder)
        except UserError as error:
            if not folder.exists():  # a run that trains there has removed it meanwhile
                return open_newest(run_dir)
            problems.append(str(error))
            continue
        return checkpoint, [f"{problem}; going on from {folder.name}" for problem in problems]
    raise UserError(f"{'; '.join(problems)}: no checkpoint before it is intact; start again with "
                    "--init_from=scratch")


def list_checkpoints(run_dir):
    """Return a run's checkpoint folders, the newest last."""
    found = [path for path in run_dir.glob("iter_*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]))


@lru_cache(maxsize=16)
def verify_sums(folder, files):
    """Raise UserError where a file is missing or is not the one that was saved.

    files: the names, sizes and times of the folder's files; the same ones are hashed once. Folders
    without SHA256SUMS (those of convert.py) are checked as they are loaded.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text("utf-8", "replace").splitlines():
        wanted, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if hash_file(path) != wanted:
            raise UserError(f"{folder} is damaged: {name} is not the one that was saved")


def read_meta(folder):
    """Return a checkpoint's meta.json, with defaults for what a converted one lacks. Raises
    UserError where it is not a checkpoint's."""
    path = folder / "meta.json"
    meta = read_json(path)
    try:
        GPTConfig(**meta["model"])
        return {**meta,
                "config": dict(meta.get("config", {})),
                "shards": [dict(shard) for shard in meta.get("shards", [])],
                "iter_num": int(meta.get("iter_num", 0)),
                "tokens": int(meta.get("tokens", 0)),
                "minutes": float(meta.get("minutes", 0)),
                "best_val_loss": float(meta.get("best_val_loss", math.inf)),
                "bad_steps": [float(count) for count in meta.get("bad_steps", [0, 0])]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint's, or damaged ({error!r})") from error


# ---------------------------------------------------------------------- writing one


class CheckpointWriter:
    """Writes a run's checkpoints, one after the other. With in_background a thread writes them,
    from a copy in the host's memory, and the run waits only for the copy. To be used in a `with`
    statement, which waits for the last one."""

    def __init__(self, run_dir, tokenizer, model_config, keep, in_background, runtime):
        """keep: how many of the newest checkpoints are kept, beside the best one. in_background:
        'True', 'False', or 'auto': on CUDA."""
        self.run_dir, self.tokenizer, self.keep = run_dir, tokenizer, keep
        self.model_config, self.runtime = model_config, runtime
        self.copies = {}  # of each tensor, where it is copied to for the thread
        self.thread = self.job = None  # the thread that writes, and what it is writing
        is_wanted = in_background in ("True", "true", "1")
        if in_background == "auto":
            is_wanted = runtime.is_cuda
        if is_wanted and runtime.is_main:
            self.thread = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *exception):
        if self.thread:
            self.thread.shutdown()
        if exception_type is None:
            self.wait()

    def save(self, state, meta, is_best):
        """Write a checkpoint. All processes call it, because each holds its shard of a sharded
        model; the main one writes.

        state: {"model": weights, "optimizer": state, "scaler": state, "adapter": LoRA's}. Raises
        UserError where this checkpoint, or the one before it in the background, cannot be written.
        """
        self.wait()
        # gather and copy the tensors: this needs all processes, and the run waits for it
        state = self.copy_to_host(state, ())
        if not self.runtime.is_main:
            return
        # write them, here or in the thread
        meta = {"model": asdict(self.model_config), **meta,
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        arguments = (self.run_dir, self.tokenizer, self.keep, state, meta, is_best)
        if self.thread:
            self.job = self.thread.submit(write_checkpoint, *arguments)
        else:
            write_checkpoint(*arguments)

    def wait(self):
        """Wait for the checkpoint that is being written, and raise its error."""
        job, self.job = self.job, None
        if job:
            job.result()

    def copy_to_host(self, value, path):
        """Return a state_dict with its tensors gathered, and in the host's memory (None on other
        processes than the main one). For the thread they are copied, into the same buffers each
        time, because the next update changes them. path: the keys that lead to this value."""
        # go into dicts and lists; what is no tensor stays as it is
        if isinstance(value, dict):
            return {key: self.copy_to_host(part, (*path, key)) for key, part in value.items()}
        if isinstance(value, list):
            return [self.copy_to_host(part, (*path, i)) for i, part in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        # gather a tensor from all processes
        value = full_tensor(value.detach())
        if not self.runtime.is_main:
            return None
        if not self.thread:
            return value.cpu()
        # copy it for the thread
        if path not in self.copies:
            self.copies[path] = torch.empty(value.shape, dtype=value.dtype,
                                            pin_memory=value.is_cuda)
        return self.copies[path].copy_(value)


def write_checkpoint(run_dir, tokenizer, keep, state, meta, is_best):
    """Write a checkpoint under another name, rename it, point `latest` (and `best`) at it, remove
    old ones. Raises UserError where it cannot be written; the one before is then intact."""
    folder = run_dir / f"iter_{meta['iter_num']:06d}"
    unfinished = folder.with_name(folder.name + ".tmp")
    replaced = folder.with_name(folder.name + ".old")
    remedy = "go on with --init_from=resume: the checkpoints before it are as they were"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        with naming_write_errors(folder, remedy):
            # write every file, and flush it to the disk
            write_files(unfinished, tokenizer, state, meta)
            for path in (*sorted(unfinished.rglob("*")), unfinished, run_dir / "metrics.jsonl"):
                flush_to_disk(path)
            # rename the folder; one of that name was left by a kill, or is damaged
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(unfinished, folder)
            flush_to_disk(run_dir)
            # only now name it
            write_atomically(run_dir / "latest", folder.name + "\n")
            if is_best:
                write_atomically(run_dir / "best", folder.name + "\n")
            flush_to_disk(run_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    remove_old(run_dir, folder, keep)


def write_files(folder, tokenizer, state, meta):
    """Write a checkpoint's files into a new folder."""
    folder.mkdir()
    # what sampling needs, and what only a resumed run needs
    save_weights(state["model"], folder)
    torch.save({"optimizer": state["optimizer"], "scaler": state["scaler"]}, folder / "trainer.pt")
    tokenizer.save(folder)
    write_json(folder / "meta.json", meta)
    # LoRA's own part
    if "adapter" in state:
        (folder / "adapter").mkdir()
        save_weights(state["adapter"]["weights"], folder / "adapter", "adapter_model.safetensors")
        write_json(folder / "adapter" / "adapter_config.json", state["adapter"]["config"])
    # the hash of each file
    sums = [f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n"
            for path in sorted(folder.rglob("*")) if path.is_file()]
    write_atomically(folder / SUMS, "".join(sums))


def remove_old(run_dir, newest, keep):
    """Remove a run's checkpoints but for the newest `keep`, the best, and the one just written."""
    # what to keep
    kept = {path.name for path in list_checkpoints(run_dir)[-keep:]} | {newest.name}
    best = run_dir / "best"  # not there while every validation loss was NaN
    if best.is_file():
        kept.add(best.read_text("utf-8", "replace").strip())
    # all else, and what a kill left behind
    leftovers = [*run_dir.glob("iter_*.old"), *run_dir.glob("iter_*.tmp")]
    for path in [*list_checkpoints(run_dir), *leftovers]:
        if path.name not in kept:
            shutil.rmtree(path)
