"""Who may import what: commands stand on folders, folders stand on runtime/, no circles."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, product_files

SHARED = {"model", "configurator"}
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
MAY_IMPORT = {  # of our own modules; "command" is every other file at the top
    "model": set(),
    "configurator": {"runtime"},
    "runtime": {"runtime", "configurator"},
    "formats": {"runtime", "formats"} | SHARED,
    "exchange": {"runtime", "formats", "exchange"} | SHARED,
    "documents": {"formats", "documents", "configurator"},
    "text": {"formats", "documents", "text", "configurator"},
    "posttraining": {"runtime", "formats", "exchange", "posttraining"} | SHARED,
    "training": {"runtime", "formats", "exchange", "posttraining", "training"} | SHARED,
    "inference": {"runtime", "formats", "inference"} | SHARED,
    "evaluation": {"runtime", "formats", "inference", "training", "evaluation"} | SHARED,
    "serving": {"runtime", "formats", "documents", "text", "inference", "serving"} | SHARED,
    "ladder": {"runtime", "formats", "training", "ladder"} | SHARED,
    "command": FOLDERS | SHARED,
}
# bench times what they do; evaluate and serve find runs as sampling does; climb trains
COMMANDS_IMPORTED = {("bench", "train"), ("bench", "sample"), ("evaluate", "sample"),
                     ("serve", "sample"), ("climb", "train")}
ONLY_IN_RUNTIME = ("os.environ", "torch.cuda", "torch.distributed")


def read_modules():
    """Return {module name: syntax tree} of the product's files."""
    modules = {}
    for path in product_files():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = ast.parse(path.read_text("utf-8"))
    return modules


MODULES = read_modules()


def row_of(name):
    """Return the key of MAY_IMPORT for a module."""
    first = name.split(".")[0]
    return first if first in MAY_IMPORT or "." in name else "command"


def imports(nodes):
    """Return the names of the modules that these nodes of a syntax tree import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found


def our_imports(name):
    """Return which of our modules a module imports, also where only a function needs them."""
    return imports(ast.walk(MODULES[name])) & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_it_may(name):
    for imported in our_imports(name):
        if (name, imported) not in COMMANDS_IMPORTED:
            assert row_of(imported) in MAY_IMPORT[row_of(name)], f"{name} imports {imported}"


def test_there_are_no_circles():
    TopologicalSorter({name: our_imports(name) for name in MODULES}).prepare()  # else CycleError


def test_documents_and_text_never_reach_torch():
    """Neither directly nor through our modules: a process that tokenizes starts without it."""
    pending = [name for name in MODULES if row_of(name) in ("documents", "text")]
    reached = set(pending)
    while pending:
        name = pending.pop()
        nodes = MODULES[name].body
        if row_of(name) in ("documents", "text"):
            nodes = ast.walk(MODULES[name])
        imported = imports(nodes)
        assert "torch" not in {module.split(".")[0] for module in imported}, f"{name} needs torch"
        pending += (imported & MODULES.keys()) - reached
        reached |= imported
    assert "text.tokenizer" in reached and "formats.files" in reached


@pytest.mark.parametrize("name", [name for name in MODULES if row_of(name) != "runtime"])
def test_only_runtime_names_cuda_the_environment_and_torch_distributed(name):
    found = {module for module in imports(ast.walk(MODULES[name]))
             if module.startswith(ONLY_IN_RUNTIME)}
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Constant) and node.value == "cuda":
            found.add(f"line {node.lineno}: 'cuda'")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ONLY_IN_RUNTIME:
            found.add(f"line {node.lineno}: {ast.unparse(node)}")
    assert not found, f"{name}: {sorted(found)}"


@pytest.mark.parametrize("name", ["train", "evaluate", "sample", "serve", "climb", "bench"])
def test_how_threads_wait_is_set_before_torch_is_imported(name):
    code = f"""
import os, sys
os.cpu_count = lambda: int(sys.argv[1])
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder())
import {name}
"""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for cores, users, expected in (("8", {}, "1000\n"), ("9", {}, "None\n"),
                                   ("2", {"GOMP_SPINCOUNT": "7"}, "7\n")):
        done = subprocess.run([sys.executable, "-c", code, cores], cwd=ROOT, capture_output=True,
                              text=True, env={**environment, **users})
        assert done.stdout == expected, done.stderr


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(MODULES)}"], cwd=tmp_path,
                          text=True, capture_output=True, timeout=100,
                          env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
