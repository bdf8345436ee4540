"""Which text is for training and which for validation."""

import hashlib

from text import corpus
from text.bpe import train_bpe
from text.corpus import cut
from text.encode import encoded
from text.progress import progress
from text.tokenizer import Tokenizer

ENOUGH = 1 << 28  # characters after which the survey may know enough


# ---------------------------------------------------------------------- which text goes where


def survey(text, val_fraction, kind):
    """Read the corpus: {documents, characters, by, alphabet (for chars)}.

    by: how the validation split is made: "document" where `held_out` puts between half and twice
    val_fraction of the text aside; else, as for a single text or a handful of documents,
    "position". It ends early where enough text says "document" and no more is asked.
    """
    facts, alphabet, held, in_val = {"documents": 0, "characters": 0}, set(), 0, False
    start, show = text.place, progress(text, "reading")
    for starts, piece, _ in text:
        facts["documents"] += starts
        facts["characters"] += len(piece)
        if kind == "chars":
            alphabet.update(piece)
        in_val = held_out(piece, val_fraction) if starts else in_val
        held += in_val * len(piece)
        fits = 0.5 * val_fraction < held / facts["characters"] < min(1, 2 * val_fraction)
        if facts["characters"] > ENOUGH and fits and facts["documents"] > 1000 and kind not in (
                "chars", "bpe"):
            break
        show()
    text.place = start
    if facts["characters"] < 2:
        facts["documents"] = 0
    return {**facts, "by": "document" if facts["documents"] and fits else "position",
            "alphabet": "".join(sorted(alphabet))}


def held_out(text, val_fraction):
    """Is the document that begins with `text` for validation? A pure function of its words, so
    that exact copies stay on one side and new documents move none of the old."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def units(text, facts, val_fraction, place=None):
    """Yield ([(split, starts_document, text, row)], place): work for a process, and from where
    another run could go on after it.

    By document, or all before a position for training; split is "" where the first token file is
    for validation. A single text is no document among others: nothing in it starts one.
    """
    unit, size = [], 0
    if place:
        text.place = place["text"]
    place = dict(place or {"characters": 0, "split": "train"})
    characters = facts.get("characters", 0)
    end_of_train = min(max(1, int(characters * (1 - val_fraction))), characters - 1)
    for starts, piece, row in text:
        starts = starts and facts["documents"] > 1
        if facts["by"] == "first file":
            unit.append(("", starts, piece, row))
        elif facts["by"] == "document":
            if starts:
                place["split"] = "val" if held_out(piece, val_fraction) else "train"
            unit.append((place["split"], starts, piece, row))
        else:
            before = max(0, end_of_train - place["characters"])
            if piece[:before]:
                unit.append(("train", starts, piece[:before], row))
            if piece[before:]:
                unit.append(("val", starts and not before, piece[before:], row))
        place["characters"] += len(piece)
        size += len(piece)
        if size >= corpus.PIECE and text.between:
            yield unit, {**place, "text": text.place}
            unit, size = [], 0
    yield unit, {**place, "text": text.place}


def learn(text, facts, source, filter_settings, workers):
    """Return the spec of a byte-pair encoding learned from the training text that is kept."""
    limit, skip = source["bpe_characters"], 0
    start = text.place
    if facts["by"] == "first file":  # the validation text is not known yet, but it is before this
        skip, facts = 6 * source["shard_tokens"], facts | {"characters": 0}

    def kept():
        dropped = False
        for unit, _, results in encoded(units(text, facts, source["val_fraction"]), None, filter_settings,
                                        workers if filter_settings["filters"] else 1):
            for (split, starts, *_), (reason, piece, *_) in zip(unit, results, strict=True):
                dropped = bool(reason) if starts else dropped
                yield "" if dropped else split or "train", starts, piece

    spec = train_bpe(training_text(kept(), facts["characters"], limit, skip),
                     source["vocab_size"], source["split_pattern"])
    text.place = start
    if (found := Tokenizer(spec).vocab_size) < source["vocab_size"]:
        print(f"bpe: no more pairs come twice in that text, so the vocabulary is {found:,} and not "
              f"{source['vocab_size']:,}")
    return spec


def training_text(pieces, characters, limit, skip=0):
    """Yield at most `limit` of the corpus's characters, of its training pieces only, in short
    texts: evenly spread over them, or where their number is not known the first after `skip`."""
    share, seen, taken = min(1, limit / characters) if characters else 1, 0, 0
    for split, _, text in pieces:
        for part in cut(text, max(64, min(2**14, limit // 64))) if split == "train" else []:
            seen += len(part)
            if seen > skip and taken + len(part) <= min(limit, share * seen):
                taken += len(part)
                yield part
        if not characters and taken + 2**14 > limit:
            return
