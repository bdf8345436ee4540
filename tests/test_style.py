"""How the product's code reads, as far as it can be counted: sizes, branches, comments."""

import ast
import io
import tokenize
from collections import Counter
from typing import NamedTuple

import pytest
from conftest import ROOT, product_files

LESSON = ("model.py", "train.py", "sample.py", "configurator.py")
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.Assert)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Source(NamedTuple):
    lines: int
    code_lines: int  # without docstrings, comments and blank lines
    comment_lines: int  # that hold nothing else
    tree: ast.Module


def read_source(path):
    text = path.read_text("utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    comment_lines = sum(token.line.lstrip().startswith("#") for token in comments)
    in_docstrings = docstring_lines(tree)
    blank_lines = sum(not line.strip() for number, line in enumerate(lines, start=1)
                      if number not in in_docstrings)
    code_lines = len(lines) - len(in_docstrings) - comment_lines - blank_lines
    return Source(len(lines), code_lines, comment_lines, tree)


def docstring_lines(tree):
    """Return the numbers of the lines that docstrings take."""
    numbers = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            numbers |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


SOURCES = {path.relative_to(ROOT).as_posix(): read_source(path) for path in product_files()}


def total(field):
    """Return the sum over all files."""
    return sum(getattr(source, field) for source in SOURCES.values())


def over(counts, limit):
    """Return what is above a limit, as readable text."""
    return [f"{name}: {count}, limit {limit}" for name, count in counts.items() if count > limit]


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("file", SOURCES)
def test_a_function_fits_on_a_screen(file):
    for node in ast.walk(SOURCES[file].tree):
        if isinstance(node, FUNCTIONS):
            limit = 120 if node.name == "main" else 60
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{file}: {node.name} has {lines} lines, limit {limit}"


def test_files_and_folders_are_small():
    files = {file: source.lines for file, source in SOURCES.items()}
    folders = Counter()
    for file, lines in files.items():
        folder, slash, _ = file.partition("/")
        folders[folder + slash] += lines
    assert over(files, 400) + over(folders, 1600) == []


def test_the_top_level_is_seen_at_a_glance():
    at_the_top = [file for file in SOURCES if "/" not in file]
    assert len(at_the_top) <= 14, at_the_top


def test_the_lesson_is_read_in_an_afternoon():
    lines = {file: SOURCES[file].lines for file in LESSON}
    assert sum(lines.values()) <= 1150, lines


# ---------------------------------------------------------------------- density


def test_conditional_expressions_are_rare():
    found = Counter()
    for file, source in SOURCES.items():
        found[file] = sum(isinstance(node, ast.IfExp) for node in ast.walk(source.tree))
    rate = 1000 * found.total() / total("code_lines")
    assert rate <= 20, f"{rate:.1f} per 1,000 lines of code; most in {found.most_common(5)}"


def test_comments_name_the_steps():
    share = 100 * total("comment_lines") / total("lines")
    missing = Counter({file: round(source.lines * 0.06) - source.comment_lines
                       for file, source in SOURCES.items()})
    assert share >= 6, f"{share:.1f}% of lines; most are missing in {missing.most_common(5)}"


def test_the_training_loop_reads_like_prose():
    """Branches of main and of the function `train` that it calls, without their signatures."""
    branches, lines = 1, 0
    for node in SOURCES["train.py"].tree.body:
        if isinstance(node, FUNCTIONS) and node.name in ("main", "train"):
            lines += node.end_lineno - node.body[0].lineno + 1
            for inner in ast.walk(node):
                branches += isinstance(inner, BRANCHES)
                if isinstance(inner, ast.BoolOp):
                    branches += len(inner.values) - 1
    rate = 100 * branches / lines
    assert rate <= 25, f"{rate:.0f} branches per 100 lines ({branches} in {lines})"


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_is_nested_that_must_be_unfolded(file):
    found = []
    for node in ast.walk(SOURCES[file].tree):
        if isinstance(node, COMPREHENSIONS) and holds(node, COMPREHENSIONS):
            found.append(f"line {node.lineno}: a comprehension in a comprehension")
        if isinstance(node, COMPREHENSIONS) and holds(node, ast.Lambda):
            found.append(f"line {node.lineno}: a lambda in a comprehension")
        if isinstance(node, (ast.For, ast.While)) and any(
                holds(statement, ast.Lambda) for statement in node.body):
            found.append(f"line {node.lineno}: a lambda in a loop")
        if isinstance(node, ast.IfExp) and holds(node, ast.IfExp):
            found.append(f"line {node.lineno}: a conditional expression in another")
        if isinstance(node, ast.BoolOp) and holds(node, ast.NamedExpr):
            found.append(f"line {node.lineno}: an assignment (:=) in a condition of several parts")
    assert found == [], f"{file}: {found}"


def holds(node, types):
    """Is there a node of these types below this one?"""
    return any(isinstance(inner, types) for inner in ast.walk(node) if inner is not node)
