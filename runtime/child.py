"""Run a Python command in a process of its own, and say when it printed what."""

import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

from configurator import UserError


class Line(NamedTuple):
    seconds: float  # from the start of the process until it printed the line
    text: str


def run_python(*command, cwd, **environment):
    """Return the lines that `python command...` prints, on both outputs, each a Line.

    cwd: the folder it runs in. environment: variables added to ours. Raises UserError with its last
    line where it fails.
    """
    # Both outputs come through one pipe, unbuffered, so that each line's time is right.
    start = time.perf_counter()
    lines = []
    with subprocess.Popen(
            [sys.executable, *command], cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}) as process:
        for line in process.stdout:
            lines.append(Line(time.perf_counter() - start, line.strip()))
    # Python prints an exception's own line last.
    if process.returncode:
        last = ""
        if lines:
            last = lines[-1].text
        raise UserError(f"{command[0]} in {cwd} ended with exit code {process.returncode}: {last}")
    return lines


def figures_of_python(*command, cwd, **environment):
    """Run a Python command; return what it printed as JSON, a dict, in its last line of that."""
    # Libraries print lines of their own before it.
    lines = run_python(*command, cwd=cwd, **environment)
    return json.loads([line.text for line in lines if line.text.startswith("{")][-1])
