"""The runs under out/, for the page: their curves and their settings.

What a request names is looked up among the folders that are there, and never becomes a path.
"""

import math
import time
from functools import lru_cache
from pathlib import Path

from configurator import UserError
from formats.checkpoint import find_checkpoint, read_meta
from formats.run_folder import read_metrics

MAX_POINTS = 2000  # of a curve: more than a screen has columns


def list_runs(folder):
    """Return a dict for each run, the one that was written last first: name, seconds since then,
    and iter, max_iters, loss, val_loss, val_bpb where they are known."""
    runs = []
    for name, path in find_runs(folder).items():
        try:
            changed = path.stat().st_mtime
        except OSError:  # it was removed meanwhile
            continue
        # The newest value of each key, and how long the run is to be.
        run = {"name": name, "seconds": max(0, time.time() - changed)}
        for row in read_cached(path):
            run |= {key: row[key] for key in ("iter", "loss", "val_loss", "val_bpb") if key in row}
        max_iters = read_settings(path.parent).get("max_iters")
        if max_iters:
            run["max_iters"] = max_iters
        runs.append(run)
    return sorted(runs, key=lambda run: run["seconds"])


def describe_run(folder, name):
    """Return {name, curves, settings} of a run, or None where there is none of that name.

    curves: {loss, val_loss, val_bpb}, each {iter, tokens, minutes, value}, four lists of numbers.
    settings: those of its newest checkpoint; {} before the first.
    """
    # The name is a key, not a part of a path.
    path = find_runs(folder).get(name)
    if path is None:
        return None
    # Its curves, and the settings of its newest checkpoint.
    rows = add_minutes(read_cached(path))
    curves = {key: curve(rows, key) for key in ("loss", "val_loss", "val_bpb")}
    return {"name": name, "curves": curves, "settings": read_settings(path.parent)}


def find_runs(folder):
    """Return {name: path of metrics.jsonl} of the runs in a folder."""
    return {path.parent.name: path for path in Path(folder).glob("*/metrics.jsonl")}


def read_cached(path):
    """Return the rows of metrics.jsonl, which are read again only where the file has changed."""
    try:
        facts = path.stat()
    except OSError:
        return []
    return read_version(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=100)
def read_version(path, modified, size):
    """Return the rows of a version of metrics.jsonl that have an iteration, with their numbers."""
    # Anybody may edit the file. JSON has neither NaN nor infinity.
    rows = []
    for row in read_metrics(path):
        numbers = {}
        for key, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                numbers[key] = value
        if "iter" in numbers:
            rows.append(numbers)
    return rows


def add_minutes(rows):
    """Return the rows with `minutes`: what the iterations until then took, without evaluations."""
    minutes, previous, timed = 0, -1, []
    for row in rows:
        if "ms" in row:  # of an iteration, the mean since the row before it
            minutes += (row["iter"] - previous) * row["ms"] / 60_000
            previous = row["iter"]
        timed.append({"tokens": 0, **row, "minutes": minutes})
    return timed


def curve(rows, key):
    """Return the curve of a key as lists of numbers, thinned to MAX_POINTS, with its last point."""
    points = [row for row in rows if key in row]
    # Keep each n-th, n rounded up, and the last.
    n = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = points[::n]
    if points and kept[-1] is not points[-1]:
        kept.append(points[-1])
    # The values, and the three axes that they can be drawn over.
    names = {"iter": "iter", "tokens": "tokens", "minutes": "minutes", "value": key}
    lists = {}
    for name, in_row in names.items():
        lists[name] = [row[in_row] for row in kept]
    return lists


def read_settings(run_dir):
    """Return the settings of a run's newest checkpoint, {} where there is none that can be read."""
    try:
        return read_meta(find_checkpoint(run_dir, "latest"))["config"]
    except (UserError, OSError):
        return {}
