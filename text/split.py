"""Which text is for training and which for validation; a tokenizer trained on the training text.

A corpus is split in one of four ways:

    "document"    each document by a hash of its first piece: the usual way
    "position"    the last part of the text is for validation: a single text, or a few documents
    "file"        the files for validation are given apart, with --val_input
    "first file"  the first token file is for validation: a dataset on the hub, read only once
"""

import hashlib
from typing import NamedTuple

from documents.corpus import cut
from documents.rules import EMAILS, IPS
from text.bpe import train_bpe
from text.encode import Piece, WorkUnit, encode_units
from text.tokenizer import Tokenizer
from text.words import words_spec

# Characters of text in a work unit, at least.
UNIT_CHARACTERS = 1 << 20
# A survey may end early after so many characters and documents.
ENOUGH_CHARACTERS, ENOUGH_DOCUMENTS = 1 << 28, 1000
# Characters in each of the texts on which a tokenizer is trained, at most.
SAMPLE_CHARACTERS = 1 << 14


class Survey(NamedTuple):
    """What must be known of a corpus before it is split."""

    # 0: there is no text. Those of files for validation alone are not among them. A dataset on the
    # hub is not counted; for it they are 2 and 0.
    documents: int
    characters: int
    # "document", "position", "file" or "first file".
    split_by: str
    # All characters in order, where the tokenizer is chars.
    alphabet: str = ""


def survey_corpus(corpus, val_fraction, tokenizer_name, show_progress):
    """Read a corpus and return its Survey.

    The split is by document if that holds out between half and twice val_fraction of the text. The
    survey ends early once enough text says so, unless the tokenizer needs to know all of it.
    """
    needs_all = tokenizer_name in ("chars", "bpe")
    start = corpus.position
    documents = characters = val_characters = 0
    is_val = splits_well = False
    alphabet = set()
    for starts_document, text, _ in corpus:
        # Count the piece.
        documents += starts_document and not corpus.in_validation
        characters += len(text)
        if tokenizer_name == "chars":
            alphabet.update(text)

        # How much would be for validation if the split were by document?
        if starts_document:
            is_val = is_held_out(text, val_fraction)
        if is_val:
            val_characters += len(text)
        share = val_characters / characters
        splits_well = 0.5 * val_fraction < share < min(1, 2 * val_fraction)

        # Is that enough to know?
        if (splits_well and not needs_all and characters > ENOUGH_CHARACTERS
                and documents > ENOUGH_DOCUMENTS):
            break
        show_progress()
    corpus.position = start

    # Each split needs a character at least.
    if characters < 2:
        return Survey(0, characters, "position")
    split_by = "document" if splits_well else "position"
    if corpus.train_paths != corpus.paths:
        split_by = "file"
    return Survey(documents, characters, split_by, "".join(sorted(alphabet)))


def is_held_out(text, val_fraction):
    """Return whether the document that begins with `text` is for validation.

    It depends on nothing but the text, so exact copies are in the same split, and documents that
    are added to a corpus move none of the others.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def work_units(corpus, survey, val_fraction, position=None):
    """Yield the corpus as WorkUnits, from a WorkUnit's `position` on (None: from the start).

    A single text is no document among others: none of its pieces starts a document.
    """
    # Go to the position, and find where a split by position is.
    if position is None:
        position = {"characters": 0, "split": "train"}
    else:
        corpus.position = position["text"]
    characters, split = position["characters"], position["split"]
    train_characters = max(1, int(survey.characters * (1 - val_fraction)))
    train_characters = min(train_characters, survey.characters - 1)

    pieces, size = [], 0
    for starts_document, text, columns in corpus:
        starts_document = starts_document and survey.documents > 1
        if survey.split_by == "position":
            # The piece at the boundary is cut in two.
            train_size = max(0, train_characters - characters)
            train_text, val_text = text[:train_size], text[train_size:]
            if train_text:
                pieces.append(Piece("train", starts_document, train_text, columns))
            if val_text:
                starts_val = starts_document and not train_text
                pieces.append(Piece("val", starts_val, val_text, columns))
        elif survey.split_by == "document":
            if starts_document:
                split = "val" if is_held_out(text, val_fraction) else "train"
            pieces.append(Piece(split, starts_document, text, columns))
        elif survey.split_by == "file":
            split = "val" if corpus.in_validation else "train"
            pieces.append(Piece(split, starts_document, text, columns))
        else:
            pieces.append(Piece("", starts_document, text, columns))
        characters += len(text)
        size += len(text)

        # A unit ends where another process could go on.
        if size >= UNIT_CHARACTERS and corpus.at_boundary:
            position = {"characters": characters, "split": split, "text": corpus.position}
            yield WorkUnit(pieces, position)
            pieces, size = [], 0
    position = {"characters": characters, "split": split, "text": corpus.position}
    yield WorkUnit(pieces, position)


# ---------------------------------------------------------------------- a tokenizer of its own


def alphabet_of(survey, filters):
    """Return all characters of the filtered text, in order."""
    characters = set(survey.alphabet)
    # c4 writes line breaks between the lines that it keeps, and pii its own addresses.
    if "c4" in filters.split():
        characters.add("\n")
    if "pii" in filters.split():
        characters.update(*EMAILS, *IPS)
    return "".join(sorted(characters))


def train_tokenizer(corpus, survey, recipe, filter_settings, workers):
    """Train a byte-pair encoding, or find the most common words, on the training text that the
    filters keep; return the tokenizer's spec.

    recipe: has tokenizer, vocab_size, val_fraction, shard_tokens; for bpe split_pattern and
    bpe_characters.
    """
    start = corpus.position
    skip = 0
    if survey.split_by == "first file":
        # How much text fills the validation file is known only after training. Skip more than
        # that: on average a token has fewer than 6 characters.
        skip = 6 * recipe["shard_tokens"]
    # Without filters, reading is most of the work, and one process does it.
    if not filter_settings["filters"]:
        workers = 1

    # Filter the text as it will be filtered; train a byte-pair encoding on a sample of it.
    units = work_units(corpus, survey, recipe["val_fraction"])
    texts = kept_training_texts(encode_units(units, None, filter_settings, workers))
    if recipe["tokenizer"] == "words":
        spec = words_spec(texts, recipe["vocab_size"])
        corpus.position = start
        return spec
    texts = spread_sample(texts, survey.characters, recipe["bpe_characters"], skip)
    spec = train_bpe(texts, recipe["vocab_size"], recipe["split_pattern"])
    corpus.position = start

    # A small text may not have enough pairs of tokens that occur twice.
    vocab_size = Tokenizer(spec).vocab_size
    if vocab_size < recipe["vocab_size"]:
        print(f"bpe: no more pairs occur twice in the text, so the vocabulary is {vocab_size:,} "
              f"and not {recipe['vocab_size']:,}")
    return spec


def kept_training_texts(encoded_units):
    """Yield the texts for training of what `encode_units` yields, without removed documents."""
    document_removed = False
    for unit, encoded_pieces in encoded_units:
        for piece, encoded in zip(unit.pieces, encoded_pieces, strict=True):
            if piece.starts_document:
                document_removed = encoded.removed_because != ""
            if not document_removed and piece.split != "val":
                yield encoded.ids


def spread_sample(texts, characters, limit, skip=0):
    """Yield at most `limit` characters of some texts, in short pieces spread evenly over them.

    characters: about how many there are; 0: unknown, and the first ones after `skip` are taken.
    """
    size = max(64, min(SAMPLE_CHARACTERS, limit // 64))
    share = 1
    if characters:
        share = min(1, limit / characters)
    seen = taken = 0
    for text in texts:
        for piece in cut(text, size):
            seen += len(piece)
            if seen > skip and taken + len(piece) <= min(limit, share * seen):
                taken += len(piece)
                yield piece
        if not characters and taken + SAMPLE_CHARACTERS > limit:
            return
