"""Documents from anywhere, in pieces: your files of many kinds, the standard library, the hub.

A document is read in pieces of about PIECE characters at most, cut where no token can span the cut,
so that a text of any size needs little memory. Files and Hub know their place, from which another
process can go on.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path

from configurator import UserError
from formats.files import write_atomically
from formats.shards import HEADER

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
BUILT_IN = {"stdlib": "bytes", "shakespeare_char": "chars", "shakespeare": "gpt2"}  # tokenizers
ON_THE_HUB = {  # Hugging Face's datasets: (name, configuration, revision), all with a column "text"
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT",  # v1.4.0
                "9bb295ddab0e05d785b879661af7260fed5140fc"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT",
                    "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text",
                    "79d93d786212f7344586290adb811d4ae6a1762c")}
READY_MADE = {  # GPT-2 tokens of them in llm.c's layout: (name, revision)
    "fineweb": ("kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"),
    "fineweb_edu": ("kjj0/finewebedu10B-gpt2", "main")}
BAD_TEXT = "leave it out, or say --bad_text=skip or --bad_text=replace"
PIECE = 1 << 20  # characters that are read and tokenized at a time
SAFE_CUT = re.compile(r"(?s:.*)(?:\S(?= )|[^\W_](?=[\s.,;:!?\u3001\u3002\uff0c\uff01\uff1f]))")


def find_files(dataset, pattern, folder, suffixes):
    """Return the files to read, in a stable order."""
    if not pattern:
        if dataset == "stdlib":
            return stdlib_files()
        if dataset in BUILT_IN:
            return [download(SHAKESPEARE_URL, folder / "input.txt")]
        raise UserError(f"dataset={dataset!r}: not one of {', '.join([*BUILT_IN, *ON_THE_HUB])}; "
                         "for your own text add --input=PATH")
    path = Path(pattern).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*")
                       if plain_name(p).endswith(tuple(suffixes.split())) and p.is_file())
    elif path.is_file():
        paths = [path]
    else:
        paths = [p for p in sorted(map(Path, glob.glob(str(path), recursive=True))) if p.is_file()]
    if not paths:
        raise UserError(f"input={pattern!r}: no files there; give a file, a glob in quotes, or a "
                         f"folder with {suffixes} (--suffixes= names others)")
    return paths


def plain_name(path):
    """Return the file's name in small letters, without .gz or .zst."""
    return re.sub(r"\.(gz|zst)$", "", path.name.lower())


def stdlib_files():
    """Return the standard library's .py files, sorted, without tests and installed packages."""
    import sysconfig

    root, paths = Path(sysconfig.get_path("stdlib")), []
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - skip
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())


def download(url, path):
    """Fetch a URL into `path`, once. Raises UserError with what to do instead when offline."""
    import urllib.request
    from http.client import HTTPException

    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text = response.read()
        except (OSError, HTTPException) as error:
            raise UserError(f"cannot download {url} ({error}); fetch it elsewhere and add "
                             "--input=FILE") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.decode("utf-8"))
    return path


class Files:
    """The documents of files. Iterating yields (starts_document, text, row) from `place` on.

    A text file is one document; each row of a .jsonl, .csv or .parquet file is one, and `row` holds
    those of its columns `more`. Raises UserError with file and position for what is not text,
    unless bad_text says what to do.
    """

    between = True  # at a place from which another process can go on

    def __init__(self, paths, column="text", bad_text="stop", more=()):
        self.paths, self.column, self.bad_text, self.more = paths, column, bad_text, more
        self.place, self.raw = [0, 0], None  # the file, and the pieces of it that were read
        self.sizes = [path.stat().st_size for path in paths]

    def __iter__(self):
        readers = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
        (first, skip), self.place = self.place, list(self.place)
        for index, path in enumerate(self.paths[first:], first):
            reader, count = readers.get(Path(plain_name(path)).suffix, read_text), 0
            with open(path, "rb") as self.raw:
                for pieces, row in reader(path, self.raw, self.column, self.bad_text, self.more):
                    start = True
                    for text in filter(None, pieces):
                        count += 1
                        if count > skip:
                            self.place = [index, count]
                            yield start, text, row
                        start = False
            self.place, skip = [index + 1, 0], 0

    def fingerprint(self):
        """Return a hash of the files' names, sizes and times: has the corpus changed?"""
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def share_done(self):
        """Return how much of the bytes is read, of 1."""
        done = sum(self.sizes[:self.place[0]]) + (
            self.raw.tell() if self.raw and not self.raw.closed else 0)
        return min(1, done / max(1, sum(self.sizes)))


class Hub:
    """The documents of a dataset on Hugging Face's hub, read as they are downloaded: as Files.

    Nothing is kept of it.
    """

    def __init__(self, dataset, column="text", more=()):
        self.name, self.config, self.revision = ON_THE_HUB[dataset]
        self.column, self.more, self.count, self.between = column, more, 0, True

    def connect(self):
        """Open the stream. Raises UserError offline, and where its columns are not the
        expected."""
        with hub_errors(f"the dataset {self.name} on Hugging Face's hub"):
            from datasets import load_dataset

            stream = load_dataset(self.name, self.config, revision=self.revision, split="train",
                                  streaming=True)
            columns = stream.column_names or list(next(iter(stream)))
            splits = stream.info.splits
        if self.column not in columns:
            raise UserError(f"{self.name}: no column {self.column!r} (it has: "
                             f"{', '.join(columns)}); name it with --text_column=")
        self.more = [name for name in self.more if name in columns]
        self.stream = stream.select_columns([self.column, *self.more])
        self.rows = (splits["train"].num_examples if splits else 0) or 0

    @property
    def place(self):
        return {"rows": self.count, "stream": self.stream.state_dict()}

    @place.setter
    def place(self, place):
        self.count = place["rows"]
        self.stream.load_state_dict(place["stream"])

    def __iter__(self):
        rows = iter(self.stream)
        while True:
            with hub_errors(f"more of {self.name}"):
                row = next(rows, None)
            if row is None:
                return
            self.count += 1
            *pieces, last = cut((row[self.column] or "").encode("utf-8", "replace").decode())
            row, start = {name: row[name] for name in self.more}, True
            self.between = False  # the place is known between documents
            for text in pieces:
                yield start, text, row
                start = False
            self.between = True
            if last:
                yield start, last, row

    def fingerprint(self):
        return f"{self.name} {self.config} {self.revision}"

    def share_done(self):
        """Return how much of the rows is read, of 1; 0 where their number is not known."""
        return min(1, self.count / self.rows) if self.rows else 0


@contextmanager
def hub_errors(what):
    """Turn whatever the hub's libraries raise (many kinds) into a ValueError with what to do."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot download {what} ({reason}); run the same command again where "
                         "the hub can be reached, and it goes on; or give the text's files with "
                         "--input=FILES") from error


def ready_made(dataset):
    """Return (hub's dataset, commit, {file: tokens}) of GPT-2 tokens that others have made."""
    if dataset not in READY_MADE:
        raise UserError(f"dataset={dataset!r} is not to be had ready-made; choose "
                         f"{' or '.join(READY_MADE)}")
    name, revision = READY_MADE[dataset]
    with hub_errors(f"the list of {name}'s files"):
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(name, revision=revision).sha
        files = {file.path: (file.size - 4 * HEADER) // 2 for file in HfApi().list_repo_tree(
            name, repo_type="dataset", revision=commit) if file.path.endswith(".bin")}
    return name, commit, dict(sorted(files.items()))


def fetch(hub_dataset, commit, name, folder):
    """Download one file of the hub into the folder; a download that was stopped goes on."""
    with hub_errors(f"{name} of {hub_dataset}"):
        from huggingface_hub import hf_hub_download

        hf_hub_download(hub_dataset, name, repo_type="dataset", revision=commit, local_dir=folder)


# ---------------------------------------------------------------------- kinds of files


def open_plain(path, raw):
    """Return a file's bytes, unpacked where its name ends in .gz or .zst."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(raw, "rb")
    if path.name.lower().endswith(".zst"):
        from pyarrow import input_stream

        return BufferedReader(input_stream(raw, compression="zstd"))
    return raw


@contextmanager
def named_errors(path):
    """Turn what a damaged packed file raises into a ValueError with its name."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's word, not the file's
        raise UserError(f"{path}: damaged, or not what its name says ({error})") from error


def read_text(path, raw, column, bad_text, more):
    """Yield the file's one document: (its pieces, {})."""
    if bad_text == "skip":  # a file is read whole before it is known to be good
        try:
            for _ in decoded(path, raw, "stop"):
                pass
        except BadText as error:
            warn_once(f"skipped: {str(error).removesuffix(f'; {BAD_TEXT}')}")
            return
        raw.seek(0)
    yield decoded(path, raw, bad_text), {}


def decoded(path, raw, bad_text):
    """Yield a text file in pieces that end where no token can span the cut."""
    decode = codecs.getincrementaldecoder("utf-8-sig")(
        "replace" if bad_text == "replace" else "strict").decode
    rest, done = "", 0
    with named_errors(path):
        file = open_plain(path, raw)
        while True:
            raw_bytes = file.read(PIECE)
            try:
                text = decode(raw_bytes, final=not raw_bytes)
            except UnicodeDecodeError as error:
                place = done + len(raw_bytes) - len(error.object) + error.start
                raise BadText(f"{path}, byte {place:,}: not UTF-8 (0x"
                              f"{error.object[error.start]:02x}, {error.reason}); {BAD_TEXT}"
                              ) from error
            if "\0" in text and bad_text != "replace":
                raise BadText(f"{path}, near byte {done:,}: has zero bytes, so it is not text; "
                              f"{BAD_TEXT}")
            done += len(raw_bytes)
            *ready, rest = cut(rest + text.replace("\0", "\ufffd"))
            yield from ready
            if not raw_bytes:
                break
    yield rest


class BadText(UserError):
    """A document that is not text."""


@cache
def warn_once(text):  # the corpus is read twice
    print(text, file=sys.stderr)


def cut(text, size=None):
    """Split text longer than `size` (PIECE) where no token of GPT-2's or GPT-4's patterns can span
    the cut: before a space that follows none, or white space or punctuation that follows a letter
    or digit; at `size` where there is none near. So the pieces have the tokens of the whole."""
    pieces, start, size = [], 0, size or PIECE
    while len(text) - start > size:
        end = start + size
        if match := SAFE_CUT.match(text, max(start, end - 2**15), end):
            end = match.end()
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def read_lines(path, raw, bad_text):
    """Yield (number, line) of a file of lines, decoded as bad_text says."""
    with named_errors(path):
        for number, line in enumerate(open_plain(path, raw), 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8",
                                          "replace" if bad_text == "replace" else "strict")
            except UnicodeDecodeError as error:
                place = f"{path}, line {number:,}, byte {error.start:,}: not UTF-8"
                if bad_text == "stop":
                    raise BadText(f"{place}; {BAD_TEXT}") from error
                warn_once(f"skipped: {place}")


def read_jsonl(path, raw, column, bad_text, more):
    """Yield each line's document: (its pieces, its other columns)."""
    for number, line in read_lines(path, raw, bad_text):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}, line {number}: no text in field {column!r} (it has: {has}); "
                             "name the field with --text_column=")
        text = row[column].encode("utf-8", "replace").decode()  # lone surrogates: ?
        yield cut(text), {name: row[name] for name in more if name in row}


def read_csv(path, raw, column, bad_text, more):
    """Yield each row's document: (its pieces, its other columns). The first row names them."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(line for _, line in read_lines(path, raw, bad_text))
    try:
        if column not in (rows.fieldnames or ()):
            raise UserError(f"{path}: no column {column!r} (it has: "
                             f"{', '.join(rows.fieldnames or ())}); name it with --text_column=")
        for row in rows:
            yield cut(row[column] or ""), {name: row[name] for name in more if name in row}
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error})") from error


def read_parquet(path, raw, column, bad_text, more):
    """Yield each row's document: (its pieces, its other columns)."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(raw) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column {column!r} (it has: {', '.join(names)}); "
                                 "name it with --text_column=")
            more = [name for name in more if name in names]
            for batch in file.iter_batches(batch_size=1024, columns=[column, *more]):
                others = batch.select(more).to_pylist() if more else [{}] * len(batch)
                texts = batch.column(column).cast(pa.large_string()).to_pylist()
                for text, row in zip(texts, others, strict=True):
                    yield cut(text or ""), row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
