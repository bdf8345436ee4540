"""Exact and near copies of documents."""

import json
import os
import re
import unicodedata
from collections import Counter
from hashlib import blake2b

import numpy as np

WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
ACCENT = re.compile("[\u0300-\u036f]+")
SHINGLE, BANDS, BAND_HASHES = 5, 14, 8  # found with probability 0.5 from 72% common shingles on


# ---------------------------------------------------------------------- copies


def hash64(data):
    """Return 64 bits of BLAKE2b of bytes or of a text, whatever JSON can hold."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def key_function(settings):
    """Return the function of a text that gives its keys, or None."""
    return {"": None, "exact": exact_keys, "near": near_keys}[settings["dedup"]]


def exact_keys(text):
    """Return one key, uint64 (1,): BLAKE2b of the text with every run of blanks as one space."""
    return np.array([hash64(" ".join(text.split()))], np.uint64)


def near_keys(text):
    """Return one key per band of a MinHash, uint64 (14,); near copies share one of them.

    Source: Broder 1997; FineWeb (arXiv 2406.17557, deduplication): 5-grams of words, 112 hashes in
    14 bands of 8. Words in small letters, without accents, each number as 0.
    """
    from rensa import RMinHash

    text = NUMBER.sub("0", text.lower())
    if not text.isascii():
        text = ACCENT.sub("", unicodedata.normalize("NFD", text))
    words = WORD.findall(text)
    shingles = map(" ".join, zip(*(words[i:] for i in range(SHINGLE)), strict=False))
    minhash = RMinHash(num_perm=BANDS * BAND_HASHES, seed=1)
    minhash.update(list(shingles) or [" ".join(words)])
    bands = np.array(minhash.digest(), "<u4").reshape(BANDS, BAND_HASHES)
    return np.array([hash64(bytes([i]) + bands[i].tobytes()) for i in range(BANDS)], np.uint64)


class Seen:
    """The keys of the documents kept so far: an open-addressing table that doubles at 60% load.

    13 to 27 bytes per key, half as much again while it grows: at most 27 MB per million documents
    for exact copies and 0.4 GB for near ones. 0 marks a free place; the key 0 counts as 1.
    """

    def __init__(self):
        self.table, self.count = np.zeros(1 << 12, np.uint64), 0

    def add(self, keys):
        """Return True if one of the keys was there before, else add them all and return False."""
        self.reserve(len(keys))
        table, mask, free = self.table, len(self.table) - 1, []
        for key in keys.tolist():
            key, place = key or 1, key & mask
            while found := table.item(place):
                if found == key:
                    return True
                place = (place + 1) & mask
            free.append((key, place))
        for key, place in free:  # an earlier one of them may have taken the place
            while (found := table.item(place)) and found != key:
                place = (place + 1) & mask
            table[place] = key
            self.count += not found
        return False

    def add_many(self, keys, piece=1 << 20):
        """Add an array of keys of any shape, such as a part of a file of them."""
        flat = keys.reshape(-1)
        for i in range(0, len(flat), piece):
            keys = np.sort(np.maximum(flat[i:i + piece], np.uint64(1)))
            keys = keys[np.append(True, keys[1:] != keys[:-1])]
            self.reserve(len(keys))
            mask = np.uint64(len(self.table) - 1)
            places = keys & mask
            while len(keys):
                free = self.table[places] == 0
                self.table[places[free]] = keys[free]  # of several for one place the last stays
                there = self.table[places] == keys
                self.count += int((free & there).sum())
                keys, places = keys[~there], (places[~there] + np.uint64(1)) & mask

    def reserve(self, more):
        size = len(self.table)
        while self.count + more > 0.6 * size:
            size *= 2
        if size > len(self.table):
            old, self.table, self.count = self.table, np.zeros(size, np.uint64), 0
            for i in range(0, len(old), 1 << 20):
                part = old[i:i + (1 << 20)]
                self.add_many(part[part > 0])


class Removed:
    """What was left out and why: counts, samples in removed.jsonl, and the keys of what was kept,
    in seen.tmp, so that another process can go on."""

    def __init__(self, folder, filter_settings, state=None):
        state = state or {"read": 0, "counts": {}, "samples": 0, "keys": 0}
        self.read, self.counts = state["read"], Counter(state["counts"])
        self.seen, self.dedup = Seen(), filter_settings["dedup"]
        self.samples = self.open(folder / "removed.jsonl", state["samples"], any(
            filter_settings[key] for key in ("filters", "url_blocklist", "language", "dedup")))
        self.keys = self.open(folder / "seen.tmp", state["keys"], self.dedup)
        if self.keys:
            self.keys.seek(0)
            while chunk := self.keys.read(1 << 23):
                self.seen.add_many(np.frombuffer(chunk, np.uint64))

    @staticmethod
    def open(path, size, wanted):
        if not wanted:
            return None
        path.touch()
        file = open(path, "rb+")
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, text, row, reason, keys):
        """Count a document; return whether it is left out."""
        self.read += 1
        if keys is not None:
            if self.seen.add(keys):
                reason = f"dedup: {self.dedup} copy"
            else:
                self.keys.write(keys.tobytes())
        if not reason:
            return False
        self.counts[reason] += 1
        count = self.counts[reason]
        if count <= 10 or count & (count - 1) == 0:  # the first ones, then the 16th, 32nd, ...
            sample = {"reason": reason, "number": count, **row, "text": text[:5000]}
            self.samples.write(json.dumps(sample, ensure_ascii=False).encode(
                "utf-8", "replace") + b"\n")
        return True

    def state(self):
        places = [file.flush() or os.fsync(file.fileno()) or file.tell() if file else 0
                  for file in (self.samples, self.keys)]
        return {"read": self.read, "counts": self.counts, "samples": places[0], "keys": places[1]}

    def close(self):
        for file in filter(None, (self.samples, self.keys)):
            file.close()
