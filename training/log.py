"""What a run says: metrics.jsonl, the terminal, Weights & Biases, the loss curve.

    out/<run>/metrics.jsonl  a line per logged iteration and per evaluation
    out/<run>/loss.png       drawn from it
"""

import json
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from configurator import UserError
from formats.files import naming_write_errors, write_atomically
from runtime.device import peak_flops

HALVINGS = 32  # updates that float16's scaler may skip until its scale, from 2**16, is no cause


def open_run(run_dir, config, before, runtime):
    """Prepare the run's folder; return record(row), which writes a row of metrics.

    An earlier run in the folder is moved aside. A resumed run forgets the metrics that were
    written after its checkpoint: it will write them again.
    """
    if not runtime.is_main or config["eval_only"]:
        return lambda row: None
    path, kept, wandb_run = run_dir / "metrics.jsonl", [], None
    held = hold(run_dir)
    if before:
        done = before.get("iter_num", 0)
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["iter"] < done
                or row["iter"] == done and "val_loss" in row and "val_loss" in before]
    elif (run_dir / "latest").is_file():
        number = next(n for n in range(1, 10**6) if not Path(f"{run_dir}.{n}").exists())
        os.replace(run_dir, f"{run_dir}.{number}")
        runtime.print_main(f"{run_dir} held an earlier run, which is now {run_dir}.{number}")
        held = hold(run_dir)
    write_atomically(path, "".join(kept))
    if config["wandb_log"]:
        wandb_run = start_wandb(run_dir, config)

    def record(row, held=held):  # and keep the lock
        row = {key: value for key, value in row.items() if math.isfinite(value)}  # JSON has no NaN
        with naming_write_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if wandb_run:
            wandb_run.log(row, step=row["iter"])

    return record


def hold(run_dir):
    """Return the run's folder's lock, made where it is missing: this process's until it is closed
    or the process ends, however. Raises UserError where another process has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(run_dir / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{run_dir}: another process is training there; stop it, or choose "
                         "another --out_dir=") from None
    except OSError:  # a file system without locks
        pass
    return file


def read_metrics(path):
    """Return the rows of metrics.jsonl; a line that a kill or a full disk cut short is left out."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("iter"), int):
                rows.append(row)
    return rows


def start_wandb(run_dir, config):
    """Return the Weights & Biases run; a resumed run goes on in the same curve."""
    id_path = run_dir / "wandb_id"
    wandb_id = id_path.read_text("utf-8", "replace") if id_path.is_file() else None
    if wandb_id and not re.fullmatch(r"[\w-]{1,64}", wandb_id.strip()):
        raise UserError(f"{id_path}: not the id of a run; remove the file")
    try:
        import wandb

        wandb_run = wandb.init(project=config["wandb_project"], config=config, dir=run_dir,
                               name=config["wandb_run_name"] or run_dir.name,
                               id=wandb_id, resume="allow" if wandb_id else None)
    except Exception as error:  # not installed, not logged in, not reached
        raise UserError(f"wandb_log=True does not work here ({error}); log in with `wandb login`, "
                         "set WANDB_MODE=offline, or leave it out") from error
    write_atomically(id_path, wandb_run.id)
    return wandb_run


def draw_loss(run_dir):
    """Draw loss.png: the training and the validation loss of metrics.jsonl over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["iter"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="iteration", ylabel="loss, nats per token", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with naming_write_errors(run_dir / "loss.png"):
        figure.savefig(run_dir / "loss.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


class Log:
    """What a run says of its iterations and evaluations: a line in the terminal and one in
    metrics.jsonl, through `record`. It counts the updates that were skipped, too.

    bad: (2,) on the device: updates skipped because they were not numbers, and those in a row.
    """

    def __init__(self, record, model, config, tokens_per_iter, before, run_dir, runtime):
        self.record, self.model, self.config, self.runtime = record, model, config, runtime
        self.tokens_per_iter, self.run_dir = tokens_per_iter, run_dir
        self.bad = torch.tensor(before.get("bad_steps", [0, 0]), dtype=torch.float32,
                                device=runtime.device)
        self.norm_mean, self.all_done = None, 0  # of this process's run
        self.began = time.perf_counter() - 60 * before.get("minutes", 0)
        self.restart_clock()

    def restart_clock(self):
        """Begin to count the time of an iteration anew, after something else."""
        self.since, self.done = time.perf_counter(), 0
        if not self.all_done:
            self.all_since = self.since

    def minutes(self):
        """Return how long the run has trained, before it was resumed too."""
        return (time.perf_counter() - self.began) / 60

    def used(self):
        """Return the share of max_minutes that is used up; 0 where there is no such limit."""
        limit = self.config["max_minutes"]
        return self.minutes() / limit if limit else 0.0

    def evaluation(self, iter_num, row):
        self.record({"iter": iter_num, "tokens": iter_num * self.tokens_per_iter, **row})
        self.runtime.print_main(f"step {iter_num}: " + ", ".join(
            f"{key} {value:.4f}" for key, value in row.items()))

    def iteration(self, iter_num, lr, loss, grad_norm, scaler):
        """Note an iteration; where it is one to be logged, wait for the device and log it. Raises
        ValueError where too many updates in a row were skipped."""
        # float16's scaler skips some to find its scale: those count in the row, not in the sum
        of_loss = ~torch.isfinite(loss)
        skipped = of_loss | ~torch.isfinite(grad_norm)
        self.bad = torch.stack([self.bad[0] + (of_loss if scaler.is_enabled() else skipped),
                                (self.bad[1] + 1) * skipped])
        self.done, self.all_done = self.done + 1, self.all_done + 1
        if iter_num % self.config["log_interval"]:
            return
        loss, norm, bad_steps, streak = torch.stack([loss, grad_norm, *self.bad]).tolist()  # waits
        now, max_iters = time.perf_counter(), self.config["max_iters"]
        seconds = (now - self.since) / self.done
        left = (now - self.all_since) / self.all_done * (max_iters - iter_num - 1)
        if limit := self.config["max_minutes"]:
            left = max(0, min(left, 60 * (limit - self.minutes())))
        self.since, self.done = now, 0
        row = {"iter": iter_num, "tokens": (iter_num + 1) * self.tokens_per_iter, "loss": loss,
               "grad_norm": norm, "lr": lr, "ms": 1000 * seconds,
               "tokens_per_s": self.tokens_per_iter / seconds,
               **mfu(self.model, self.tokens_per_iter / seconds, self.runtime),
               **({"bad_steps": int(bad_steps)} if bad_steps else {})}
        self.record(row)
        if math.isfinite(norm):
            self.norm_mean = 0.98 * (self.norm_mean or norm) + 0.02 * norm
        self.runtime.print_main(log_line(row, self.norm_mean, max_iters, left))
        if streak >= self.config["max_bad_steps"] + (HALVINGS if scaler.is_enabled() else 0):
            latest = self.run_dir / "latest"
            last = latest.read_text("utf-8").strip() if latest.is_file() else ""
            raise UserError(
                f"{streak:.0f} updates in a row up to iteration {iter_num} had a loss or a gradient"
                " that is not a number, and were skipped; "
                + (f"the last good checkpoint is {self.run_dir / last}" if last
                   else "no checkpoint yet") + "; lower learning_rate, or raise max_bad_steps")


def mfu(model, tokens_per_s, runtime):
    """Return {'mfu': share of the devices' peak FLOP/s}, or {} where the peak is not known."""
    peak = peak_flops(runtime)
    achieved = model.flops_per_token() * tokens_per_s / runtime.world_size
    return {"mfu": achieved / peak} if peak else {}


def log_line(row, norm_mean, max_iters, left):
    share = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    minutes, seconds = divmod(round(left), 60)
    return (f"iter {row['iter']:>{len(str(max_iters))}}/{max_iters} | loss {row['loss']:.4f} | "
            f"norm {row['grad_norm']:.3f} (mean {norm_mean or math.nan:.3f}) | "
            f"lr {row['lr']:.2e} | {row['ms']:.1f} ms | {row['tokens_per_s']:,.0f} tok/s{share} | "
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
