"""Token files: the format, its writer, its reader, and the order in which training reads them.

A dataset is a folder data/<name>/ with {train,val}_000000.bin and so on in llm.c's layout: 256
little-endian int32 (magic 20240520, version 1, number of tokens), then uint16 tokens; vocabularies
above 65,536 have magic 20240801, version 7 and uint32 tokens. meta.json beside them describes them.
Ready-made files of that layout, and nanoGPT's headerless {train,val}.bin, are read as they are.

A loss mask train_000000.mask beside train_000000.bin, and so on for every file of the split: 256
little-endian int32 (magic 20241121, version 1, number of tokens), then one uint8 per token: 1 where
the loss counts that token as a target, 0 where it does not.
"""

import hashlib
import os
import sys
import time
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from configurator import UserError
from formats.files import read_at, read_json

ROOT = Path(__file__).resolve().parent.parent
HEADER = 256  # int32 before the tokens
FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): token type
MASK_FORMAT = (20241121, 1)  # (magic, version) of a loss mask, one byte for each token
HASHED = 64 * 2**20  # bytes of tokens that are checked before a run: less than half a second
POLL, PATIENCE = 3, 1800  # seconds: how often to look for a file that is awaited, and how long


def dataset_folder(dataset):
    """Return the folder of a dataset: data/<dataset> beside this file, or the path it gives."""
    if not dataset or dataset in (".", ".."):
        raise UserError(f"dataset={dataset!r}: give it a name, or a folder's path")
    is_path = "/" in dataset or os.sep in dataset
    return Path(dataset).expanduser() if is_path else ROOT / "data" / dataset


class ShardWriter:
    """Writes one split: files of at most `shard_tokens` tokens, aside (.tmp) until published.

    What `state` returned and its caller has noted is on the disk; `publish` then gives finished
    files their final names. Another process goes on from that state: what was written after it is
    cut off. Where masks are given, each file has one beside it (MASK_FORMAT).
    """

    def __init__(self, folder, split, vocab_size, shard_tokens, state=None):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.format = (20240520, 1) if vocab_size <= 2**16 else (20240801, 7)
        self.files = {}  # suffix: open file
        state = state or {"tokens": 0, "bytes": 0, "documents": 0, "shards": [], "open": 0,
                          "masked": None}  # None until it is known
        self.shards = [dict(shard) for shard in state["shards"]]
        self.totals = {key: state[key] for key in ("tokens", "bytes", "documents")}
        self.publish()
        self.count, self.masked = state["open"], state["masked"]  # tokens in the open file
        if self.count:
            self.reopen()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for file in self.files.values():
            file.close()

    def path(self, suffix, number=None):
        number = len(self.shards) if number is None else number
        return self.folder / f"{self.split}_{number:06d}.{suffix}"

    def reopen(self):
        """Go on with the file that was being written: cut off what came after the last state."""
        self.hash = hashlib.sha256()
        for suffix in ("bin", "mask")[:1 + self.masked]:
            width = np.dtype(FORMATS[self.format]).itemsize if suffix == "bin" else 1
            path, size = self.path(f"{suffix}.tmp"), 4 * HEADER + self.count * width
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path}: is not what its preparation left, so it cannot go on; "
                                 f"remove {self.folder} and prepare it again")
            self.files[suffix] = open(path, "rb+")
            self.files[suffix].truncate(size)
            if suffix == "bin":
                self.files[suffix].seek(4 * HEADER)
                while chunk := self.files[suffix].read(1 << 20):
                    self.hash.update(chunk)
            self.files[suffix].seek(size)

    def add(self, ids, size, eot=None, mask=None):
        """Append ids, which stand for `size` bytes of text; eot: the id of a document's start.

        mask: one number per id, 1 where the loss counts with that id as the target, else 0; always
        or never given. The end-of-text token does not count where there is a mask.
        """
        assert self.masked in (None, mask is not None), "a split has masks for all or none"
        self.totals["documents"] += eot is not None
        self.totals["bytes"] += size
        self.masked = mask is not None
        rows = {"bin": (ids, FORMATS[self.format])}
        if self.masked:
            rows["mask"] = mask, "u1"
        first = {"bin": eot, "mask": 0}
        rows = {suffix: (np.concatenate([[first[suffix]], row]) if eot is not None else row
                         ).astype(kind) for suffix, (row, kind) in rows.items()}
        done, total = 0, len(rows["bin"])
        while done < total:
            part = slice(done, done + self.shard_tokens - self.count)
            self.write({suffix: row[part].tobytes() for suffix, row in rows.items()})
            added = len(rows["bin"][part])
            self.count, done = self.count + added, done + added
            self.totals["tokens"] += added
            if self.count == self.shard_tokens:
                self.close_shard()

    def write(self, rows):
        if not self.files:
            self.hash = hashlib.sha256()
            for suffix in rows:
                self.files[suffix] = open(self.path(f"{suffix}.tmp"), "wb")
                self.files[suffix].write(bytes(4 * HEADER))
        for suffix, row in rows.items():
            self.files[suffix].write(row)
        self.hash.update(rows["bin"])

    def close_shard(self):
        for suffix, kind in (("bin", self.format), ("mask", MASK_FORMAT))[:len(self.files)]:
            header = np.zeros(HEADER, "<i4")
            header[:3] = *kind, self.count
            self.files[suffix].seek(0)
            self.files[suffix].write(header.tobytes())
        self.sync()
        for file in self.files.values():
            file.close()
        self.files = {}
        self.shards.append({"file": self.path("bin").name, "tokens": self.count,
                            "sha256": self.hash.hexdigest()})
        self.count = 0

    def sync(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def state(self):
        """Return what another process needs to go on; all of it is on the disk."""
        self.sync()
        return {**self.totals, "shards": self.shards, "open": self.count, "masked": self.masked}

    def publish(self):
        """Give the finished files their final names. Call it once their state has been noted."""
        for number in range(len(self.shards)):
            for suffix in ("mask", "bin"):
                if (aside := self.path(f"{suffix}.tmp", number)).is_file():
                    os.replace(aside, self.path(suffix, number))

    def finish(self):
        """Close the last file; return the split's entry of meta.json (sha256 is of the tokens)."""
        if self.count:
            self.close_shard()
        return {**self.totals, "shards": self.shards}


class TokenReader:
    """One split of a dataset as one long row of tokens, read piece by piece from its files.

    It keeps none of them: resident memory does not grow with the corpus. Where meta.json has
    "order": "by_file", a file is looked at when it is needed, and waited for if it is not there.
    """

    def __init__(self, dataset, split):
        self.folder, self.split = dataset_folder(dataset), split
        self.meta = read_dataset_meta(dataset)
        info = self.meta["splits"][split] if self.meta else {}
        self.shards = info.get("shards", [])
        if (order := (self.meta or {}).get("order")) not in (None, "by_file"):
            raise UserError(f"{self.folder / 'meta.json'}: order {order!r}, this version knows "
                             "by_file; prepare the dataset again")
        self.by_file = order == "by_file"
        if self.shards:
            self.paths = [self.folder / Path(shard["file"]).name for shard in self.shards]
        else:
            self.paths = (sorted(self.folder.glob(f"*{split}_*.bin"))
                          or [self.folder / f"{split}.bin"])
        self.masked = self.paths[0].with_suffix(".mask").is_file()
        self.dtype, self.offsets = None, {}  # of each file that was looked at: bytes before tokens
        self.counts = [self.shards[index]["tokens"] if self.by_file else self.look_at(index)
                       for index in range(len(self.paths))]
        *self.firsts, self.tokens = accumulate(self.counts, initial=0)  # each file's first token
        known = "bytes" in info and not self.masked
        self.bytes_per_token = info["bytes"] / info["tokens"] if known else None
        # a large corpus has more files than a process may hold open
        self.open = lru_cache(maxsize=64)(lambda path: open(path, "rb", buffering=0))

    def look_at(self, index):
        """Return a file's number of tokens. Raises UserError where its header does not agree with
        meta.json, with the files before it or with its mask."""
        path = self.paths[index]
        dtype, offset, count = read_header(path)
        if self.shards and count != (planned := self.shards[index]["tokens"]):
            raise UserError(f"{path}: has {count:,} tokens and meta.json says {planned:,}: it has "
                             "changed since it was prepared; prepare the dataset again")
        if self.dtype not in (None, dtype):
            raise UserError(f"{path}: tokens of {dtype.itemsize} bytes, the files before it have "
                             f"{self.dtype.itemsize}; prepare the dataset again")
        if self.masked:
            mask = path.with_suffix(".mask")
            *_, marks = read_header(mask, {MASK_FORMAT: "u1"})
            if marks != count:
                raise UserError(f"{mask}: is for {marks:,} tokens, {path.name} has {count:,}; "
                                 "prepare the dataset again")
        self.dtype, self.offsets[index] = dtype, offset
        return count

    def verify(self):
        """Raise ValueError for a file whose tokens are not those that were prepared, as far as
        HASHED bytes of them go: more would keep the run waiting."""
        left = HASHED
        for index, shard in enumerate(self.shards):
            if index not in self.offsets:  # it is still to land
                break
            left -= self.counts[index] * self.dtype.itemsize
            if left < 0:
                break
            raw = self.read(self.firsts[index], self.counts[index])
            if shard.get("sha256") not in (None, hashlib.sha256(raw).hexdigest()):
                raise UserError(f"{self.paths[index]}: its tokens are not those that were "
                                 "prepared, by meta.json's sha256; prepare the dataset again")

    def rows(self, starts, length):
        """Return (len(starts), length) int64: `length` tokens from each start."""
        raw = b"".join([self.read(start, length) for start in starts.tolist()])
        return np.frombuffer(raw, self.dtype).reshape(-1, length).astype(np.int64)

    def masks(self, starts, length):
        """Return (len(starts), length) bool, where the loss counts a token of `rows` as a target;
        None where all count."""
        if not self.masked:
            return None
        raw = b"".join([self.read(start, length, mask=True) for start in starts.tolist()])
        return np.frombuffer(raw, np.uint8).reshape(-1, length) != 0

    def read(self, start, count, mask=False):
        """Return the bytes of tokens [start, start + count), or of their marks in the masks, across
        files where needed."""
        assert 0 <= start <= self.tokens - count, "sequence_starts keeps within the split"
        index, raw = bisect_right(self.firsts, start) - 1, b""
        while count:
            path = self.paths[index]
            if index not in self.offsets:
                wait_for(path)
                self.look_at(index)
            inside = start - self.firsts[index]
            part = min(count, self.counts[index] - inside)
            width, offset = self.dtype.itemsize, self.offsets[index]
            if mask:
                path, width, offset = path.with_suffix(".mask"), 1, 4 * HEADER
            try:
                file = self.open(path)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; it was there at the start, prepare "
                                 "the dataset again") from error
            if len(piece := read_at(file, offset + inside * width, part * width)) < part * width:
                raise UserError(f"{path}: ends before token {inside + part:,}; it was cut short "
                                 "since the start, prepare it again")
            raw, start, count, index = raw + piece, start + part, count - part, index + 1
        return raw


def read_dataset_meta(dataset):
    """Return a dataset's meta.json as a dict, or None for ready-made token files without one.

    Raises UserError, with the command that prepares it, where the dataset is missing.
    """
    folder = dataset_folder(dataset)
    command = f"python prepare.py --dataset={dataset} (your own text: with --input=PATH)"
    if (folder / "UNFINISHED").exists():
        raise UserError(f"{folder}: its preparation did not finish; run {command}")
    if (folder / "meta.json").is_file():
        if "splits" in (meta := read_json(folder / "meta.json")):
            return meta
        raise UserError(f"{folder} is not a dataset's folder; run {command}")
    if not any(folder.glob("*train*.bin")):
        others = sorted(path.parent.name for path in folder.parent.glob("*/meta.json"))
        raise UserError(f"{folder}: no token files here; prepare them with {command}; prepared "
                         f"so far: {', '.join(others) or 'nothing'}")
    if (folder / "meta.pkl").exists():
        raise UserError(f"{folder} has nanoGPT's meta.pkl, and pickles can run code, so it is not "
                         f"read; prepare the text again with {command}")
    return None


def wait_for(path):
    """Wait for a file that prepare.py is downloading; ValueError after half an hour without it."""
    until = time.monotonic() + PATIENCE
    if not path.is_file():
        print(f"waiting for {path}, which prepare.py is downloading", file=sys.stderr, flush=True)
    while not path.is_file():
        if time.monotonic() > until:
            raise UserError(f"{path}: not there after {PATIENCE / 60:g} minutes; run the "
                             "preparation again: python prepare.py "
                             f"--dataset={path.parent.name} --ready_made=True")
        time.sleep(POLL)


def read_header(path, formats=FORMATS):
    """Return (dtype, offset in bytes, tokens) of a token file; ValueError if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * HEADER) if size >= 4 * HEADER else b"", "<i4")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the dataset again") from error
    magic, version, count = header[:3].tolist() or (0, 0, 0)
    dtype, offset = formats.get((magic, version)), 4 * HEADER
    if not dtype and path.name not in ("train.bin", "val.bin"):
        raise UserError(f"{path}: not a token file, or not of a version that is known "
                         f"(magic {magic}, version {version}); prepare the dataset again")
    if not dtype:  # nanoGPT's: tokens alone
        dtype, offset, count = "<u2", 0, size // 2
    dtype = np.dtype(dtype)
    if not count or size != offset + count * dtype.itemsize:
        raise UserError(f"{path}: should have {count:,} tokens and has "
                         f"{(size - offset) / dtype.itemsize:,.12g}; prepare the dataset again")
    return dtype, offset, count
