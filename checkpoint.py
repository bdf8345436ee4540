"""What a run leaves in its folder, and what a resumed run finds there.

    out/<run>/iter_000250/   model.safetensors, trainer.pt, tokenizer.json, meta.json, SHA256SUMS
    out/<run>/latest, best   which of them is the newest, and the one of the lowest validation loss

A checkpoint is whole or not there: it is written aside, every file and the folder are flushed to
the disk, then it is renamed, `latest` and `best` are switched, and only then old ones removed.
`sha256sum -c SHA256SUMS` checks one by hand. Nothing here is a pickle that could run code.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

from model import find_checkpoint, save_weights
from runtime import whole
from tokens import load_json, parse_mix, write_aside

SUMS = "SHA256SUMS"
KEEPS_THE_RUN = {  # settings that a resumed run may change and compute the same
    "max_iters", "eval_interval", "log_interval", "always_save_checkpoint", "keep_checkpoints",
    "max_bad_steps", "wandb_log", "wandb_project", "wandb_run_name", "async_checkpoint"}
ROUNDS_ANEW = {  # and the same but for the order of floating-point sums
    "batch_size", "gradient_accumulation_steps", "total_batch_size", "device", "dtype", "compile",
    "backend", "fsdp", "activation_checkpointing"}


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
        the main one writes. Raises ValueError where it, or the one before it in the background,
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
        value = whole(value.detach())
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

    Raises ValueError where it cannot be written: the one before is intact.
    """
    folder = run_dir / f"iter_{meta['iter_num']:06d}"
    aside, replaced = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with writing(folder, "the checkpoints before it are as they were; make room, then go on "
                             "with --init_from=resume"):
            aside.mkdir()
            save_weights(state["model"], aside)
            torch.save({"optimizer": state["optimizer"], "scaler": state["scaler"]},
                       aside / "trainer.pt")
            tokenizer.save(aside)
            write_aside(aside / "meta.json", json.dumps(meta, indent=1) + "\n")
            files = sorted(aside.iterdir())
            write_aside(aside / SUMS, "".join(f"{hash_of(p)}  {p.name}\n" for p in files))
            for path in (*files, aside, run_dir / "metrics.jsonl"):
                flush(path)
            if folder.exists():  # left by a kill before `latest` named it, or damaged
                os.replace(folder, replaced)
            os.replace(aside, folder)
            flush(run_dir)
            for pointer in ("latest", "best") if is_best else ("latest",):
                write_aside(run_dir / pointer, folder.name + "\n")
            flush(run_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    best = run_dir / "best"  # not there while every validation loss was NaN
    kept = {folder.name, best.read_text("utf-8", "replace").strip() if best.is_file() else ""}
    for old in [*saved(run_dir)[:-keep], *run_dir.glob("iter_*.old"), *run_dir.glob("iter_*.tmp")]:
        if old.name not in kept:
            shutil.rmtree(old)


@contextmanager
def writing(path, remedy="make room, then go on with --init_from=resume"):
    """Name what could not be written: the error of a full disk does not say it itself."""
    try:
        yield
    except Exception as error:  # safetensors and torch.save have errors of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be written ({reason}); {remedy}") from error


def flush(path):
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
    return sha256.hexdigest()


def saved(run_dir):
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


def last_whole(run_dir):
    """Return (the newest whole checkpoint that `latest` does not come before, one line per damaged
    one that was passed over). Raises ValueError where there is none."""
    if (run_dir / "model.safetensors").is_file():  # a checkpoint's own folder: that one or none
        return verify(run_dir), []
    passed, folders = [], saved(run_dir)
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
    raise ValueError(f"{'; '.join(passed)}: no checkpoint before it is whole; start again with "
                     "--init_from=scratch")


def verify(folder):
    """Return the checkpoint's folder. Raises ValueError where a file is missing or another than
    the one that was saved. Folders without SHA256SUMS (hf.py's) are checked as they are loaded."""
    sums = folder / SUMS
    for line in sums.read_text("utf-8", "replace").splitlines() if sums.is_file() else ():
        wanted, _, name = line.partition("  ")
        path = folder / (Path(name).name or "?")
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {path.name} is missing")
        if hash_of(path) != wanted:
            raise ValueError(f"{folder} is damaged: {path.name} is not the one that was saved")
    read_meta(folder)
    return folder


def read_meta(folder):
    """Return a checkpoint's meta.json. Raises ValueError where it is not one that we write."""
    meta = load_json(folder / "meta.json")
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
            raise ValueError(f"{folder / 'meta.json'}: damaged, {key} is {meta[key]!r:.50}")
    if "model" not in meta:
        raise ValueError(f"{folder / 'meta.json'}: not a checkpoint's, it has no model")
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
        raise ValueError(f"{folder / 'trainer.pt'}: cannot be resumed ({reason})") from error


def check_resumed(before, config, tokens_per_iter, shards, place):
    """Return one line per setting that a resumed run changes. Raises ValueError where the run's
    place in its data would be lost, or the data are not the checkpoint's."""
    new_run = "or begin a new run with these weights: --init_from=" + str(place)
    old = before.get("config", {})
    done = before.get("iter_num", 0)
    had = before.get("tokens", 0) // done if done else tokens_per_iter
    if had != tokens_per_iter:
        raise ValueError(f"the run had {had:,} tokens per iteration and has {tokens_per_iter:,} "
                         f"now, so its place in the data is lost; give --total_batch_size={had}, "
                         + new_run)
    if old.get("seed", config["seed"]) != config["seed"]:
        raise ValueError(f"seed={config['seed']}, but the run has seed={old['seed']}, which is its "
                         f"order of the data; leave seed out, {new_run}")
    shares = [list(parse_mix(c["mix"], c["dataset"]).values()) for c in ({**config, **old}, config)]
    if shares[0] != shares[1]:
        raise ValueError(f"mix={config['mix']!r}, but the run has mix={old['mix']!r}; leave mix "
                         f"out, {new_run}")
    facts = [[[shard.get(key) for key in ("file", "tokens", "sha256")] for shard in some]
             for some in (before.get("shards", []), shards)]
    if facts[0] != facts[1]:
        name = next((now or was)[0] for was, now in zip_longest(*facts) if was != now)
        raise ValueError(f"{name} of {config['mix'] or config['dataset']} has changed since the "
                         f"checkpoint {place} was written; prepare the dataset as it was, "
                         + new_run)
    lines = []
    for key, value in config.items():
        if key in old and old[key] != value and key not in ("out_dir", "init_from", "eval_only"):
            means = ("safe" if key in KEEPS_THE_RUN else "the same up to rounding"
                     if key in ROUNDS_ANEW else "another course from here on")
            lines.append(f"changed since {place.name}: {key}={old[key]} is now {value} ({means})")
    return lines
