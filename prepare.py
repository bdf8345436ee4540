"""Turn text into token files: find it, split it, tokenize it. The tokenizers live here too.

    python prepare.py                                        # stdlib: Python's own source, bytes
    python prepare.py --dataset=shakespeare_char             # downloads 1 MB, characters
    python prepare.py --input=my_texts/ --dataset=mine --tokenizer=gpt2
    python prepare.py --input=pages.jsonl.gz --dataset=pages --text_column=content

Writes data/<dataset>/: {train,val}_000000.bin and so on (tokens.py has the format), tokenizer.json
and meta.json. Text is read twice, first to count it, and never held in memory whole.
"""

import base64
import codecs
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from configurator import run
from tokens import ShardWriter, dataset_folder, load_json, load_meta, write_aside

EOT = "<|endoftext|>"
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
BUILT_IN = {"stdlib": "bytes", "shakespeare_char": "chars", "shakespeare": "gpt2"}
LATER = ("fineweb", "fineweb_edu", "openwebtext")
BAD_TEXT = "leave it out, or say --bad_text=skip or --bad_text=replace"
PIECE = 1 << 20  # characters that are read and tokenized at a time
SAFE_CUT = re.compile(r"(?s:.*)(?:\S(?= )|[^\W_](?=[\s.,;:!?\u3001\u3002\uff0c\uff01\uff1f]))")


def main(
    dataset="stdlib",  # what to prepare: stdlib, shakespeare_char, shakespeare, or --input's name
    input="",  # your own text: a file, a folder or a 'glob'; .jsonl .csv .parquet, others are text
    suffixes=".txt .md .rst .py .jsonl .csv .parquet",  # what is read of a folder; also .gz, .zst
    tokenizer="",  # bytes, chars or gpt2 ('': the dataset's usual one; bytes for your own text)
    text_column="text",  # the field of .jsonl, .csv and .parquet files that holds the text
    bad_text="stop",  # a document that is not UTF-8: stop, skip it, or replace what is wrong in it
    val_fraction=0.1,  # share of the text that is held out for validation
    shard_tokens=100_000_000,  # tokens per file, at most
    overwrite=False,  # replace a dataset of other text or other settings
):
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    if not 1 <= shard_tokens < 2**31:
        raise ValueError(f"shard_tokens={shard_tokens}: must be at least 1 and below 2**31")
    kind = tokenizer or BUILT_IN.get(dataset, "bytes")
    if kind not in ("bytes", "chars", "gpt2"):
        raise ValueError(f"tokenizer={kind!r}: choose bytes, chars or gpt2")
    if bad_text not in ("stop", "skip", "replace"):
        raise ValueError(f"bad_text={bad_text!r}: choose stop, skip or replace")
    folder = dataset_folder(dataset)
    paths = find_files(dataset, input, folder, suffixes)
    source = {"tokenizer": kind, "text_column": text_column, "bad_text": bad_text,
              "val_fraction": val_fraction,
              "shard_tokens": shard_tokens, "files": fingerprint(paths)}
    unfinished = folder / "UNFINISHED"  # while it is there, the folder is not a dataset
    meta_path = folder / "meta.json"
    in_use = meta_path.is_file() or any(folder.glob("*.bin"))
    if in_use and not unfinished.exists() and not overwrite:
        if meta_path.is_file() and load_json(meta_path).get("source") == source:
            print(f"{folder}: already prepared, nothing to do")
            return
        raise ValueError(f"{folder} has token files of other text or other settings; replace them "
                         "with --overwrite=True, or choose another --dataset=NAME")

    spec = gpt2_spec() if kind == "gpt2" else {"kind": kind}
    facts = survey(read_pieces(paths, text_column, bad_text), val_fraction, kind)
    if facts["characters"] < 2:
        raise ValueError(f"{input or dataset}: there is no text in its {len(paths)} file(s)")
    if kind == "chars":
        spec |= {"alphabet": facts["alphabet"], "documents": facts["documents"] > 1}
    tokenizer = Tokenizer(spec)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    for old in list(folder.iterdir()):
        if re.fullmatch(r"meta\.json|(train|val)_\d+\.(bin|tmp)", old.name):
            old.unlink()
    pieces = assign(read_pieces(paths, text_column, bad_text), facts, val_fraction)
    splits = write_splits(folder, pieces, tokenizer, facts["bytes"], shard_tokens)
    tokenizer.save(folder)
    meta = {"dataset": folder.name, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "splits": splits, "source": source}
    write_aside(meta_path, json.dumps(meta, indent=1) + "\n")
    unfinished.unlink()
    for split, info in splits.items():
        documents = f", {info['documents']:,} documents" if facts["documents"] > 1 else ""
        print(f"{split}: {info['tokens']:,} tokens of {info['bytes'] / info['tokens']:.2f} bytes"
              f"{documents}, {len(info['shards'])} file(s)")
    print(f"{folder}: done; tokenizer {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")


# ---------------------------------------------------------------------- the text


def find_files(dataset, pattern, folder, suffixes):
    """Return the files to read, in a stable order."""
    if not pattern:
        if dataset == "stdlib":
            return stdlib_files()
        if dataset in BUILT_IN:
            return [download(SHAKESPEARE_URL, folder / "input.txt")]
        if dataset in LATER:
            raise ValueError(f"{dataset}: not prepared by this version; put ready-made GPT-2 token "
                             f"shards (*train_*.bin, *val_*.bin) into {folder}, or give "
                             "its text with --input=FILES")
        raise ValueError(f"dataset={dataset!r}: not one of {', '.join(BUILT_IN)}; "
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
        raise ValueError(f"input={pattern!r}: no files there; give a file, a glob in quotes, or a "
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
    """Fetch a URL into `path`, once. Raises ValueError with what to do instead when offline."""
    import urllib.request
    from http.client import HTTPException

    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text = response.read()
        except (OSError, HTTPException) as error:
            raise ValueError(f"cannot download {url} ({error}); fetch it elsewhere and add "
                             "--input=FILE") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, text.decode("utf-8"))
    return path


def fingerprint(paths):
    """Return a hash of the files' names, sizes and times: has the corpus changed?"""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def read_pieces(paths, text_column, bad_text="stop"):
    """Yield (starts_document, text): documents in pieces of about PIECE characters at most.

    A text file is one document; each row of a .jsonl, .csv or .parquet file is one. Raises
    ValueError with file and position for what is not text, unless bad_text says what to do.
    """
    readers = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    for path in paths:
        reader = readers.get(Path(plain_name(path)).suffix)
        documents = reader(path, text_column, bad_text) if reader else [read_text(path, bad_text)]
        for pieces in documents:
            start = True
            for text in pieces:
                if text:
                    yield start, text
                    start = False


def open_plain(path):
    """Open a file's bytes, unpacked where its name ends in .gz or .zst."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        from pyarrow import input_stream

        return BufferedReader(input_stream(path, compression="zstd"))
    return open(path, "rb")


@contextmanager
def named_errors(path):
    """Turn what a damaged packed file raises into a ValueError with its name."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's word, not the file's
        raise ValueError(f"{path}: damaged, or not what its name says ({error})") from error


def read_text(path, bad_text="stop"):
    """Yield a text file in pieces that end where no token can span the cut."""
    if bad_text == "skip":  # a file is read whole before it is known to be good
        try:
            for _ in read_text(path):
                pass
        except BadText as error:
            say_once(f"skipped: {str(error).removesuffix(f'; {BAD_TEXT}')}")
            return
    decode = codecs.getincrementaldecoder("utf-8-sig")(
        "replace" if bad_text == "replace" else "strict").decode
    rest, done = "", 0
    with named_errors(path), open_plain(path) as file:
        while True:
            raw = file.read(PIECE)
            try:
                text = decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = done + len(raw) - len(error.object) + error.start
                raise BadText(f"{path}, byte {place:,}: not UTF-8 (0x"
                              f"{error.object[error.start]:02x}, {error.reason}); {BAD_TEXT}"
                              ) from error
            if "\0" in text and bad_text != "replace":
                raise BadText(f"{path}, near byte {done:,}: has zero bytes, so it is not text; "
                              f"{BAD_TEXT}")
            done += len(raw)
            *ready, rest = cut(rest + text.replace("\0", "\ufffd"))
            yield from ready
            if not raw:
                break
    yield rest


class BadText(ValueError):
    """A document that is not text."""


@cache
def say_once(text):  # the corpus is read twice
    print(text, file=sys.stderr)


def cut(text):
    """Split text that is longer than PIECE where no token of GPT-2's or GPT-4's patterns can span
    the cut: before a space that follows none, or white space or punctuation that follows a letter
    or digit; at PIECE where there is none near. So the pieces have the tokens of the whole."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = start + PIECE
        if match := SAFE_CUT.match(text, max(start, end - 2**15), end):
            end = match.end()
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def read_lines(path, bad_text):
    """Yield (number, line) of a file of lines, decoded as bad_text says."""
    with named_errors(path), open_plain(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8",
                                         "replace" if bad_text == "replace" else "strict")
            except UnicodeDecodeError as error:
                place = f"{path}, line {number:,}, byte {error.start:,}: not UTF-8"
                if bad_text == "stop":
                    raise BadText(f"{place}; {BAD_TEXT}") from error
                say_once(f"skipped: {place}")


def read_jsonl(path, column, bad_text):
    """Yield each line's document, in pieces."""
    for number, line in read_lines(path, bad_text):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}: no text in field {column!r} (it has: {has}); "
                             "name the field with --text_column=")
        yield cut(row[column].encode("utf-8", "replace").decode())  # lone surrogates: ?


def read_csv(path, column, bad_text):
    """Yield each row's document, in pieces. The first row names the columns."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(line for _, line in read_lines(path, bad_text))
    try:
        if column not in (rows.fieldnames or ()):
            raise ValueError(f"{path}: no column {column!r} (it has: "
                             f"{', '.join(rows.fieldnames or ())}); name it with --text_column=")
        for row in rows:
            yield cut(row[column] or "")
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not CSV ({error})") from error


def read_parquet(path, column, bad_text):
    """Yield each row's document, in pieces."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(f"{path}: no column {column!r} (it has: {', '.join(names)}); "
                                 "name it with --text_column=")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).cast(pa.large_string()).to_pylist():
                    yield cut(text or "")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


def survey(pieces, val_fraction, kind):
    """Read the corpus once: {documents, characters, bytes, alphabet (for chars), by_document}.

    by_document: whether the validation split can be made of whole documents. It can where
    `held_out` puts between half and twice val_fraction of the text aside; a single text or a
    handful of documents is split by position.
    """
    facts = {"documents": 0, "characters": 0, "bytes": 0}
    alphabet, held, in_val, show = set(), 0, False, progress("reading")
    for starts, text in pieces:
        facts["documents"] += starts
        facts["characters"] += len(text)
        facts["bytes"] += len(text.encode())
        if kind == "chars":
            alphabet.update(text)
        in_val = held_out(text, val_fraction) if starts else in_val
        held += in_val * len(text)
        show(facts["bytes"])
    share = held / max(1, facts["characters"])
    fits = 0.5 * val_fraction < share < min(1, 2 * val_fraction)
    return {**facts, "alphabet": "".join(sorted(alphabet)), "by_document": fits}


def held_out(text, val_fraction):
    """Is the document that begins with `text` for validation? A pure function of its words, so
    that exact copies stay on one side and new documents move none of the old."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def assign(pieces, facts, val_fraction):
    """Yield (split, starts_document, text): by document, or all before a position for training.

    A single text is no document among others: nothing in it starts one.
    """
    position, split, characters = 0, "train", facts["characters"]
    end_of_train = min(max(1, int(characters * (1 - val_fraction))), characters - 1)
    for starts, text in pieces:
        starts = starts and facts["documents"] > 1
        if facts["by_document"]:
            if starts:
                split = "val" if held_out(text, val_fraction) else "train"
            yield split, starts, text
            continue
        before = max(0, end_of_train - position)
        position += len(text)
        if text[:before]:
            yield "train", starts, text[:before]
        if text[before:]:
            yield "val", starts and not before, text[before:]


# ---------------------------------------------------------------------- tokenizers


def gpt2_spec():
    """Return GPT-2's byte-pair encoding as a Tokenizer's spec; tiktoken fetches and caches it."""
    from tiktoken_ext.openai_public import gpt2

    try:
        parts = gpt2()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"GPT-2's tokenizer cannot be downloaded ({type(error).__name__}); go online once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from error
    ranks = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].get)
    return {"kind": "gpt2", "pattern": parts["pat_str"],
            "tokens": [base64.b64encode(token).decode() for token in ranks],
            "special_tokens": parts["special_tokens"]}


class Tokenizer:
    """Text to ids and back. `spec` is all of it, and is what tokenizer.json holds.

    vocab_size: ids are below it. eot: the id that begins a document, or None where a corpus of
    one text with a `chars` tokenizer has none.
    """

    def __init__(self, spec):
        self.spec, self.kind = spec, spec["kind"]
        if self.kind == "bytes":
            self.vocab_size, self.eot = 257, 256
        elif self.kind == "chars":
            size = len(spec["alphabet"])
            self.eot = size if spec["documents"] else None
            self.vocab_size = size + spec["documents"]
            points = np.array([ord(c) for c in spec["alphabet"]], int)
            self.table = np.full(points.max(initial=0) + 2, -1)  # code point to id; the last: none
            self.table[points] = np.arange(size)
        elif self.kind in ("gpt2", "bpe"):
            import tiktoken

            ranks = {base64.b64decode(token): i for i, token in enumerate(spec["tokens"])}
            self.bpe = tiktoken.Encoding(self.kind, pat_str=spec["pattern"], mergeable_ranks=ranks,
                                         special_tokens=spec["special_tokens"])
            self.vocab_size, self.eot = self.bpe.n_vocab, spec["special_tokens"][EOT]
        else:
            raise ValueError(f"unknown tokenizer {self.kind!r}; this version knows bytes, chars, "
                             "gpt2 and bpe")

    def encode(self, text):
        """Return the ids of a text, an array; <|endoftext|> in it is ordinary text. Raises
        ValueError naming the characters that a `chars` vocabulary lacks."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if self.kind == "chars":
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = self.table[np.minimum(points, len(self.table) - 1)]
            if (ids < 0).any():
                lacking = "".join(sorted({text[i] for i in np.flatnonzero(ids < 0)}))
                raise ValueError(f"the vocabulary of {self.vocab_size} characters lacks "
                                 f"{lacking!r}; leave them out, or train with --tokenizer=bytes")
            return ids
        return np.array(self.bpe.encode_ordinary(text), np.uint32)

    def encode_batch(self, texts):
        """Return `encode` of each text; byte-pair encoding uses all cores."""
        if self.kind not in ("gpt2", "bpe"):
            return [self.encode(text) for text in texts]
        encoded = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.uint32) for ids in encoded]

    def encode_prompt(self, text):
        """Return the ids of a prompt, a list, in which <|endoftext|> stands for its token."""
        first, *others = text.split(EOT) if self.eot is not None else [text]
        ids = self.encode(first).tolist()
        for part in others:
            ids += [self.eot, *self.encode(part).tolist()]
        return ids

    def decode_bytes(self, ids):
        """Return the bytes of ids; those of <|endoftext|> as such."""
        if self.kind == "bytes":
            return b"".join(EOT.encode() if i == self.eot else bytes([i]) for i in ids)
        if self.kind == "chars":
            return "".join(EOT if i == self.eot else self.spec["alphabet"][i]
                           for i in ids).encode()
        return self.bpe.decode_bytes(list(ids))

    def decode(self, ids):
        """Return the text of ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder):
        write_aside(Path(folder) / "tokenizer.json", json.dumps(self.spec) + "\n")

    @classmethod
    def load(cls, folder):
        """Return the Tokenizer that `save` wrote into a dataset's or a checkpoint's folder."""
        path = Path(folder) / "tokenizer.json"
        spec = load_json(path)
        try:
            return cls(spec)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a tokenizer that can be used ({error!r})") from error


# ---------------------------------------------------------------------- token files


def write_splits(folder, pieces, tokenizer, size, shard_tokens):
    """Tokenize `assign`'s pieces, `size` bytes in all, into both splits' files; return what
    meta.json says of them."""
    show = progress("tokenizing", size)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(
            folder, split, tokenizer.vocab_size, shard_tokens)) for split in ("train", "val")}
        for batch in batches(pieces):
            encoded = tokenizer.encode_batch([text for *_, text in batch])
            for (split, starts, text), ids in zip(batch, encoded, strict=True):
                writers[split].add(ids, len(text.encode()), tokenizer.eot if starts else None)
            show(sum(writer.totals["bytes"] for writer in writers.values()))
        return {split: writer.finish() for split, writer in writers.items()}


def batches(items):
    """Yield lists of `assign`'s items, of about four pieces each: work for several cores."""
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += len(item[2])
        if characters >= 4 * PIECE:
            yield batch
            batch, characters = [], 0
    yield batch


def progress(what, total=0):
    """Return a function of the bytes done that shows them at most once a second on a terminal."""
    began = last = time.monotonic()

    def show(done):
        nonlocal last
        now = time.monotonic()
        if now - last > 1 and sys.stderr.isatty():
            last, rate = now, done / (now - began)
            left = f", {max(0, total - done) / rate:.0f} s left" if total else ""
            print(f"\r{what}: {done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}   ", end="\r",
                  file=sys.stderr, flush=True)

    return show


def load_tokenizer(dataset):
    """Return a dataset's Tokenizer; GPT-2's for ready-made token files, as in nanoGPT."""
    return Tokenizer.load(dataset_folder(dataset)) if load_meta(dataset) else Tokenizer(gpt2_spec())


if __name__ == "__main__":
    run(main)
