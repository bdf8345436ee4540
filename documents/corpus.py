"""Documents from anywhere, in pieces: your own files, the standard library's, Hugging Face's hub.

A document is read in pieces of at most PIECE characters, cut where no token can span the cut, so
that a text of any size needs little memory. `Files` and `Hub` yield the pieces, and know their
position, from which another process can go on.
"""

import glob
import hashlib
import os
import re
import sysconfig
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from documents.readers import DocumentReader, check_column, unpacked_name, warn_once
from formats.files import write_atomically
from formats.ready_made import ask_hub, hub_errors

PIECE = 1 << 20  # characters that are read and tokenized at a time
# The built-in datasets, each with the tokenizer that it gets unless another is named
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
BUILT_IN = {"stdlib": "bytes", "shakespeare_char": "chars", "shakespeare": "gpt2"}


class HubDataset(NamedTuple):
    name: str
    configuration: str
    revision: str


# Datasets of Hugging Face's hub; all have a column "text". The first is FineWeb v1.4.0.
ON_THE_HUB = {
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "sample-10BT",
                          "9bb295ddab0e05d785b879661af7260fed5140fc"),
    "fineweb_edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT",
                              "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
    "openwebtext": HubDataset("Skylion007/openwebtext", "plain_text",
                              "79d93d786212f7344586290adb811d4ae6a1762c")}
# Safe cuts: after a character before a space, or after a letter or digit before white space; where
# there is no such place, after one before punctuation. The first part of the pattern takes as much
# text as possible, so that the last such place is found.
SAFE_CUTS = (re.compile(r"(?s:.*)(?:\S(?= )|[^\W_](?=\s))"),
             re.compile(r"(?s:.*)[^\W_](?=[.,;:!?\u3001\u3002\uff0c\uff01\uff1f])"))


# ---------------------------------------------------------------------- which files there are


def find_files(dataset, pattern, folder, suffixes):
    """Return the files to read, in a stable order.

    pattern: a file, a glob, or a folder, of which the files with these suffixes are read. Without
    one, the dataset is built in; it is downloaded into `folder` where need be.
    """
    # Without a pattern only a built-in dataset has files.
    if not pattern:
        if dataset == "stdlib":
            return stdlib_files()
        if dataset in BUILT_IN:
            return [download(SHAKESPEARE_URL, folder / "input.txt")]
        raise UserError(f"dataset={dataset!r}: not one of {', '.join([*BUILT_IN, *ON_THE_HUB])}; "
                        "for your own text add --input=PATH")

    # The default dataset's name is not that of another text.
    if dataset == "stdlib":
        raise UserError(f"input={pattern!r}: also name the dataset that it becomes, such as "
                        "--dataset=mine; stdlib is Python's own source")
    paths = search_input(pattern, suffixes)
    if any(unpacked_name(path).endswith(".json") for path in paths):
        warn_once(".json files are read as plain text, brackets and all; if each line is an "
                  "object, name the file .jsonl")
    return paths


def search_input(pattern, suffixes):
    """Return the files that a pattern of `find_files` names, sorted."""
    # A folder is searched for files of these suffixes; what is named by hand may have any suffix.
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        found = search_folder(path, tuple(parse_suffixes(suffixes)))
    elif path.is_file():
        found = [path]
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
    paths = sorted(p for p in found if p.is_file())
    if not paths:
        raise UserError(f"input={pattern!r}: no files there; give a file, a glob in quotes, or a "
                        f"folder with {suffixes} (--suffixes= names others)")
    return paths


def parse_suffixes(suffixes):
    """Return the endings that the text names, each with its dot and without .gz or .zst."""
    endings = []
    for suffix in suffixes.split():
        ending = unpacked_name(Path(f".{suffix.removeprefix('.')}"))
        if not re.fullmatch(r"\.[\w.+-]+", ending):
            raise UserError(f"suffixes={suffixes!r}: {suffix!r} is no ending of a file's name; "
                            "write them with spaces, as in --suffixes='.c .h'")
        endings.append(ending)
    return endings


def search_folder(root, endings):
    """Return the files below a folder that have one of the endings. Hidden ones (.git, .venv) are
    left out, and folders that may not be read, with a warning."""
    def warn(error):
        warn_once(f"skipped: {error.filename}: {error.strerror}")

    paths = []
    for folder, subfolders, names in os.walk(root, onerror=warn):
        # os.walk visits the subfolders that are left in its list.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and unpacked_name(path).endswith(endings):
                paths.append(path)
    return paths


def stdlib_files():
    """Return the standard library's .py files, sorted, without tests and installed packages."""
    root, paths = Path(sysconfig.get_path("stdlib")), []
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, subfolders, names in os.walk(root):
        # os.walk visits the subfolders that are left in its list.
        subfolders[:] = set(subfolders) - skip
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())


def download(url, path):
    """Download a URL to `path`, once, and return the path. Raises UserError when offline."""
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode("utf-8")
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}); fetch it elsewhere and add "
                        "--input=FILE") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


# ---------------------------------------------------------------------- pieces of documents


def cut(text, size=None):
    """Split a text into pieces of at most `size` characters (None: PIECE) that have its tokens.

    No token of GPT-2's or GPT-4's patterns spans a safe cut, and no word one at white space. Where
    there is no safe cut among the last 32,768 characters, the cut is at `size`.
    """
    if size is None:
        size = PIECE
    pieces, start = [], 0
    while len(text) - start > size:
        # Cut at the last safe place before the end of the piece.
        end = start + size
        for pattern in SAFE_CUTS:
            safe = pattern.match(text, max(start, end - 2**15), end)
            if safe:
                end = safe.end()
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def cut_stream(texts):
    """Yield the pieces of a document that comes as an iterable of strings, without empty ones."""
    # What follows the last cut of a text belongs to the next one.
    rest = ""
    for text in texts:
        *ready, rest = cut(rest + text)
        yield from ready
    if rest:
        yield rest


class Files:
    """The documents of files. Iterating yields (starts_document, text, row) from `position` on.

    documents/readers.py says what a document is, and what `column`, `bad_text` and `extra_columns`
    mean. row: a dict with those of the extra columns that the document has. val_paths: files that
    are for validation, if these are given apart.
    """

    # Another process can go on from any position.
    at_boundary = True

    def __init__(self, paths, column="text", bad_text="stop", extra_columns=(), val_paths=()):
        self.train_paths, self.paths = paths, [*paths, *val_paths]
        self.sizes = [path.stat().st_size for path in self.paths]
        self.reader = DocumentReader(column, bad_text, extra_columns)
        # The number of a file, and how many pieces of it were read
        self.position = [0, 0]
        # The file that is being read
        self.file = None

    def __iter__(self):
        first, skip = self.position
        for index in range(first, len(self.paths)):
            # Read the pieces of a file again to get to the one at which to go on.
            for count, piece in enumerate(self.pieces_of(self.paths[index]), 1):
                if count > skip:
                    self.position = [index, count]
                    yield piece
            self.position, skip = [index + 1, 0], 0

    def pieces_of(self, path):
        """Yield (starts_document, text, row) for each piece of a file."""
        with open(path, "rb") as self.file:
            for texts, row in self.reader.read(path, self.file):
                starts_document = True
                for piece in cut_stream(texts):
                    yield starts_document, piece, row
                    starts_document = False

    @property
    def in_validation(self):
        """Whether the file that is being read is one of val_paths."""
        return self.position[0] >= len(self.train_paths)

    def fingerprint(self):
        """Return a hash of the files' names, sizes and times: has the corpus changed?"""
        # Names without folders: a corpus may be moved.
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def share_done(self):
        """Return the share of the bytes that was read, from 0 to 1."""
        # The files before this one, and this one as far as it was read, packed or not.
        done = sum(self.sizes[:self.position[0]])
        if self.file and not self.file.closed:
            done += self.file.tell()
        return min(1, done / max(1, sum(self.sizes)))


# ---------------------------------------------------------------------- the hub


class Hub:
    """The documents of a dataset on Hugging Face's hub: iterated over as Files are.

    They are read as they are downloaded; no copy is kept.
    """

    def __init__(self, dataset, column="text", extra_columns=()):
        self.dataset, self.column, self.extra_columns = ON_THE_HUB[dataset], column, extra_columns
        self.rows_read = 0
        # The stream knows its position between documents, not within one.
        self.at_boundary = True

    def connect(self):
        """Open the stream. Raises UserError offline, and where the text's column is missing."""
        name, configuration, revision = self.dataset
        # Opening it downloads a little: which files, columns and splits there are.
        with hub_errors(f"the dataset {name} on Hugging Face's hub"):
            from datasets import load_dataset

            ask_hub(name, revision)
            stream = load_dataset(name, configuration, revision=revision, split="train",
                                  streaming=True)
            columns = stream.column_names or list(next(iter(stream)))
            splits = stream.info.splits
        check_column(name, self.column, columns)

        # Download no other columns; some versions of a dataset lack the extra ones.
        self.extra_columns = [column for column in self.extra_columns if column in columns]
        self.stream = stream.select_columns([self.column, *self.extra_columns])
        self.rows = None
        if splits:
            self.rows = splits["train"].num_examples

    @property
    def position(self):
        return {"rows": self.rows_read, "stream": self.stream.state_dict()}

    @position.setter
    def position(self, position):
        self.rows_read = position["rows"]
        self.stream.load_state_dict(position["stream"])

    def __iter__(self):
        rows = iter(self.stream)
        while True:
            with hub_errors(f"more of {self.dataset.name}"):
                row = next(rows, None)
            if row is None:
                return
            self.rows_read += 1

            # A row may have no text, and lone surrogates in it, which UTF-8 cannot hold.
            text = (row[self.column] or "").encode("utf-8", "replace").decode()
            extra = {name: row[name] for name in self.extra_columns}

            # With the last piece the stream is between documents again.
            pieces = list(cut_stream([text]))
            for count, piece in enumerate(pieces, 1):
                self.at_boundary = count == len(pieces)
                yield count == 1, piece, extra

    def fingerprint(self):
        return " ".join(self.dataset)

    def share_done(self):
        """Return the share of the rows that was read, from 0 to 1; 0 where it is not known."""
        if not self.rows:
            return 0
        return min(1, self.rows_read / self.rows)
