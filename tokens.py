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
import json
import os
import re
import sys
import time
from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import lcm
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
HEADER = 256  # int32 before the tokens
FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): token type
MASK_FORMAT = (20241121, 1)  # (magic, version) of a loss mask, one byte for each token
HASHED = 64 * 2**20  # bytes of tokens that are checked before a run: less than half a second
CHUNK = 1024  # sequences whose starts are worked out, and remembered, at a time
POLL, PATIENCE = 3, 1800  # seconds: how often to look for a file that is awaited, and how long


def dataset_folder(dataset):
    """Return the folder of a dataset: data/<dataset> beside this file, or the path it gives."""
    if not dataset or dataset in (".", ".."):
        raise ValueError(f"dataset={dataset!r}: give it a name, or a folder's path")
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
                raise ValueError(f"{path}: is not what its preparation left, so it cannot go on; "
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


def read_at(file, offset, size):
    """Return `size` bytes from `offset`. The file's own position, which forked processes share and
    move under each other, is left alone; Windows, which cannot do that, cannot fork either."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


class TokenReader:
    """One split of a dataset as one long row of tokens, read piece by piece from its files.

    It keeps none of them: resident memory does not grow with the corpus. Where meta.json has
    "order": "by_file", a file is looked at when it is needed, and waited for if it is not there.
    """

    def __init__(self, dataset, split):
        self.folder, self.split = dataset_folder(dataset), split
        self.meta = load_meta(dataset)
        info = self.meta["splits"][split] if self.meta else {}
        self.shards = info.get("shards", [])
        if (order := (self.meta or {}).get("order")) not in (None, "by_file"):
            raise ValueError(f"{self.folder / 'meta.json'}: order {order!r}, this version knows "
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
        """Return a file's number of tokens. Raises ValueError where its header does not agree with
        meta.json, with the files before it or with its mask."""
        path = self.paths[index]
        dtype, offset, count = read_header(path)
        if self.shards and count != (planned := self.shards[index]["tokens"]):
            raise ValueError(f"{path}: has {count:,} tokens and meta.json says {planned:,}: it has "
                             "changed since it was prepared; prepare the dataset again")
        if self.dtype not in (None, dtype):
            raise ValueError(f"{path}: tokens of {dtype.itemsize} bytes, the files before it have "
                             f"{self.dtype.itemsize}; prepare the dataset again")
        if self.masked:
            mask = path.with_suffix(".mask")
            *_, marks = read_header(mask, {MASK_FORMAT: "u1"})
            if marks != count:
                raise ValueError(f"{mask}: is for {marks:,} tokens, {path.name} has {count:,}; "
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
                raise ValueError(f"{self.paths[index]}: its tokens are not those that were "
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
                raise ValueError(f"{path}: {error.strerror}; it was there at the start, prepare "
                                 "the dataset again") from error
            if len(piece := read_at(file, offset + inside * width, part * width)) < part * width:
                raise ValueError(f"{path}: ends before token {inside + part:,}; it was cut short "
                                 "since the start, prepare it again")
            raw, start, count, index = raw + piece, start + part, count - part, index + 1
        return raw

    def starts(self, sequences, block_size, seed):
        """Return where each sequence of a run begins: `sequence_starts` of the split.

        By file: in each epoch the files come in their order, each with its blocks shuffled.
        """
        if not self.by_file:
            return sequence_starts(sequences, self.tokens, block_size, seed)
        blocks = np.array([blocks_in(count, block_size) for count in self.counts])
        ends = np.cumsum(blocks)
        epochs, numbers = np.divmod(sequences, ends[-1])
        files = np.searchsorted(ends, numbers, side="right")
        starts = np.empty(len(sequences), np.int64)
        for index in np.unique(files).tolist():
            mine, before = files == index, ends[index] - blocks[index]
            starts[mine] = self.firsts[index] + sequence_starts(
                epochs[mine] * blocks[index] + numbers[mine] - before, self.counts[index],
                block_size, f"{seed} file {index}")
        return starts

    def at_documents(self, starts, block_size, document_start):
        """Return the starts of sequences, each moved to the first document that begins in its
        block, where one does and the sequence still ends within the split (by file: the file)."""
        begins = self.rows(starts, block_size) == document_start
        moved = starts + begins.argmax(1)  # by 0 where there is none
        ends = np.cumsum(self.counts) if self.by_file else np.array([self.tokens])
        return np.where(moved + block_size < ends[np.searchsorted(ends, starts, side="right")],
                        moved, starts)

    def spread(self, sequences, block_size):
        """Return the starts of at most so many sequences, evenly spread over the split."""
        blocks = (self.tokens - 1) // block_size
        return np.unique(np.arange(sequences) * blocks // sequences) * block_size


class Mixture:
    """One split of one dataset or of several, whose sequences come in exact shares.

    document_start: a token, where sequences are to begin at documents (TokenReader.at_documents).
    mix: as `parse_mix` returns it. Raises ValueError where a split is shorter than a sequence.
    """

    document_start = None

    def __init__(self, mix, split, block_size):
        self.weights, self.block_size = list(mix.values()), block_size
        self.readers = {name: TokenReader(name, split) for name in mix}
        readers = self.readers.values()
        for reader in readers:
            longest = max(reader.counts) if reader.by_file else reader.tokens
            if longest <= block_size:
                raise ValueError(
                    f"block_size={block_size} needs {block_size + 1:,} tokens, the {split} split "
                    f"of {reader.folder} has {longest:,}; use a smaller --block_size or prepare "
                    "more text")
        self.folder = " + ".join(str(reader.folder) for reader in readers)
        self.tokens = sum(reader.tokens for reader in readers)
        self.shards = [{"dataset": name, **shard} for name, reader in self.readers.items()
                       for shard in reader.shards]
        sizes = [reader.bytes_per_token for reader in readers]
        self.bytes_per_token = None if None in sizes else self.mean(sizes)

    def mean(self, values):
        """Return the mean of one value per dataset, in the datasets' shares."""
        return (sum(weight * value for weight, value in zip(self.weights, values, strict=True))
                / sum(self.weights))

    def sequences(self, numbers, seed):
        """Return (rows (n, block_size + 1) int64, their masks or None) of the run's sequences with
        these numbers, (n,) counted from the start of the run; a pure function."""
        T, readers = self.block_size, list(self.readers.values())
        rows, mask = np.empty((len(numbers), T + 1), np.int64), None
        if any(reader.masked for reader in readers):
            mask = np.ones(rows.shape, bool)
        places = np.array([place(number, self.weights) for number in numbers.tolist()])
        for index in np.unique(places[:, 0]).tolist():
            mine, reader = places[:, 0] == index, readers[index]
            starts = reader.starts(places[mine, 1], T, f"{seed}.{index}" if index else seed)
            if self.document_start is not None:
                starts = reader.at_documents(starts, T, self.document_start)
            rows[mine] = reader.rows(starts, T + 1)
            if reader.masked:
                mask[mine] = reader.masks(starts, T + 1)
        return rows, mask


def parse_mix(mix, dataset):
    """Return {dataset: weight}, whole numbers in the shares of mix, 'a:0.7,b:0.3', or of `dataset`
    alone where mix is ''. The shares need not sum to 1."""
    if not mix:
        return {dataset: 1}
    shares, names = {}, set()
    for part in mix.split(","):
        name, _, share = (text.strip() for text in part.rpartition(":"))
        if not name or not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or not Fraction(share):
            raise ValueError(f"mix={mix!r}: {part!r} is not a dataset and its share above 0; write "
                             "--mix=NAME:0.7,OTHER:0.3")
        if (last := dataset_folder(name).name) in names:
            raise ValueError(f"mix={mix!r}: {last!r} is in it twice; give it one share")
        names.add(last)
        shares[name] = Fraction(share)
    unit = lcm(*(share.denominator for share in shares.values()))
    return {name: int(share * unit) for name, share in shares.items()}


def place(number, weights):
    """Return (which dataset, its sequence's number in that dataset's own run); a pure function.

    The datasets are halved until one is left. Of the first n sequences of a group its left half
    has n * share, rounded, so that a level adds at most 1/2 to what a dataset is off by: of the
    first n it has its share of n, off by 1/2 at most with two datasets, by less than
    ceil(log2(datasets)) / 2 with more, so by less than 1 with four.
    """
    first, last = 0, len(weights)
    while last - first > 1:
        middle = (first + last) // 2
        part, whole = sum(weights[first:middle]), sum(weights[first:last])
        before, after = ((2 * n * part + whole) // (2 * whole) for n in (number, number + 1))
        if after > before:
            number, last = before, middle
        else:
            number, first = number - before, middle
    return first, number


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


def wait_for(path):
    """Wait for a file that prepare.py is downloading; ValueError after half an hour without it."""
    until = time.monotonic() + PATIENCE
    if not path.is_file():
        print(f"waiting for {path}, which prepare.py is downloading", file=sys.stderr, flush=True)
    while not path.is_file():
        if time.monotonic() > until:
            raise ValueError(f"{path}: not there after {PATIENCE / 60:g} minutes; run the "
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
        raise ValueError(f"{path}: {error.strerror}; prepare the dataset again") from error
    magic, version, count = header[:3].tolist() or (0, 0, 0)
    dtype, offset = formats.get((magic, version)), 4 * HEADER
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
    blocks = blocks_in(tokens, block_size)
    assert blocks, "Mixture checks the length"
    starts = []
    for number in sequences.tolist():
        epoch, block = divmod(number, blocks)
        chunk = starts_of_chunk(epoch, block // CHUNK, blocks, tokens, block_size, seed)
        starts.append(chunk[block % CHUNK])
    return np.array(starts, np.int64)


def blocks_in(tokens, block_size):
    """Return the sequences of an epoch of so many tokens: with room to move the cuts."""
    return max(1, tokens // block_size - 1) if tokens > block_size else 0


@lru_cache(maxsize=64)
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
