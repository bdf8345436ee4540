"""What all tests share: the repository on the path, GPT-2's tokenizer and web documents."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores
CACHE = ROOT.parent / "shared/data/tiktoken_cache"
if CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer; without its files the test is skipped."""
    from tokenizer import Tokenizer, gpt2_spec

    try:
        return Tokenizer(gpt2_spec())
    except ValueError as error:
        pytest.skip(f"no GPT-2 tokenizer: {error}")


@pytest.fixture(scope="session")
def web():
    """300 documents of the web, as C4 has them."""
    path = ROOT.parent / "shared/data/web/c4_300.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no web documents: {path} is missing")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
