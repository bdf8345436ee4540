"""README.md and docs/: each command they show is accepted, and those that can run here do run,
shortened; each link leads somewhere; each config is explained."""

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data/README.md",
         ROOT / "ladder/README.md"]
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
SHORTER = {  # flags that make each script quick
    "prepare.py": [],
    "filter.py": [],
    "train.py": ["--eval_tokens=1", "--batch_size=2", "--log_interval=1", "--device=cpu"],
    "sample.py": ["--max_new_tokens=3", "--num_samples=1", "--device=cpu"],
    "convert.py": [],
    "evaluate.py": ["--eval_tokens=1", "--device=cpu"],
    "bench.py": ["--iterations=1", "--warmup=1", "--repeats=1", "--device=cpu"],
}
ELSEWHERE = {  # what cannot run here, and why: its settings alone are checked
    "torchrun": "needs eight GPUs, and FineWeb", "train_gpt2.py": "needs FineWeb",
    "finetune_shakespeare.py": "needs OpenAI's weights",
    "--ready_made": "needs the hub", "fineweb": "needs the hub", "openwebtext": "needs the hub",
    "s3://": "needs a bucket", "--init_from=gpt2": "needs OpenAI's weights",
    "serve.py": "does not end", "climb.py": "takes ten minutes",
}
OURS = r"\b(?:prepare|filter|train|sample|evaluate|bench|convert|serve|climb)\.py"


def commands():
    """Return the (script, arguments, whole line) of each command in a block, in reading order."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
        for line in "\n".join(blocks).splitlines():
            line = re.sub(r"\s+# .*", "", line)
            if re.search(r"(\w+\.py)( .*)?$", line):
                found.append(parts_of(line))
            elif "pip install" in line or line.startswith("python"):
                assert "requirements" in line, line
    assert len(found) >= 25
    return found


def commands_in_sentences():
    """Return the same of each command that stands within a sentence or a table."""
    texts = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
             for page in PAGES]
    lines = re.findall(rf"`(python {OURS}[^`]*)`", "\n".join(texts))
    assert len(lines) >= 8
    return [parts_of(line) for line in lines if "NAME" not in line]


def commands_in_configs():
    """Return the same of each command in the comment at the head of a config file."""
    found = []
    for path in sorted((ROOT / "config").glob("*.py")):
        head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]
        head = re.sub(r" \\\n# +", " ", head)  # a line that goes on in the next one
        lines = re.findall(rf"^#   (python {OURS}.*?|torchrun .*?)(?:   .*)?$", head, flags=re.M)
        assert lines, path
        found += [parts_of(line) for line in lines]
    return found


def parts_of(line):
    script = re.search(OURS, line)[0]
    return script, shlex.split(line.split(script, 1)[1]), line


def is_script(value):
    return value if isinstance(value, str) and value.endswith(".py") else ""


@pytest.mark.parametrize(
    "script, arguments, line", commands() + commands_in_sentences() + commands_in_configs(),
    ids=is_script)
def test_a_command_s_settings_are_known(script, arguments, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removesuffix(".py"))
    if arguments == ["--help"]:
        return
    configurator.configure(module.main, arguments, train.main if script == "bench.py" else None)


@pytest.mark.skipif(not SHAKESPEARE.is_file(),
                    reason="needs ../shared/data/tinyshakespeare, so as not to download it")
def test_the_commands_run_in_order(tmp_path):
    files = subprocess.run(["git", "ls-files", "*.py", "evaluation/*.json"], cwd=ROOT,
                           capture_output=True, text=True)
    for name in files.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "my_texts").mkdir()
    words = ("once upon a time the old king and his people that lived with hope over there went "
             "to have bread from this house while some rain came down on hills and rivers").split()
    rng = random.Random(1)
    for number in range(40):  # prose enough for the filters
        text = "".join(" ".join(rng.choices(words, k=12)).capitalize() + ".\n" for _ in range(30))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    (tmp_path / "prompt.txt").write_text("def main(")
    (tmp_path / "prompts.jsonl").write_text('"def main("\n{"prompt": "class "}\n')
    ran = set()
    for script, arguments, line in commands():
        if line in ran or any(name in line for name in ELSEWHERE):
            continue
        extra = list(SHORTER[script])
        if script == "train.py":
            extra.append("--max_iters=3" if "resume" in line else "--max_iters=2")
            arguments = arguments or ["config/train_stdlib.py"]  # as the line without any means
        if "--init_from=out/stdlib_modern" in arguments:  # make train's model, not trained here
            arguments[arguments.index("--init_from=out/stdlib_modern")] = "--init_from=out/stdlib"
        if "--dataset=shakespeare_char" in arguments:
            extra.append(f"--input={SHAKESPEARE}")
        code, printed = run_script(script, [*arguments, *extra], tmp_path)
        assert code == 0, f"{line}\n{printed[-2000:]}"
        ran.add(line)
    assert len(ran) >= 18
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

    codes, printed = in_processes(1, as_command)
    return codes[0], printed[0]


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*/README.md"))],
                         ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_every_config_is_explained_and_known_to_train():
    runs = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "config").glob("*.py")):
        settings = configurator.configure(train.main, [str(path)])
        assert settings["dataset"] and path.read_text(encoding="utf-8").startswith("# ")
        assert f"`{path.name}`" in runs, path.name
        if not settings["decay_lr"] or settings["eval_only"]:
            continue
        assert settings["lr_decay_iters"] == settings["max_iters"], path.name
