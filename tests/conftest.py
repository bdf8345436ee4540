"""What all tests share: the repository on the path, GPT-2's tokenizer, web documents, processes."""

import gzip
import json
import os
import socket
import sys
import tempfile
import traceback
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
    from text.tokenizer import Tokenizer, gpt2_spec

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


def in_processes(count, function, **env):
    """Call function(rank) in that many processes as torchrun starts them, each a fork of this one:
    nothing is imported anew. Return (exit codes, what each printed)."""
    import torch._dynamo  # noqa: F401  (the first update would, in each)
    import torch.distributed.fsdp  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        output = tempfile.TemporaryFile("w+")
        if not (child := os.fork()):
            code = 70
            try:
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
                function(rank)
                code = 0
            except SystemExit as stopped:
                code = stopped.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append((child, output))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    said = []
    for _, output in children:
        with output:
            output.seek(0)
            said.append(output.read())
    return codes, said
