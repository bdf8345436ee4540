"""Turn text into token files: find it, filter it, split it, tokenize it on all cores.

    python prepare.py                                        # stdlib: Python's own source, bytes
    python prepare.py --dataset=shakespeare_char             # downloads 1 MB, characters
    python prepare.py --input=my_texts/ --dataset=mine --tokenizer=gpt2
    python prepare.py --input=my_texts/ --dataset=mine_bpe --tokenizer=bpe --vocab_size=8192
    python prepare.py --input=pages.jsonl.gz --dataset=pages --filters='gopher pii' --dedup=near
    python prepare.py --dataset=fineweb_edu --max_tokens=1e9
    python prepare.py --dataset=mine --show=5                # look at what was prepared

Writes data/<dataset>/: {train,val}_000000.bin and so on (tokens.py has the format), tokenizer.json
and meta.json, and removed.jsonl where documents are filtered. Text streams through (corpus.py), it
is never in memory whole. A preparation that was stopped goes on with the same command, and what it
writes does not depend on how often that happens nor on the number of workers.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from configurator import UserError, run
from formats.files import read_json, write_atomically
from formats.shards import ShardWriter, TokenReader, dataset_folder, read_header
from text import corpus, dedup
from text import filters as rules
from text.bpe import check_bpe, read_spec
from text.corpus import BUILT_IN, ON_THE_HUB, Files, Hub, find_files
from text.encode import encoded
from text.progress import progress
from text.split import learn, survey, units
from text.tokenizer import Tokenizer, gpt2_spec, load_tokenizer

SMALL = 32_000_000  # bytes of files that one process prepares as fast as several
NOTE = 10  # seconds between notes of how far it is, beside those at each finished file


def main(
    dataset="stdlib",  # stdlib, shakespeare[_char], fineweb[_edu], openwebtext, or --input's name
    input="",  # your own text: a file, a folder or a 'glob'; .jsonl .csv .parquet, others are text
    suffixes=".txt .md .rst .py .jsonl .csv .parquet",  # what is read of a folder; also .gz, .zst
    text_column="text",  # the field of .jsonl, .csv and .parquet files that holds the text
    bad_text="stop",  # a document that is not UTF-8: stop, skip it, or replace what is wrong in it
    overwrite=False,  # replace a dataset of other text or other settings
    workers=0,  # processes that filter and tokenize; 0: one per core, for small texts none
    show=0,  # look at this many random documents of a prepared dataset instead
    # tokens
    tokenizer="",  # bytes, chars, gpt2, bpe (trained on this text) or the path of a tokenizer.json
    vocab_size=4096,  # bpe: how many tokens, with the 256 bytes and end-of-text
    split_pattern="gpt2",  # bpe: what cuts text into pieces, gpt2 or gpt4
    bpe_characters=100_000_000,  # bpe: learn from so much of the training text, spread evenly
    val_fraction=0.1,  # share of the text that is held out; of fineweb and others the first file
    shard_tokens=100_000_000,  # tokens per file, at most
    max_tokens=0,  # stop when the training split has so many; 0: take everything
    ready_made=False,  # fineweb and fineweb_edu: download GPT-2 tokens that others have made
    # documents to leave out
    filters="",  # any of: gopher repetition c4 fineweb pii (filters.py has them)
    url_blocklist="",  # a file of domains whose documents (by their column url) are left out
    language="",  # keep this one, such as en: by the column language, else as py3langid finds
    language_score=0.65,  # and be so sure of it
    dedup="",  # leave out copies: exact, or near (MinHash)
):
    if show:
        return show_dataset(dataset, show)
    folder, on_hub = dataset_folder(dataset), dataset in ON_THE_HUB and not input
    if ready_made:
        with lock(folder):
            return download_shards(dataset, folder, max_tokens, overwrite)
    filter_settings = {"filters": filters, "url_blocklist": url_blocklist, "language": language,
             "language_score": language_score, "dedup": dedup}
    check(val_fraction, shard_tokens, max_tokens, workers, bad_text)
    rules.check(filter_settings)
    kind = tokenizer or ("gpt2" if on_hub else BUILT_IN.get(dataset, "bytes"))
    spec, source = tokenizer_of(kind, on_hub, vocab_size, split_pattern, bpe_characters)
    more = rules.columns(filter_settings)
    with lock(folder):
        text = Hub(dataset, text_column, more) if on_hub else Files(
            find_files(dataset, input, folder, suffixes), text_column, bad_text, more)
        source |= {"text_column": text_column, "bad_text": bad_text, "val_fraction": val_fraction,
                   "shard_tokens": shard_tokens, "files": text.fingerprint()}
        source |= {key: value for key, value in (*filter_settings.items(), ("max_tokens", max_tokens))
                   if value and (key != "language_score" or language)}
        if url_blocklist:
            source["url_blocklist"] = hashlib.sha256(Path(url_blocklist).read_bytes()).hexdigest()
        notes = earlier(folder, source, overwrite)
        if notes == "done":
            print(f"{folder}: already prepared, nothing to do")
            return
        if on_hub:
            text.connect()
        workers = workers or (1 if not on_hub and sum(text.sizes) < SMALL else cores())
        notes = notes or begin(folder, text, spec, source, filter_settings, input or dataset, workers)
        write_splits(folder, text, notes, filter_settings, workers)


# ---------------------------------------------------------------------- before reading


def check(val_fraction, shard_tokens, max_tokens, workers, bad_text):
    """Raise ValueError for settings that cannot be used."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    if not 1 <= shard_tokens < 2**31:
        raise UserError(f"shard_tokens={shard_tokens}: must be at least 1 and below 2**31")
    for key, value in (("max_tokens", max_tokens), ("workers", workers)):
        if value < 0:
            raise UserError(f"{key}={value}: must be 0 or more")
    if bad_text not in ("stop", "skip", "replace"):
        raise UserError(f"bad_text={bad_text!r}: choose stop, skip or replace")


def tokenizer_of(kind, on_hub, vocab_size, split_pattern, bpe_characters):
    """Return (the tokenizer's spec as far as it is known before reading, what meta.json says)."""
    if kind == "bpe":
        check_bpe(vocab_size, split_pattern)
        if bpe_characters < 1:
            raise UserError(f"bpe_characters={bpe_characters}: must be at least 1")
        return None, {"tokenizer": kind, "vocab_size": vocab_size, "split_pattern": split_pattern,
                      "bpe_characters": bpe_characters}
    if kind.endswith(".json"):  # the same one elsewhere is the same
        spec = read_spec(kind)
        digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        return spec, {"tokenizer": "tokenizer.json", "tokenizer_sha256": digest}
    if kind == "chars" and on_hub:
        raise UserError("tokenizer='chars' must read all of the text to know its characters, and "
                         "this is read once, from the hub; choose bytes, gpt2 or bpe")
    if kind not in ("bytes", "chars", "gpt2"):
        raise UserError(f"tokenizer={kind!r}: choose bytes, chars, gpt2, bpe or the path of a "
                         "tokenizer.json")
    return {"kind": kind}, {"tokenizer": kind}


@contextmanager
def lock(folder):
    """Keep others from preparing the same dataset. An empty folder does not stay behind. Raises
    ValueError where another has it, or where the disk is full."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{folder}: another process is preparing it; wait for that, or choose "
                         "another --dataset=NAME") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: {error.strerror}; make room and run the same command again, "
                         "it goes on") from error
    finally:
        with suppress(OSError):
            folder.rmdir()


def earlier(folder, source, overwrite):
    """Return what an earlier preparation of the same left: its notes, "done", or None."""
    unfinished, meta_path = folder / "UNFINISHED", folder / "meta.json"
    notes = read_json(unfinished) if unfinished.is_file() else {}
    if notes.get("state"):
        if notes["source"] == source:
            return notes
        if not overwrite:
            old = notes["source"]
            other = ["other files" if key == "files" else f"{key}={old[key]!r}" if key in old
                     else f"no {key}" for key in {**old, **source}
                     if old.get(key) != source.get(key)]
            raise UserError(f"{folder}: a preparation with other settings ({', '.join(other)}) "
                             "was stopped half-way; finish it with those, or start over with "
                             "--overwrite=True")
    if unfinished.exists() or overwrite:
        return None
    if meta_path.is_file() and read_json(meta_path).get("source") == source:
        return "done"
    if meta_path.is_file() or any(folder.glob("*.bin")):
        raise UserError(f"{folder} has token files of other text or other settings; replace them "
                         "with --overwrite=True, or choose another --dataset=NAME")
    return None


def begin(folder, text, spec, source, filter_settings, name, workers):
    """Read the text as far as its split and its tokenizer need it; make the folder ready; return
    the notes with which `write_splits` begins."""
    kind = source["tokenizer"]
    spec = gpt2_spec() if kind == "gpt2" else spec  # before the text is read
    facts = {"by": "first file", "documents": 2} if isinstance(text, Hub) else survey(
        text, source["val_fraction"], kind)
    if not facts["documents"]:
        raise UserError(f"{name}: there is no text in its {len(text.paths)} file(s)")
    chooses = {key for key in filter_settings if filter_settings[key] and key != "language_score"}
    if facts["documents"] < 2 and chooses and (
            chooses != {"filters"} or filter_settings["filters"] != "pii"):
        raise UserError(f"{name}: a single text, and --{chooses.pop()} chooses among documents; "
                         "give a folder or a .jsonl")
    if kind == "chars":
        written = {"c4": ["\n"], "pii": [*rules.EMAILS, *rules.IPS]}  # by filters
        alphabet = set(facts.pop("alphabet")).union(*(
            added for name in filter_settings["filters"].split() for added in written.get(name, ())))
        spec = {"kind": kind, "alphabet": "".join(sorted(alphabet)),
                "documents": facts["documents"] > 1}
    if kind == "bpe":
        spec = learn(text, facts, source, filter_settings, workers)
    clear(folder)
    Tokenizer(spec).save(folder)
    return {"source": source, "facts": facts, "state": None}


def cores():
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clear(folder):
    """Remove an earlier dataset of ours; others' files stay."""
    write_atomically(folder / "UNFINISHED", "{}\n")  # while it is there, the folder is not a dataset
    for old in list(folder.iterdir()):
        if re.fullmatch(r"(meta|tokenizer)\.json|removed\.jsonl|seen\.tmp"
                        r"|(train|val)_\d+\.(bin|mask|tmp|bin\.tmp|mask\.tmp)", old.name):
            old.unlink()


def download_shards(dataset, folder, max_tokens, overwrite):
    """Fetch ready-made token files from Hugging Face's hub, the validation file first.

    meta.json says at once which files there will be, so that training can begin with the first and
    takes the later ones as they land. A file that is there is not fetched again. Raises UserError
    for a dataset that has none, or when offline.
    """
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    if not overwrite and ((folder / "UNFINISHED").exists() or meta and "ready_made" not in meta):
        raise UserError(f"{folder} has token files of other text; replace them with "
                         "--overwrite=True")
    if overwrite or "ready_made" not in meta or meta["ready_made"]["max_tokens"] != max_tokens:
        name, commit, files = corpus.ready_made(dataset)
        val, train, total = [], [], 0
        for file, tokens in files.items():
            if "_val_" in file:
                val.append({"file": file, "tokens": tokens})
            elif not 0 < max_tokens <= total:
                train.append({"file": file, "tokens": tokens})
                total += tokens
        meta = {"dataset": folder.name, "tokenizer": "gpt2", "vocab_size": 50257,
                "order": "by_file",
                "splits": {split: {"tokens": sum(shard["tokens"] for shard in shards),
                                   "shards": shards}
                           for split, shards in (("val", val), ("train", train))},
                "ready_made": {"from": name, "commit": commit, "max_tokens": max_tokens}}
        if overwrite:
            clear(folder)
            (folder / "UNFINISHED").unlink()
        write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    for split in ("val", "train"):
        for shard in meta["splits"][split]["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                corpus.fetch(meta["ready_made"]["from"], meta["ready_made"]["commit"],
                             shard["file"], folder)
            *_, count = read_header(path)
            if count != shard["tokens"]:
                raise UserError(f"{path}: has {count:,} tokens and should have "
                                 f"{shard['tokens']:,}; remove it and run the same command again")
            print(f"{path}: {count:,} tokens", flush=True)
    print(f"{folder}: {meta['splits']['train']['tokens']:,} tokens for training")


def write_splits(folder, text, notes, filter_settings, workers):
    """Tokenize the text into both splits' files, from where the notes say on; write and return
    meta.json."""
    facts, source, state = notes["facts"], notes["source"], notes["state"] or {}
    tokenizer, many = Tokenizer.load(folder), facts["documents"] > 1
    limits = {"train": source.get("max_tokens") or 1 << 62,
              "val": source["shard_tokens"] if facts["by"] == "first file" else 1 << 62}
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(
            folder, split, tokenizer.vocab_size, source["shard_tokens"], state.get(split)))
            for split in ("train", "val")}
        removed = dedup.Removed(folder, filter_settings, state.get("removed"))
        stack.callback(removed.close)
        place, dropped = state.get("place"), state.get("dropped", False)
        if state:
            print(f"{folder}: going on after {removed.read:,} documents and "
                  f"{sum(w.totals['tokens'] for w in writers.values()):,} tokens")

        def note():
            made = {split: writer.state() for split, writer in writers.items()}
            now = {**made, "removed": removed.state(), "place": place, "dropped": dropped}
            write_atomically(folder / "UNFINISHED", json.dumps(notes | {"state": now}) + "\n")
            for writer in writers.values():
                writer.publish()

        show = progress(text, "tokenizing", removed, writers, limits["train"])
        results = encoded(units(text, facts, source["val_fraction"], place), tokenizer.spec,
                          filter_settings, workers)
        stack.callback(results.close)
        noted, finished = time.monotonic(), sum(len(w.shards) for w in writers.values())
        for unit, place, result in results:  # noqa: B007 (note reads it)
            if facts["by"] != "position" and (
                    writers["train"].totals["tokens"] >= limits["train"]):
                break
            for (split, starts, piece, row), (reason, ids, size, keys) in zip(
                    unit, result, strict=True):
                if starts or not many:
                    dropped = removed.add(piece, row, reason, keys) if many else False
                eot = tokenizer.eot if starts else None
                for name in () if dropped else [split] if split else ["val", "train"]:
                    ids, size, eot = fill(writers[name], limits[name], tokenizer, ids, size, eot)
            now = sum(len(w.shards) for w in writers.values())
            if now > finished or time.monotonic() - noted > NOTE:
                note()
                noted, finished = time.monotonic(), now
            show()
        splits = {split: writer.finish() for split, writer in writers.items()}
        if empty := [split for split, info in splits.items() if not info["tokens"]]:
            clear(folder)
            (folder / "UNFINISHED").unlink()
            raise UserError(f"{folder}: no tokens are left for the {empty[0]} split "
                             f"({removed.read:,} documents, {removed.counts.total():,} removed"
                             + (f", most for {removed.counts.most_common(1)[0][0]!r}" if
                                removed.counts else "") + "); "
                             "filter less, give more text, or use a larger --max_tokens or a "
                             "smaller --shard_tokens")
        note()
    meta = {"dataset": folder.name, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "splits": splits, "source": source}
    if removed.samples:
        meta["removed"] = {"documents_read": removed.read, **removed.counts}
        say_removed(removed, folder)
    if tokenizer.kind == "bpe":
        meta["compared"] = compare(folder / splits["val"]["shards"][0]["file"], tokenizer)
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    (folder / "seen.tmp").unlink(missing_ok=True)
    (folder / "UNFINISHED").unlink()
    for split, info in splits.items():
        documents = f", {info['documents']:,} documents" if many else ""
        print(f"{split}: {info['tokens']:,} tokens of {info['bytes'] / info['tokens']:.2f} bytes"
              f"{documents}, {len(info['shards'])} file(s)")
    print(f"{folder}: done; tokenizer {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")


def fill(writer, limit, tokenizer, ids, size, eot):
    """Write what fits of a text's ids; return the ids, bytes and end-of-text that are left."""
    room = limit - writer.totals["tokens"] - (eot is not None)
    if room < 0 or not room and eot is None:
        return ids, size, eot
    fits = ids[:room]
    taken = size if len(fits) == len(ids) else len(tokenizer.decode_bytes(fits.tolist()))
    if len(fits) or eot is not None:
        writer.add(fits, taken, eot)
    return ids[room:], size - taken, None


def say_removed(removed, folder):
    total = removed.counts.total()
    print(f"removed {total:,} of {removed.read:,} documents ({total / max(1, removed.read):.1%}), "
          f"samples in {folder / 'removed.jsonl'}:")
    for reason, count in removed.counts.most_common():
        print(f"  {count:>9,}  {reason}")


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
        gpt2 = Tokenizer(gpt2_spec())
        found["gpt2_tokens"] = sum(len(gpt2.encode(text)) for text in texts)
        of_gpt2 = f"gpt2 {found['bytes'] / found['gpt2_tokens']:.3f}"
    except ValueError:
        of_gpt2 = "gpt2's files are not to be had here"
    print(f"bytes per token on {found['bytes']:,} bytes of held-out text: this vocabulary of "
          f"{tokenizer.vocab_size:,} {found['bytes'] / found['tokens']:.3f}, {of_gpt2}")
    return found


# ---------------------------------------------------------------------- looking at it


def show_dataset(dataset, count):
    """Print the sizes of a prepared dataset, its most common tokens, and random documents with the
    boundaries of their tokens visible: by colour on a terminal, else by |."""
    tokenizer, rng = load_tokenizer(dataset), np.random.default_rng()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for split in ("train", "val"):
        reader = TokenReader(dataset, split)
        size = reader.bytes_per_token
        documents = ((reader.meta or {}).get("splits", {}).get(split, {})).get("documents")
        print(f"{split}: {reader.tokens:,} tokens"
              + (f", {round(size * reader.tokens):,} bytes ({size:.3f} per token)" if size else "")
              + (f", {documents:,} documents" if documents else "")
              + f", {len(reader.paths)} file(s)")
    reader = TokenReader(dataset, "train")
    landed = next((first for first, path in zip(reader.firsts, reader.paths, strict=True)
                   if not path.is_file()), reader.tokens)
    if not landed:
        raise UserError(f"{reader.paths[0]}: is not there yet; look again when it is")
    length = min(4096, landed)
    places = np.linspace(0, landed - length, 256).astype(np.int64)
    counts = np.bincount(reader.rows(places, length).ravel(), minlength=tokenizer.vocab_size)
    common = [f"{visible(tokenizer, i)} {counts[i] / counts.sum():.1%}"
              for i in np.argsort(-counts, kind="stable")[:20] if counts[i]]
    print(f"tokenizer {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}, of which "
          f"{np.count_nonzero(counts):,} in {len(places) * length:,} tokens looked at; the most "
          f"common: {'  '.join(common)}")
    for start in rng.integers(0, landed - length + 1, count):
        ids = reader.rows(np.array([start]), length)[0]
        begins = np.flatnonzero(ids == tokenizer.eot) if tokenizer.eot is not None else ()
        first = begins[0] + 1 if len(begins) else 0  # in a long document: its middle
        last = begins[1] if len(begins) > 1 else length
        shown = ids[first:min(last, first + 256)].tolist()
        print(f"\n--- tokens {start + first:,} to {start + first + len(shown):,}"
              + ("" if len(begins) else ", from the middle of a document"))
        print(boundaries(tokenizer, shown, colour))


def visible(tokenizer, i):
    return json.dumps(tokenizer.decode([i]), ensure_ascii=False)


def boundaries(tokenizer, ids, colour):
    """Return the text of ids with each token set apart. Bytes of a character that several tokens
    share are shown with the last of them."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    parts = [decode(tokenizer.decode_bytes([i])) for i in ids] + [decode(b"", final=True)]
    parts = list(filter(None, parts))
    if not colour:
        return "|".join(parts)
    return "".join(f"\033[{(44, 45, 42, 46)[n % 4]};97m{part}\033[0m" for n, part in
                   enumerate(parts))


if __name__ == "__main__":
    run(main)
