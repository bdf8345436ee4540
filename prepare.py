"""Turn text into token files: find it, filter it, split it, tokenize it on all cores.

    python prepare.py                                        # stdlib: Python's own source, bytes
    python prepare.py --dataset=shakespeare_char             # downloads 1 MB, characters
    python prepare.py --input=my_texts/ --dataset=mine --tokenizer=gpt2
    python prepare.py --input=my_texts/ --dataset=mine_bpe --tokenizer=bpe --vocab_size=8192
    python prepare.py --input=pages.jsonl.gz --dataset=pages --filters='gopher pii' --dedup=near
    python prepare.py --dataset=fineweb_edu --max_tokens=1e9
    python prepare.py --input=chats.jsonl --dataset=chats --format=chat --tokenizer=out/mine
    python prepare.py --dataset=mine --show=5                # look at what was prepared

Writes data/<dataset>/: {train,val}_000000.bin and so on (formats/shards.py), tokenizer.json,
meta.json, and removed.jsonl if documents are filtered. Text is never in memory as a whole. The same
command continues a preparation that was stopped; how often does not change the files.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from configurator import UserError, check_settings, run
from documents import dedup
from documents import filters as filter_rules
from documents.corpus import BUILT_IN, ON_THE_HUB, Files, Hub, find_files, search_input
from formats import preparation
from formats.dataset import dataset_folder
from formats.files import hash_file
from formats.ready_made import download_ready_made
from runtime.terminal import Progress, use_colour
from text.bpe import check_bpe, compare_with_gpt2, read_spec, tokenizer_file
from text.encode import encode_units
from text.rows import prepare_rows
from text.show import show_dataset
from text.split import Survey, alphabet_of, survey_corpus, train_tokenizer, work_units
from text.tokenizer import Tokenizer, gpt2_spec, load_tokenizer

# The values that these settings may have.
LIMITS = {"val_fraction": "> 0, < 1", "shard_tokens": f">= 1, < {2**31}", "max_tokens": ">= 0",
          "workers": ">= 0, <= 1024", "bpe_characters": ">= 1",
          "bad_text": ("stop", "skip", "replace"), "format": ("text", "chat", "preference"),
          "block_size": ">= 2"}
FILTER_KEYS = ("filters", "url_blocklist", "language", "language_score", "dedup")
SMALL_CORPUS = 32_000_000  # bytes of files, which one process prepares as fast as several
SAVE_INTERVAL = 10  # seconds from one save of the progress to the next


def main(
    dataset="stdlib",  # stdlib, shakespeare[_char], fineweb[_edu], openwebtext, or --input's name
    input="",  # your own text: a file, a folder or a 'glob'; all but .jsonl .csv .parquet is text
    val_input="",  # the text for validation, where that is not to be a share of the input
    suffixes=".txt .md .rst .py .jsonl .csv .parquet",  # which files of a folder; also .gz, .zst
    format="text",  # text, chat (conversations) or preference (pairs of answers): docs/prepare.md
    text_column="text",  # the field of .jsonl, .csv and .parquet files that holds the text
    bad_text="stop",  # a document that is not UTF-8: stop, skip it, or replace its bad bytes
    overwrite=False,  # replace a dataset that has other text or other settings
    workers=0,  # processes that filter and tokenize; 0: one per core, or one for small texts
    show=0,  # print this many random documents of a prepared dataset, and prepare nothing
    # tokens
    tokenizer="",  # bytes, chars, words, gpt2, bpe (trained here), a tokenizer.json or its folder
    block_size=128,  # chat, preference: tokens per row; training needs the same --block_size
    vocab_size=4096,  # bpe, words: number of tokens, with the 256 bytes and end-of-text, or <unk>
    split_pattern="gpt2",  # bpe: the pattern that splits text into words, gpt2 or gpt4
    bpe_characters=100_000_000,  # bpe: train on this much of the training text, spread evenly
    val_fraction=0.1,  # share of the text for validation; of datasets on the hub, the first file
    shard_tokens=100_000_000,  # maximum number of tokens per file
    max_tokens=0,  # stop when the training split has this many tokens; 0: no limit
    ready_made=False,  # fineweb, fineweb_edu: download GPT-2 tokens that others have prepared
    # documents to remove
    filters="",  # any of: gopher repetition c4 fineweb pii (documents/rules.py describes them)
    url_blocklist="",  # a file of domains; documents whose column url is in one are removed
    language="",  # keep only this language, such as en: by the column language, or by py3langid
    language_score=0.65,  # and only documents whose language is at least this certain
    dedup="",  # remove copies: exact, or near (MinHash)
):
    # Only look at a dataset, or download one.
    if dataset == "stdlib" and format == "chat":
        dataset = "stdlib_chat"
    folder = dataset_folder(dataset)
    if show:
        return show_dataset(dataset, load_tokenizer(dataset), show, use_colour(sys.stdout))
    if ready_made:
        with preparation.lock_dataset(folder):
            return download_ready_made(dataset, folder, max_tokens, overwrite)

    # Find mistakes in the settings before anything is read or written.
    from_hub = dataset in ON_THE_HUB and not input
    if not tokenizer:
        tokenizer = "gpt2" if from_hub else BUILT_IN.get(dataset, "bytes")
    tokenizer = tokenizer_file(tokenizer)
    settings = SimpleNamespace(**locals())
    filter_settings = {key: getattr(settings, key) for key in FILTER_KEYS}
    check_settings(vars(settings), LIMITS)
    if val_input and (from_hub or format != "text"):
        raise UserError(f"val_input={val_input!r}: goes with text of your own; without it, a share "
                        "of the text is held out")
    if format != "text":
        with preparation.lock_dataset(folder):
            return prepare_rows(folder, settings)
    filter_rules.check_filter_settings(filter_settings)
    spec = known_spec(settings)

    with preparation.lock_dataset(folder):
        # Find the text. Has it been prepared already?
        columns = filter_rules.needed_columns(filter_settings)
        if from_hub:
            corpus = Hub(dataset, text_column, columns)
        else:
            paths = find_files(dataset, input, folder, suffixes)
            val_paths = search_input(val_input, suffixes) if val_input else ()
            corpus = Files(paths, text_column, bad_text, columns, val_paths)
        recipe = recipe_of(settings, spec, corpus.fingerprint())
        if preparation.is_prepared(folder, recipe, overwrite):
            print(f"{folder}: already prepared, nothing to do")
            return

        # Continue a preparation that was stopped, or plan a new one.
        if from_hub:
            corpus.connect()
        if not workers:
            workers = choose_workers(corpus)
        unfinished = preparation.find_unfinished(folder, recipe, overwrite)
        if unfinished is None:
            plan = make_plan(folder, corpus, recipe, spec, settings, filter_settings, workers)
        else:
            plan = plan_of(unfinished)
        write_dataset(folder, corpus, plan, filter_settings, workers)


# ---------------------------------------------------------------------- settings


def known_spec(settings):
    """Return what is known of the tokenizer's spec before the text is read; None for bpe and words.

    Raises UserError for a tokenizer that does not exist or does not fit the dataset.
    """
    name = settings.tokenizer
    if name == "bpe":
        check_bpe(settings.vocab_size, settings.split_pattern)
        return None
    if name.endswith(".json"):
        return read_spec(name)
    if name in ("chars", "words") and settings.from_hub:
        raise UserError(f"tokenizer={name!r} must read all of the text to know them, and a dataset "
                        "on the hub is read once; choose bytes, gpt2 or bpe")
    if name == "words":
        return None
    if name not in ("bytes", "chars", "gpt2"):
        raise UserError(f"tokenizer={name!r}: choose bytes, chars, words, gpt2, bpe or the path of "
                        "a tokenizer.json")
    return {"kind": name}


def recipe_of(settings, spec, fingerprint):
    """Return all that the prepared files depend on: the settings, and which text it is.

    It becomes "source" in meta.json, the record of how the dataset was made, and a dataset whose
    recipe is equal is not prepared again. Settings that are off are left out.
    """
    # The tokenizer. One from a file is the same under any path.
    recipe = {"tokenizer": settings.tokenizer}
    if settings.tokenizer == "words":
        recipe["vocab_size"] = settings.vocab_size
    elif settings.tokenizer == "bpe":
        for key in ("vocab_size", "split_pattern", "bpe_characters"):
            recipe[key] = getattr(settings, key)
    elif settings.tokenizer.endswith(".json"):
        digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        recipe = {"tokenizer": "tokenizer.json", "tokenizer_sha256": digest}

    # The text, and how it is read and split.
    for key in ("text_column", "bad_text", "val_fraction", "shard_tokens"):
        recipe[key] = getattr(settings, key)
    if settings.val_input:
        recipe["val_input"] = Path(settings.val_input).name  # its files are among "files"
    recipe["files"] = fingerprint

    # Which documents are left out, and where it ends.
    for key in (*FILTER_KEYS, "max_tokens"):
        if getattr(settings, key):
            recipe[key] = getattr(settings, key)
    if not settings.language:
        recipe.pop("language_score", None)
    if settings.url_blocklist:
        recipe["url_blocklist"] = hash_file(settings.url_blocklist)
    return recipe


def choose_workers(corpus):
    """Return 1 for a small corpus, else how many processor cores this process may use."""
    if isinstance(corpus, Files) and sum(corpus.sizes) < SMALL_CORPUS:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------- the plan


class Plan(NamedTuple):
    """How to prepare a dataset, from the start or from where it was stopped."""

    recipe: dict
    survey: Survey
    progress: dict  # what `save_progress` saved last; {} at the start


def plan_of(unfinished):
    """Return the Plan of a stopped preparation, which `save_progress` wrote."""
    facts = unfinished["facts"]
    survey = Survey(facts["documents"], facts.get("characters", 0), facts["by"])
    return Plan(unfinished["source"], survey, unfinished["state"])


def make_plan(folder, corpus, recipe, spec, settings, filter_settings, workers):
    """Read as much of the text as its split and its tokenizer depend on; then clear the folder,
    write tokenizer.json and return the Plan."""
    # GPT-2's tokenizer may have to be downloaded: do it before the text is read.
    if settings.tokenizer == "gpt2":
        spec = gpt2_spec()

    # Text on the hub is not read ahead: the first token file is for validation.
    if settings.from_hub:
        survey = Survey(documents=2, characters=0, split_by="first file")
    else:
        survey = survey_corpus(corpus, settings.val_fraction, settings.tokenizer,
                               Progress("reading", corpus.share_done).show)
    check_survey(survey, corpus, settings)

    # Make the tokenizers that depend on the text.
    if settings.tokenizer == "chars":
        spec |= {"alphabet": alphabet_of(survey, settings.filters),
                 "documents": survey.documents > 1}
    elif settings.tokenizer in ("bpe", "words"):
        spec = train_tokenizer(corpus, survey, recipe, filter_settings, workers)
    preparation.clear_dataset(folder)
    Tokenizer(spec).save(folder)
    return Plan(recipe, survey, progress={})


def check_survey(survey, corpus, settings):
    """Raise UserError if there is no text, or if filters would choose among a single document."""
    name = settings.input or settings.dataset
    if not survey.documents:
        raise UserError(f"{name}: there is no text in its {len(corpus.paths)} file(s)")
    choosing = [key for key in FILTER_KEYS if getattr(settings, key) and key != "language_score"]
    # pii only changes documents, so it may be used on a single one.
    if settings.filters == "pii":
        choosing.remove("filters")
    if survey.documents < 2 and choosing:
        raise UserError(f"{name}: a single text, and --{choosing[0]} chooses among documents; "
                        "give a folder or a .jsonl")


# ---------------------------------------------------------------------- writing


def write_dataset(folder, corpus, plan, filter_settings, workers):
    """Filter and tokenize the text into the files of both splits, then write meta.json."""
    recipe, survey, progress = plan
    tokenizer = Tokenizer.load(folder)
    limits = {"train": recipe.get("max_tokens", preparation.NO_LIMIT), "val": preparation.NO_LIMIT}
    if survey.split_by == "first file":
        limits["val"] = recipe["shard_tokens"]
    # When the split is by position, the text for validation comes after all of the training text.
    stop_when_full = survey.split_by != "position"

    with ExitStack() as stack:
        # Open the files and the text at the point where a stopped preparation left them.
        writers = stack.enter_context(
            preparation.SplitWriters(folder, tokenizer, recipe["shard_tokens"], limits, progress))
        removals = dedup.RemovalLog(folder, filter_settings, progress.get("removed"))
        stack.callback(removals.close)
        position, document_removed = progress.get("place"), progress.get("dropped", False)
        if progress:
            print(f"{folder}: going on after {removals.read:,} documents and "
                  f"{writers.tokens:,} tokens")
        units = work_units(corpus, survey, recipe["val_fraction"], position)
        encoded_units = encode_units(units, tokenizer.spec, filter_settings, workers)
        stack.callback(encoded_units.close)
        progress_line = Progress("tokenizing", partial(share_done, corpus, writers), writers.tokens)
        saved_at, saved_shards = time.monotonic(), writers.finished_shards

        for unit, encoded_pieces in encoded_units:
            if stop_when_full and writers.is_full("train"):
                break

            # Write the documents that are not removed. A long one may go on in the next unit.
            for piece, encoded in zip(unit.pieces, encoded_pieces, strict=True):
                if piece.starts_document:
                    document_removed = removals.add(
                        piece.text, piece.columns, encoded.removed_because, encoded.dedup_keys)
                if not document_removed:
                    writers.put(piece.split, piece.starts_document, encoded.ids, encoded.byte_count)
            position = unit.position

            # Save the progress after each finished file, and every few seconds.
            overdue = time.monotonic() - saved_at > SAVE_INTERVAL
            if overdue or writers.finished_shards > saved_shards:
                save_progress(folder, plan, writers, removals, position, document_removed)
                saved_at, saved_shards = time.monotonic(), writers.finished_shards
            progress_line.show(removals.read, writers.tokens)

        splits = writers.finish()
        refuse_empty_split(folder, splits, removals)
        save_progress(folder, plan, writers, removals, position, document_removed)
    write_meta(folder, plan, tokenizer, splits, removals)


def share_done(corpus, writers):
    """Return the share of the work that is done: of the text, or of the tokens asked for."""
    return max(corpus.share_done(), writers.tokens / writers.limits["train"])


def save_progress(folder, plan, writers, removals, position, document_removed):
    """Save from where another process can go on; then publish the files that are finished."""
    survey = plan.survey
    facts = {"documents": survey.documents, "characters": survey.characters, "by": survey.split_by}
    state = {**writers.state(), "removed": removals.state(), "place": position,
             "dropped": document_removed}
    preparation.save_unfinished(folder, {"source": plan.recipe, "facts": facts, "state": state})
    writers.publish()


def refuse_empty_split(folder, splits, removals):
    """Raise UserError where a split has no tokens, and leave nothing of the dataset behind."""
    empty = [split for split, info in splits.items() if not info["tokens"]]
    if not empty:
        return
    preparation.clear_dataset(folder)
    (folder / "UNFINISHED").unlink()

    # Name the most common reason, for it is the filter to look at.
    counts = f"{removals.read:,} documents, {removals.counts.total():,} removed"
    if removals.counts:
        reason, _ = removals.counts.most_common(1)[0]
        counts += f", most for {reason!r}"
    raise UserError(f"{folder}: no tokens are left for the {empty[0]} split ({counts}); filter "
                    "less, give more text, a larger --max_tokens or a smaller --shard_tokens")


def write_meta(folder, plan, tokenizer, splits, removals):
    """Write meta.json, which finishes the dataset, and print what is in it."""
    meta = {"dataset": folder.name, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "splits": splits, "source": plan.recipe}
    # Add and print what was removed, and how a vocabulary that was trained here compares.
    if removals.samples:
        meta["removed"] = {"documents_read": removals.read, **removals.counts}
        report_removals(removals, folder)
    if tokenizer.kind == "bpe":
        meta["compared"] = compare_with_gpt2(folder / splits["val"]["shards"][0]["file"], tokenizer)
    preparation.finish_dataset(folder, meta)

    # Print the sizes.
    for split, info in splits.items():
        line = f"{split}: {info['tokens']:,} tokens of {info['bytes'] / info['tokens']:.2f} bytes"
        if plan.survey.documents > 1:
            line += f", {info['documents']:,} documents"
        print(f"{line}, {len(info['shards'])} file(s)")
    print(f"{folder}: done; tokenizer {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")


def report_removals(removals, folder):
    total, share = removals.counts.total(), removals.counts.total() / max(1, removals.read)
    print(f"removed {total:,} of {removals.read:,} documents ({share:.1%}), samples in "
          f"{folder / 'removed.jsonl'}:")
    for reason, count in removals.counts.most_common():
        print(f"  {count:>9,}  {reason}")


if __name__ == "__main__":
    run(main)
