"""Token files: the format, its writer, its reader, and the order in which training reads them.

A dataset is a folder data/<name>/ with {train,val}_000000.bin and so on in llm.c's layout: 256
little-endian int32 (magic 20240520, version 1, number of tokens), then uint16 tokens; vocabularies
above 65,536 have magic 20240801, version 7 and uint32 tokens. meta.json beside them describes them.
Ready-made files of that layout, and nanoGPT's headerless {train,val}.bin, are read as they are.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
HEADER = 256  # int32 before the tokens
FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, token type)


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
        self.magic = 20240520 if vocab_size <= 2**16 else 20240801
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
        version, dtype = FORMATS[self.magic]
        self.totals["documents"] += eot is not None
        self.totals["bytes"] += size
        ids = np.concatenate([[eot], ids]) if eot is not None else ids
        ids = ids.astype(dtype)
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
        header[:3] = self.magic, FORMATS[self.magic][0], self.count
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
    """Return what a JSON file holds. Raises ValueError where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged, it is not JSON ({error})") from error


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

    Reads our files, llm.c's ready-made ones, and nanoGPT's headerless {train,val}.bin. Keeps no
    tokens: resident memory does not grow with the corpus.
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
        self.files = [(path, *read_header(path)) for path in paths]
        self.ends = np.cumsum([count for *_, count in self.files])
        self.tokens = int(self.ends[-1])

    def read(self, start, count):
        """Return tokens [start, start + count) as int64, across files where needed."""
        out, filled = np.empty(count, np.int64), 0
        index = int(np.searchsorted(self.ends, start, side="right"))
        while filled < count:
            path, dtype, offset, size = self.files[index]
            inside = start + filled - (int(self.ends[index]) - size)
            part = min(count - filled, size - inside)
            file = open_unbuffered(path)
            file.seek(offset + inside * dtype.itemsize)
            raw = file.read(part * dtype.itemsize)
            if len(raw) < part * dtype.itemsize:
                raise ValueError(f"{path}: ends before token {inside + part:,}; it was cut short "
                                 "since the start, prepare it again")
            out[filled:filled + part] = np.frombuffer(raw, dtype)
            filled, index = filled + part, index + 1
        return out

    def rows(self, starts, length):
        """Return (len(starts), length) int64: `length` tokens from each start."""
        return np.stack([self.read(int(start), length) for start in starts])


@lru_cache(maxsize=64)
def open_unbuffered(path):
    return open(path, "rb", buffering=0)


def load_meta(dataset):
    """Return a dataset's meta.json as a dict, or None for ready-made token files without one.

    Raises ValueError, with the command that prepares it, where the dataset is missing.
    """
    folder = dataset_folder(dataset)
    command = f"python prepare.py --dataset={dataset} (your own text: with --input=PATH)"
    if (folder / "UNFINISHED").exists():
        raise ValueError(f"{folder}: its preparation did not finish; run {command}")
    if (folder / "meta.json").is_file():
        return load_json(folder / "meta.json")
    if not any(folder.glob("*train*.bin")):
        raise ValueError(f"{folder}: no token files here; prepare them with {command}")
    if (folder / "meta.pkl").exists():
        raise ValueError(f"{folder} has nanoGPT's meta.pkl, and pickles can run code, so it is not "
                         f"read; prepare the text again with {command}")
    return None


def read_header(path):
    """Return (dtype, offset in bytes, tokens) of a token file; ValueError if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * HEADER), "<i4", count=-1 if size >= 1024 else 0)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; prepare the dataset again") from error
    if len(header) == HEADER and int(header[0]) in FORMATS:
        version, dtype = FORMATS[int(header[0])]
        dtype, offset, count = np.dtype(dtype), 4 * HEADER, int(header[2])
        if header[1] != version or size != offset + count * dtype.itemsize:
            raise ValueError(f"{path}: its header promises {count:,} tokens, the file has "
                             f"{(size - offset) // dtype.itemsize:,}; prepare the dataset again")
    elif path.name in ("train.bin", "val.bin"):  # nanoGPT's: tokens alone
        dtype, offset, count = np.dtype("<u2"), 0, size // 2
    else:
        raise ValueError(f"{path}: not a token file (no header); prepare the dataset again")
    if not count:
        raise ValueError(f"{path}: has no tokens; prepare the dataset again")
    return dtype, offset, count


def sequence_starts(sequences, tokens, block_size, seed):
    """Return where each sequence of a run begins in the training split; a pure function.

    sequences: (n,) numbers of sequences, counted from the start of the run. In each epoch the
    split is cut into blocks of block_size (from another first token each time, so that the cuts
    move), and each block comes once, in an order that depends on the seed and the epoch alone. No
    state to save, no memory that grows with the corpus.
    """
    if tokens <= block_size:
        raise ValueError(f"block_size={block_size} needs {block_size + 1:,} tokens, the training "
                         f"split has {tokens:,}; use a smaller --block_size or more text")
    sequences = np.asarray(sequences, np.int64)
    blocks = max(1, tokens // block_size - 1)
    slack = tokens - blocks * block_size  # how many first tokens are possible
    starts = np.empty_like(sequences)
    for epoch in np.unique(sequences // blocks):
        here = sequences // blocks == epoch
        key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=32).digest()
        phase = int.from_bytes(key[:8], "little") % min(block_size, slack)
        block = permute(sequences[here] % blocks, blocks, key)
        starts[here] = phase + block * block_size
    return starts


def permute(i, n, key):
    """Return a permutation of 0..n-1 at the indices i, without a table of it.

    A four-round Feistel network over the next even number of bits, walked along its cycle until it
    falls below n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). key: 32 bytes.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    half = np.uint64(half)
    round_keys = np.frombuffer(key, "<u8")
    out = np.asarray(i, np.uint64).copy()
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        out[todo] = left << half | right
        todo = out >= n
    return out.astype(np.int64)
