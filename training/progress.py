"""How far a run is, what a checkpoint keeps of it, and how it stops."""

import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from configurator import UserError
from posttraining.adapter import adapter_state, fill_adapter, read_adapter
from posttraining.lora import changes, merged_weights
from training.batches import DataError
from training.optim import load_optimizer_state, optimizer_state


@dataclass
class Progress:
    """How far a run is."""
    iter_num: int = 0  # updates that are done
    best_val_loss: float = math.inf
    evaluated_at: int | None = None  # the iteration of the last evaluation
    saved_at: int = 0  # the iteration of the last checkpoint

    @classmethod
    def of(cls, checkpoint):
        """Return that of a Checkpoint, or of a new run where it is None."""
        if checkpoint is None:
            return cls()
        meta = checkpoint.meta
        evaluated_at = meta["iter_num"] if "val_loss" in meta else None
        return cls(meta["iter_num"], meta["best_val_loss"], evaluated_at, meta["iter_num"])


def save(run, progress, log, writer, scores=None, is_best=False):
    """Write a checkpoint. scores: those of an evaluation at this iteration, if there was one."""
    # The facts, which people read too.
    meta = {"iter_num": progress.iter_num, "tokens": progress.iter_num * run.tokens_per_iter,
            **(scores or {}), "best_val_loss": progress.best_val_loss,
            "bad_steps": log.bad_steps.tolist(), "minutes": log.minutes(),
            "config": run.requested, "shards": run.train_data.shards, "commit": git_commit(),
            "reference": run.training.objective.reference_sha256}
    # The tensors: weights, optimizers, scaler; of LoRA its own part.
    state = state_of(run.training)
    if run.c.lora_rank:
        state["adapter"] = adapter_state(run.training.model, run.c)
        meta["base"] = run.training.model.base
    writer.save(state, meta, is_best)
    progress.saved_at = progress.iter_num


def state_of(training):
    """Return what a checkpoint keeps of the weights, the optimizers and the scaler."""
    return {"model": merged_weights(training.model), "scaler": training.scaler.state_dict(),
            "optimizer": optimizer_state(training.optimizers)}


def load_trainer(checkpoint, training):
    """Load the state of the optimizers and of the scaler from a Checkpoint, and LoRA's adapter."""
    # What LoRA has learned is not in the merged weights.
    if changes(training.model):
        adapter = checkpoint.folder / "adapter"
        fill_adapter(training.model, read_adapter(adapter)[1], adapter)
    # The optimizers and the scaler.
    path = checkpoint.folder / "trainer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_optimizer_state(training.optimizers, state["optimizer"])
        if state["scaler"]:
            training.scaler.load_state_dict(state["scaler"])
    except FileNotFoundError as error:
        if checkpoint.folder.is_dir():  # one of convert.py's
            raise UserError(f"{path} is missing, so nothing can be resumed; start a new run with "
                            f"these weights: --init_from={checkpoint.folder}") from error
        raise UserError(f"{checkpoint.folder} is gone: a run that trains there has replaced it; "
                        "stop that run, or choose another --out_dir=") from error
    except Exception as error:  # torch has many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be resumed ({reason})") from error


def handle_signal(number, run, progress, signals, writer):
    """End the process, or go on after a signal to save; the checkpoint is already saved."""
    wait_for_checkpoint(writer, run.runtime)
    line = f"{signal.Signals(number).name}: saved at iteration {progress.iter_num}"
    # a signal to save, and no more
    if number not in signals.STOP:
        run.runtime.print_main(line)
        signals.saved()
        return
    # one to stop: with the exit code that a shell gives it
    run.runtime.print_main(f"{line}; {how_to_go_on(run, progress)}")
    sys.exit(128 + number)


def stop_for_data_error(error, run, progress, log, writer):
    """Save a checkpoint, where there is something new to save, and raise the error."""
    if progress.iter_num > progress.saved_at:
        save(run, progress, log, writer)
    wait_for_checkpoint(writer, run.runtime)
    raise DataError(f"{error} (stopped at iteration {progress.iter_num}: "
                    f"{how_to_go_on(run, progress)})") from error


def wait_for_checkpoint(writer, runtime):
    """Wait until the last checkpoint is written, on all processes: none leaves before."""
    writer.wait()
    runtime.all_max(0)


def how_to_go_on(run, progress):
    if progress.iter_num == 0:
        return "nothing to save"
    return f"go on with --init_from=resume --out_dir={run.run_dir}"


@cache
def git_commit():
    """Return the commit of this code, or '' where it is not a git checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
