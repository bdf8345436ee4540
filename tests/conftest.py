"""What all tests share: the repository on the path, number formats, GPT-2's tokenizer, web
documents, several processes."""

import gzip
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores
if hasattr(signal, "SIGHUP"):  # which nohup lets processes ignore; the tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
CACHE = ROOT.parent / "shared/data/tiktoken_cache"
if CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))


def product_files():
    """Return the paths of the product's Python files: the top level, and the folders it imports."""
    found = [*ROOT.glob("*.py")]
    for package in ROOT.glob("*/__init__.py"):
        found += package.parent.rglob("*.py")
    return sorted(found)


# A test of what rounding would blur: one number computed in two orders, or a golden loss.
in_float32 = pytest.mark.parametrize("number_format", ["float32"], indirect=True)


@pytest.fixture(params=["float32", "bfloat16"])
def number_format(request, monkeypatch):
    """Run the test in both number formats, whatever this processor is: dtype=auto chooses float32,
    then bfloat16, which torch emulates where the processor has no unit for it."""
    import torch

    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: request.param == "bfloat16")
    return request.param


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


@pytest.fixture
def ready_made(tmp_path):
    """A folder with ready-made FineWeb shards: two for training, one for validation."""
    from token_files import write_token_file

    write_token_file(tmp_path / "fineweb_train_000001.bin", range(100, 150))
    write_token_file(tmp_path / "fineweb_train_000002.bin", range(200, 230))
    write_token_file(tmp_path / "fineweb_val_000000.bin", range(300, 340))
    return tmp_path


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
