"""What all tests share: the repository on the path, and GPT-2's tokenizer where it is at hand."""

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
