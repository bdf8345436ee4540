"""Turn text into token files: find it, split it, tokenize it.

    python prepare.py                                        # stdlib: Python's own source, bytes
    python prepare.py --dataset=shakespeare_char             # downloads 1 MB, characters
    python prepare.py --input=my_texts/ --dataset=mine --tokenizer=gpt2
    python prepare.py --input=my_texts/ --dataset=mine_bpe --tokenizer=bpe --vocab_size=8192
    python prepare.py --input=pages.jsonl.gz --dataset=pages --text_column=content

Writes data/<dataset>/: {train,val}_000000.bin and so on (tokens.py has the format), tokenizer.json
and meta.json. Text is read twice, first to count it, and never held in memory whole; a third time
between them where a bpe vocabulary is learned from it (tokenizer.py).
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
import time
import zlib
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from configurator import run
from tokenizer import Tokenizer, check_bpe, gpt2_spec, read_spec, train_bpe
from tokens import ShardWriter, dataset_folder, load_json, read_header, write_aside

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
BUILT_IN = {"stdlib": "bytes", "shakespeare_char": "chars", "shakespeare": "gpt2"}
LATER = ("fineweb", "fineweb_edu", "openwebtext")
READY_MADE = {  # GPT-2 tokens in llm.c's layout: (hub's dataset, file names, files for training)
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb_{}_{:06d}.bin", 103),
    "fineweb_edu": ("kjj0/finewebedu10B-gpt2", "finewebedu_{}_{:06d}.bin", 99)}
BAD_TEXT = "leave it out, or say --bad_text=skip or --bad_text=replace"
PIECE = 1 << 20  # characters that are read and tokenized at a time
SAFE_CUT = re.compile(r"(?s:.*)(?:\S(?= )|[^\W_](?=[\s.,;:!?\u3001\u3002\uff0c\uff01\uff1f]))")


def main(
    dataset="stdlib",  # what to prepare: stdlib, shakespeare_char, shakespeare, or --input's name
    input="",  # your own text: a file, a folder or a 'glob'; .jsonl .csv .parquet, others are text
    suffixes=".txt .md .rst .py .jsonl .csv .parquet",  # what is read of a folder; also .gz, .zst
    tokenizer="",  # bytes, chars, gpt2, bpe (trained on this text) or the path of a tokenizer.json
    vocab_size=4096,  # bpe: how many tokens, with the 256 bytes and end-of-text
    split_pattern="gpt2",  # bpe: what cuts text into pieces, gpt2 or gpt4
    bpe_characters=100_000_000,  # bpe: learn from so much of the training text, spread evenly
    text_column="text",  # the field of .jsonl, .csv and .parquet files that holds the text
    bad_text="stop",  # a document that is not UTF-8: stop, skip it, or replace what is wrong in it
    val_fraction=0.1,  # share of the text that is held out for validation
    shard_tokens=100_000_000,  # tokens per file, at most
    overwrite=False,  # replace a dataset of other text or other settings
    ready_made=False,  # fineweb and fineweb_edu: download GPT-2 tokens that others have made
    max_tokens=0,  # of those, stop with the file that reaches so many; 0: all, 10 billion
):
    if ready_made:
        return download_shards(dataset, dataset_folder(dataset), max_tokens)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    if not 1 <= shard_tokens < 2**31:
        raise ValueError(f"shard_tokens={shard_tokens}: must be at least 1 and below 2**31")
    kind = tokenizer or BUILT_IN.get(dataset, "bytes")
    if kind == "bpe":
        check_bpe(vocab_size, split_pattern)
        if bpe_characters < 1:
            raise ValueError(f"bpe_characters={bpe_characters}: must be at least 1")
    elif kind not in ("bytes", "chars", "gpt2") and not kind.endswith(".json"):
        raise ValueError(f"tokenizer={kind!r}: choose bytes, chars, gpt2, bpe or the path of a "
                         "tokenizer.json")
    if bad_text not in ("stop", "skip", "replace"):
        raise ValueError(f"bad_text={bad_text!r}: choose stop, skip or replace")
    spec = read_spec(kind) if kind.endswith(".json") else {"kind": kind}
    folder = dataset_folder(dataset)
    paths = find_files(dataset, input, folder, suffixes)
    source = {"tokenizer": kind, "text_column": text_column, "bad_text": bad_text,
              "val_fraction": val_fraction, "shard_tokens": shard_tokens,
              "files": fingerprint(paths)}
    if kind == "bpe":
        source |= {"vocab_size": vocab_size, "split_pattern": split_pattern,
                   "bpe_characters": bpe_characters}
    elif kind.endswith(".json"):  # the same one elsewhere is the same
        digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        source |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": digest}
    unfinished = folder / "UNFINISHED"  # while it is there, the folder is not a dataset
    meta_path = folder / "meta.json"
    in_use = meta_path.is_file() or any(folder.glob("*.bin"))
    if in_use and not unfinished.exists() and not overwrite:
        if meta_path.is_file() and load_json(meta_path).get("source") == source:
            print(f"{folder}: already prepared, nothing to do")
            return
        raise ValueError(f"{folder} has token files of other text or other settings; replace them "
                         "with --overwrite=True, or choose another --dataset=NAME")

    spec = gpt2_spec() if kind == "gpt2" else spec
    facts = survey(read_pieces(paths, text_column, bad_text), val_fraction, kind)
    if facts["characters"] < 2:
        raise ValueError(f"{input or dataset}: there is no text in its {len(paths)} file(s)")
    if kind == "chars":
        spec |= {"alphabet": facts["alphabet"], "documents": facts["documents"] > 1}
    if kind == "bpe":
        pieces = assign(read_pieces(paths, text_column, bad_text), facts, val_fraction)
        texts = training_text(pieces, facts["characters"], bpe_characters)
        spec = train_bpe(texts, vocab_size, split_pattern)
    tokenizer = Tokenizer(spec)
    if kind == "bpe" and tokenizer.vocab_size < vocab_size:
        print(f"bpe: no more pairs come twice in that text, so the vocabulary is "
              f"{tokenizer.vocab_size:,} and not {vocab_size:,}")
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
    if tokenizer.kind == "bpe":
        meta["compared"] = compare(folder / splits["val"]["shards"][0]["file"], tokenizer)
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
            raise ValueError(f"{dataset}: its text is not fetched by this version; add "
                             "--ready_made=True for GPT-2 tokens of fineweb or fineweb_edu, put "
                             f"ready-made files (*train_*.bin, *val_*.bin) into {folder}, or give "
                             "the text with --input=FILES")
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


def download_shards(dataset, folder, max_tokens):
    """Fetch ready-made token files from Hugging Face's hub, the validation file first.

    A file that is there is not fetched again, so that a stopped download goes on, and training can
    begin with the first files. Raises ValueError for a dataset that has none, or when offline.
    """
    from huggingface_hub import hf_hub_download

    if dataset not in READY_MADE:
        raise ValueError(f"dataset={dataset!r} is not to be had ready-made; choose "
                         f"{' or '.join(READY_MADE)}")
    hub_dataset, pattern, files = READY_MADE[dataset]
    names = [pattern.format("val", 0), *(pattern.format("train", i) for i in range(1, files + 1))]
    tokens = 0
    for name in names:
        if not (folder / name).is_file():
            try:
                hf_hub_download(hub_dataset, name, repo_type="dataset", local_dir=folder)
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot download {name} of {hub_dataset} "
                                 f"({type(error).__name__}); fetch it elsewhere and put it into "
                                 f"{folder}") from error
        *_, count = read_header(folder / name)
        tokens += count * ("train" in name)
        print(f"{folder / name}: {count:,} tokens", flush=True)
        if 0 < max_tokens <= tokens:
            break
    print(f"{folder}: {tokens:,} tokens for training")


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


def training_text(pieces, characters, limit):
    """Yield at most `limit` of the corpus's characters, of `assign`'s training pieces only and
    evenly spread over them, in short texts."""
    share, seen, taken = min(1, limit / characters), 0, 0
    for split, _, text in pieces:
        for part in cut(text, max(64, min(2**14, limit // 64))) if split == "train" else []:
            seen += len(part)
            if taken + len(part) <= share * seen:
                taken += len(part)
                yield part


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


def compare(path, tokenizer):
    """Print and return bytes per token of the first 2**20 tokens of a held-out file, without its
    end-of-text tokens, and what gpt2 needs for the same text: {bytes, tokens, gpt2_tokens}."""
    dtype, offset, count = read_header(path)
    texts = [[]]
    for i in np.fromfile(path, dtype, min(count, 2**20), offset=offset).tolist():
        texts.append([]) if i == tokenizer.eot else texts[-1].append(i)
    found = {"tokens": sum(map(len, texts))}
    texts = [tokenizer.decode(ids) for ids in texts]
    found["bytes"] = sum(len(text.encode()) for text in texts)
    try:
        encoded = Tokenizer(gpt2_spec()).encode_batch(texts)
        found["gpt2_tokens"] = sum(map(len, encoded))
        of_gpt2 = f"gpt2 {found['bytes'] / found['gpt2_tokens']:.3f}"
    except ValueError:
        of_gpt2 = "gpt2's files are not to be had here"
    print(f"bytes per token on {found['bytes']:,} bytes of held-out text: this vocabulary of "
          f"{tokenizer.vocab_size:,} {found['bytes'] / found['tokens']:.3f}, {of_gpt2}")
    return found


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


if __name__ == "__main__":
    run(main)
