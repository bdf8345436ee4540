"""Find copies of documents, exact and near ones, and log which documents are removed and why.

A document becomes a few 64-bit keys. Two documents that share a key are copies, and the first one
that is read is kept. (filter.py finds copies by datatrove's stages, with the same sizes.)
"""

import json
import os
import re
import unicodedata
from collections import Counter
from hashlib import blake2b

import numpy as np

WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
# A letter of a script that is written without blanks: Thai, Lao, Burmese, Khmer, kana, Chinese
SPACELESS = re.compile("(?!\\W)[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
                       "\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
ACCENT = re.compile("[\u0300-\u036f]+")
# Near copies share a band of their MinHash signature. With these sizes two documents that have 72%
# of their shingles in common do so with probability 0.5.
SHINGLE, BANDS, BAND_HASHES = 5, 14, 8  # words, bands of a signature, hashes of a band
# How many keys may wait in a KeySet to be sorted in, beside an eighth of those that are
RECENT_KEYS = 1 << 16


def hash64(data):
    """Return 64 bits of BLAKE2b of bytes or of a text, which may hold lone surrogates."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def key_function(filter_settings):
    """Return the function from a text to its keys, or None where copies are kept."""
    return {"": None, "exact": exact_keys, "near": near_keys}[filter_settings["dedup"]]


def exact_keys(text):
    """Return one key, uint64 (1,): the hash of the text, with one space for each run of blanks."""
    return np.array([hash64(" ".join(text.split()))], np.uint64)


def text_of(document) -> str:
    """Return what filter.py compares of one of datatrove's documents for exact copies."""
    return " ".join(document.text.split())


def near_keys(text):
    """Return one key per band of the text's MinHash, uint64 (14,).

    Source: Broder 1997; FineWeb (arXiv 2406.17557, deduplication): 5-grams of words, 112 hashes in
    14 bands of 8.
    """
    from rensa import RMinHash

    # Make spellings alike: small letters, no accents, every number 0.
    text = NUMBER.sub("0", text.lower())
    if not text.isascii():
        text = ACCENT.sub("", unicodedata.normalize("NFD", text))
        text = separate_letters(text)

    # Cut the words into overlapping shingles; a text shorter than one is a shingle as a whole.
    words = WORD.findall(text)
    last_start = max(0, len(words) - SHINGLE)
    shingles = [" ".join(words[i:i + SHINGLE]) for i in range(last_start + 1)]

    # Hash the shingles, and make each band of the signature one key.
    minhash = RMinHash(num_perm=BANDS * BAND_HASHES, seed=1)
    minhash.update(shingles)
    bands = np.array(minhash.digest(), "<u4").reshape(BANDS, BAND_HASHES)
    return np.array([hash64(bytes([i]) + bands[i].tobytes()) for i in range(BANDS)], np.uint64)


def separate_letters(text):
    """Return the text with blanks around each letter of a script without blanks, where a shingle
    would else be five whole sentences."""
    return SPACELESS.sub(r" \g<0> ", text)


def split_words(text):
    """Return what filter.py takes for the words of a text that datatrove has simplified."""
    return separate_letters(text).split()


def contains_any(sorted_keys, keys):
    """Return whether a sorted array has one of the keys: some of its numbers are equal to it."""
    first_not_below = np.searchsorted(sorted_keys, keys, "left")
    first_above = np.searchsorted(sorted_keys, keys, "right")
    return bool((first_not_below < first_above).any())


class KeySet:
    """A set of 64-bit keys: a sorted array of 8 bytes per key, and a Python set of recent ones.

    About 20 bytes per key at most, also while they are merged: 20 MB per million documents for
    exact copies (one key each), 0.3 GB for near ones (14 keys).
    """

    def __init__(self, keys):
        self.sorted_keys, self.recent = np.sort(keys), set()

    def add(self, keys):
        """Return True if one of the keys is there already; else add them all and return False."""
        # Look for the keys in both parts of the set.
        values = keys.tolist()
        if not self.recent.isdisjoint(values) or contains_any(self.sorted_keys, keys):
            return True
        self.recent.update(values)

        # Now and then merge the recent keys into the array. numpy's stable sort needs about one
        # pass over keys of which most are in order.
        if len(self.recent) > RECENT_KEYS + len(self.sorted_keys) // 8:
            recent = np.sort(np.fromiter(self.recent, np.uint64))
            self.recent.clear()
            self.sorted_keys = np.concatenate([self.sorted_keys, recent])
            self.sorted_keys.sort(kind="stable")
        return False


class RemovalLog:
    """Which documents are removed and why: counts, and samples in removed.jsonl.

    For deduplication it also keeps the keys of the documents that stay, in memory and in seen.tmp,
    so that another process can go on from a `state`.
    """

    def __init__(self, folder, filter_settings, state=None):
        if state is None:
            state = {"read": 0, "counts": {}, "samples": 0, "keys": 0}
        self.read = state["read"]  # documents
        self.counts = Counter(state["counts"])  # of the removed ones by reason
        self.dedup = filter_settings["dedup"]

        # Open only the files that these settings need.
        self.samples = self.key_file = None
        if any(filter_settings[key] for key in ("filters", "url_blocklist", "language", "dedup")):
            self.samples = open_at(folder / "removed.jsonl", state["samples"])
        if self.dedup:
            self.key_file = open_at(folder / "seen.tmp", state["keys"])
            self.kept_keys = KeySet(np.fromfile(folder / "seen.tmp", np.uint64))

    def add(self, text, row, reason, keys):
        """Count a document and return whether it is removed: for `reason`, or as a copy."""
        # The first of several copies stays; its keys are kept.
        self.read += 1
        if keys is not None:
            if self.kept_keys.add(keys):
                reason = f"dedup: {self.dedup} copy"
            else:
                self.key_file.write(keys.tobytes())
        if not reason:
            return False

        # Keep a sample of the first ten of each reason, then of the 16th, 32nd, 64th and so on.
        self.counts[reason] += 1
        number = self.counts[reason]
        if number <= 10 or number.bit_count() == 1:
            sample = {"reason": reason, "number": number, **row, "text": text[:5000]}
            line = json.dumps(sample, ensure_ascii=False) + "\n"
            self.samples.write(line.encode("utf-8", "replace"))
        return True

    def state(self):
        """Wait until the files are on the disk; return from where another process can go on."""
        return {"read": self.read, "counts": self.counts,
                "samples": flushed_size(self.samples), "keys": flushed_size(self.key_file)}

    def close(self):
        for file in (self.samples, self.key_file):
            if file is not None:
                file.close()


def open_at(path, size):
    """Open a file to append to its first `size` bytes; drop what a stopped process wrote later."""
    file = open(path, "ab")
    file.truncate(size)
    # In this mode writing goes to the end in any case, but `tell` counts from here.
    file.seek(size)
    return file


def flushed_size(file):
    """Return the size of an open file once all of it is on the disk; 0 for None."""
    if file is None:
        return 0
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
