"""README.md: each command it shows is accepted, and those that can run here run, shortened."""

import importlib
import io
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import in_processes

import configurator
import train

ROOT = Path(train.__file__).parent
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
SHORTER = {  # flags that make each script quick
    "prepare.py": [],
    "filter.py": [],
    "train.py": ["--eval_iters=1", "--batch_size=2", "--log_interval=1", "--device=cpu"],
    "sample.py": ["--max_new_tokens=3", "--num_samples=1", "--device=cpu"],
    "bench.py": ["--iterations=1", "--warmup=1", "--repeats=1", "--device=cpu"],
}
ELSEWHERE = {  # what cannot run here, and why: its settings alone are checked
    "torchrun": "needs eight GPUs, and FineWeb",
    "finetune_shakespeare.py": "needs OpenAI's weights",
    "--ready_made": "needs the hub", "fineweb": "needs the hub", "openwebtext": "needs the hub",
    "s3://": "needs a bucket",
}


def commands():
    """Return the (script, arguments, whole line) of README's commands that run our scripts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.S)).splitlines()
    found = []
    for line in lines:
        line = re.sub(r"\s+# .*", "", line)
        match = re.search(r"(\w+\.py)( .*)?$", line)
        if match:
            script = re.search(r"\b(prepare|filter|train|sample|bench|convert)\.py", line)[0]
            found.append((script, shlex.split(line.split(script, 1)[1]), line))
        elif "pip install" in line or line.startswith("python"):
            assert "requirements" in line, line
    assert len(found) >= 12
    return found


@pytest.mark.parametrize("script, arguments, line", commands(), ids=lambda v: v if
                         isinstance(v, str) and v.endswith(".py") else "")
def test_a_command_s_settings_are_known(script, arguments, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removesuffix(".py"))
    configurator.configure(module.main, arguments, train.main if script == "bench.py" else None)


@pytest.mark.skipif(not SHAKESPEARE.is_file(),
                    reason="needs ../shared/data/tinyshakespeare, so as not to download it")
def test_the_commands_run_in_order(tmp_path):
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "my_texts").mkdir()
    words = ("once upon a time the old king and his people that lived with hope over there went "
             "to have bread from this house while some rain came down on hills and rivers").split()
    rng = random.Random(1)
    for number in range(40):  # prose enough for the filters
        text = "".join(" ".join(rng.choices(words, k=12)).capitalize() + ".\n" for _ in range(30))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    ran = 0
    for script, arguments, line in commands():
        if any(name in line for name in ELSEWHERE):
            continue
        extra = list(SHORTER[script])
        if script == "train.py":
            extra.append("--max_iters=3" if "resume" in line else "--max_iters=2")
            arguments = arguments or ["config/train_stdlib.py"]  # as the line without any means
        if "--dataset=shakespeare_char" in arguments:
            extra.append(f"--input={SHAKESPEARE}")
        code, said = run_script(script, [*arguments, *extra], tmp_path)
        assert code == 0, f"{line}\n{said[-2000:]}"
        ran += 1
    assert ran >= 9
    assert (tmp_path / "out/stdlib/loss.png").is_file()
    assert (tmp_path / "out/finetuned/latest").read_text() == "iter_000002\n"


def run_script(script, arguments, folder):
    """Return the exit code and what it printed, of a script that reads ROMEO: as its input."""
    if script in ("prepare.py", "filter.py"):  # which start processes of their own
        done = subprocess.run([sys.executable, script, *arguments], cwd=folder, text=True,
                              capture_output=True, timeout=120)
        return done.returncode, done.stderr

    def as_command(rank):
        os.chdir(folder)
        ours = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py"))}
        ours |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
        for name in list(sys.modules):
            if name.split(".")[0] in ours:
                del sys.modules[name]  # to be taken from that folder
        sys.path.insert(0, str(folder))
        sys.argv, sys.stdin = [script, *arguments], io.TextIOWrapper(io.BytesIO(b"ROMEO:"))
        runpy.run_path(script, run_name="__main__")

    codes, said = in_processes(1, as_command)
    return codes[0], said[0]


def test_every_config_is_known_to_the_readme_and_to_train():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "config").glob("*.py")):
        settings = configurator.configure(train.main, [str(path)])
        assert settings["dataset"] and path.read_text().startswith("# ")
        family = re.sub(r"_(medium|large|xl)$", "", path.stem)
        assert family in readme, path.name
        if not settings["decay_lr"] or settings["eval_only"]:
            continue
        assert settings["lr_decay_iters"] == settings["max_iters"], path.name
