"""Token files: the format, its writer, its reader, and the order in which training reads them.

A dataset is a folder data/<name>/ with {train,val}_000000.bin and so on in llm.c's layout: 256
little-endian int32 (magic 20240520, version 1, number of tokens), then uint16 tokens; vocabularies
above 65,536 have magic 20240801, version 7 and uint32 tokens. meta.json beside them describes them.
Ready-made files of that layout, and nanoGPT's headerless {train,val}.bin, are read as they are.
"""

import hashlib
import json
import os
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
HEADER = 256  # int32 before the tokens
FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): token type
CHUNK = 1024  # sequences whose starts are worked out, and remembered, at a time


def dataset_folder(dataset):
    """Return the folder of a dataset: data/<dataset> beside this file, or the path it gives."""
    if not dataset or dataset in (".", ".."):
        raise ValueError(f"dataset={dataset!r}: give it a name, or a folder's path")
    is_path = "/" in dataset or os.sep in dataset
    return Path(dataset).expanduser() if is_path else ROOT / "data" / dataset


class ShardWriter:
    """Writes one split: files of at most `shard_tokens` tokens, each aside and then renamed."""

    def __init__(self, folder, split, vocab_size, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.format = (20240520, 1) if vocab_size <= 2**16 else (20240801, 7)
        self.file, self.shards = None, []
        self.totals = {"tokens": 0, "bytes": 0, "documents": 0}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.file:  # stopped by an error: leave nothing half-written
            self.file.close()
            self.path("tmp").unlink(missing_ok=True)

    def path(self, suffix):
        return self.folder / f"{self.split}_{len(self.shards):06d}.{suffix}"

    def add(self, ids, size, eot=None):
        """Append ids, which stand for `size` bytes of text; eot: the id of a document's start."""
        self.totals["documents"] += eot is not None
        self.totals["bytes"] += size
        ids = np.concatenate([[eot], ids]) if eot is not None else ids
        ids = ids.astype(FORMATS[self.format])
        while len(ids):
            if self.file is None:
                self.file, self.count, self.hash = open(self.path("tmp"), "wb"), 0, hashlib.sha256()
                self.file.write(bytes(4 * HEADER))
            part = ids[:self.shard_tokens - self.count]
            self.file.write(part.tobytes())
            self.hash.update(part.tobytes())
            self.count += len(part)
            ids = ids[len(part):]
            if self.count == self.shard_tokens:
                self.close_shard()

    def close_shard(self):
        header = np.zeros(HEADER, "<i4")
        header[:3] = *self.format, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        os.replace(self.path("tmp"), self.path("bin"))
        self.shards.append({"file": self.path("bin").name, "tokens": self.count,
                            "sha256": self.hash.hexdigest()})
        self.totals["tokens"] += self.count

    def finish(self):
        """Close the last file; return the split's entry of meta.json (sha256 is of the tokens)."""
        if self.file:
            self.close_shard()
        return {**self.totals, "shards": self.shards}


def load_json(path):
    """Return the dict that a JSON file holds. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged, it is not a JSON object ({error})") from error


def write_aside(path, text):
    """Write a small text file so that it is whole or not there: aside, flushed, renamed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class TokenReader:
    """One split of a dataset as one long row of tokens, read piece by piece from its files.

    It keeps none of them: resident memory does not grow with the corpus.
    """

    def __init__(self, dataset, split):
        self.folder = dataset_folder(dataset)
        self.meta = load_meta(dataset)
        info = self.meta["splits"][split] if self.meta else {}
        self.shards = info.get("shards", [])
        self.bytes_per_token = info["bytes"] / info["tokens"] if info else None
        if self.shards:
            paths = [self.folder / Path(shard["file"]).name for shard in self.shards]
        else:
            paths = sorted(self.folder.glob(f"*{split}_*.bin")) or [self.folder / f"{split}.bin"]
        self.files, self.firsts, self.tokens = [], [], 0  # firsts: each file's first token
        for path in paths:
            self.dtype, offset, count = read_header(path)
            self.files.append((path, offset, count))
            self.firsts.append(self.tokens)
            self.tokens += count
        # a large corpus has more files than a process may hold open
        self.open = lru_cache(maxsize=64)(lambda path: open(path, "rb", buffering=0))

    def rows(self, starts, length):
        """Return (len(starts), length) int64: `length` tokens from each start."""
        raw = b"".join([self.read(start, length) for start in starts.tolist()])
        return np.frombuffer(raw, self.dtype).reshape(-1, length).astype(np.int64)

    def read(self, start, count):
        """Return the bytes of tokens [start, start + count), across files where needed."""
        assert 0 <= start <= self.tokens - count, "sequence_starts keeps within the split"
        index, width, raw = bisect_right(self.firsts, start) - 1, self.dtype.itemsize, b""
        while count:
            path, offset, size = self.files[index]
            inside = start - self.firsts[index]
            part = min(count, size - inside)
            file = self.open(path)
            file.seek(offset + inside * width)
            if len(piece := file.read(part * width)) < part * width:
                raise ValueError(f"{path}: ends before token {inside + part:,}; it was cut short "
                                 "since the start, prepare it again")
            raw, start, count, index = raw + piece, start + part, count - part, index + 1
        return raw


def load_meta(dataset):
    """Return a dataset's meta.json as a dict, or None for ready-made token files without one.

    Raises ValueError, with the command that prepares it, where the dataset is missing.
    """
    folder = dataset_folder(dataset)
    command = f"python prepare.py --dataset={dataset} (your own text: with --input=PATH)"
    if (folder / "UNFINISHED").exists():
        raise ValueError(f"{folder}: its preparation did not finish; run {command}")
    if (folder / "meta.json").is_file():
        if "splits" in (meta := load_json(folder / "meta.json")):
            return meta
        raise ValueError(f"{folder} is not a dataset's folder; run {command}")
    if not any(folder.glob("*train*.bin")):
        others = sorted(path.parent.name for path in folder.parent.glob("*/meta.json"))
        raise ValueError(f"{folder}: no token files here; prepare them with {command}; prepared "
                         f"so far: {', '.join(others) or 'nothing'}")
    if (folder / "meta.pkl").exists():
        raise ValueError(f"{folder} has nanoGPT's meta.pkl, and pickles can run code, so it is not "
                         f"read; prepare the text again with {command}")
    return None


def read_header(path):
    """Return (dtype, offset in bytes, tokens) of a token file; ValueError if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * HEADER) if size >= 4 * HEADER else b"", "<i4")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; prepare the dataset again") from error
    magic, version, count = header[:3].tolist() or (0, 0, 0)
    dtype, offset = FORMATS.get((magic, version)), 4 * HEADER
    if not dtype and path.name not in ("train.bin", "val.bin"):
        raise ValueError(f"{path}: not a token file, or not of a version that is known "
                         f"(magic {magic}, version {version}); prepare the dataset again")
    if not dtype:  # nanoGPT's: tokens alone
        dtype, offset, count = "<u2", 0, size // 2
    dtype = np.dtype(dtype)
    if not count or size != offset + count * dtype.itemsize:
        raise ValueError(f"{path}: should have {count:,} tokens and has "
                         f"{(size - offset) / dtype.itemsize:,.12g}; prepare the dataset again")
    return dtype, offset, count


def sequence_starts(sequences, tokens, block_size, seed):
    """Return where each sequence of a run begins in the training split; a pure function.

    sequences: (n,) numbers of sequences, counted from the start of the run. In each epoch the
    split is cut into blocks of block_size (from another first token each time, so that the cuts
    move), and each block comes once, in an order that depends on the seed and the epoch alone.
    """
    if tokens <= block_size:
        raise ValueError(f"block_size={block_size} needs {block_size + 1:,} tokens, the training "
                         f"split has {tokens:,}; use a smaller --block_size or more text")
    blocks = max(1, tokens // block_size - 1)
    starts = []
    for number in sequences.tolist():
        epoch, block = divmod(number, blocks)
        chunk = starts_of_chunk(epoch, block // CHUNK, blocks, tokens, block_size, seed)
        starts.append(chunk[block % CHUNK])
    return np.array(starts, np.int64)


@lru_cache(maxsize=8)
def starts_of_chunk(epoch, chunk, blocks, tokens, block_size, seed):
    """Return the starts of an epoch's sequences [chunk * CHUNK, (chunk + 1) * CHUNK), a list."""
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=32).digest()
    slack = tokens - blocks * block_size  # how many first tokens are possible
    phase = int.from_bytes(key[:8], "little") % min(block_size, slack)
    order = permute(np.arange(chunk * CHUNK, min(chunk * CHUNK + CHUNK, blocks)), blocks, key)
    return (phase + order * block_size).tolist()


def permute(i, n, key):
    """Return a permutation of 0..n-1 at the indices i, without a table of it.

    A four-round Feistel network over the next even number of bits, walked along its cycle until it
    falls below n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). key: 32 bytes.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask, out = np.uint64(bits), np.uint64(2**bits - 1), np.array(i, np.uint64)
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in np.frombuffer(key, "<u8"):
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        out[todo] = left << half | right
        todo = out >= n
    return out.astype(np.int64)
