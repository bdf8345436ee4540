"""dedup.py: copies are found and different texts are not; the set of keys beside Python's own."""

import hashlib
import random

import numpy as np
import pytest

from documents import dedup
from documents.dedup import KeySet, exact_keys, near_keys

EMPTY = np.array([], np.uint64)


# ---------------------------------------------------------------------- copies


def test_exact_keys():
    keys = exact_keys("Some  text,\n twice ")
    assert keys.dtype == np.uint64 and keys.shape == (1,)
    assert keys == exact_keys("Some text, twice") != exact_keys("some text, twice")
    assert exact_keys("\ud800").shape == (1,)  # what JSON can hold and UTF-8 cannot


def test_near_keys():
    pytest.importorskip("rensa")
    prose = "the cat and 12 dogs sat on mats of straw"
    for text in (prose, "two words", "\ud800 x", "", "\u6f22\u5b57\u304b\u306a"):
        keys = near_keys(text)
        assert keys.dtype == np.uint64 and keys.shape == (14,) and len(set(keys.tolist())) == 14
    same = "The caf\u00e9 sold 1,250 cups; it's true, nobody doubted that."
    assert (near_keys(same) == near_keys("the CAFE sold 7 cups -- it's true nobody doubted that")
            ).all()
    assert not set(near_keys("two words").tolist()) & set(near_keys("two other").tolist())
    known = near_keys("the cat sat on the mat")  # files of keys outlive a version of rensa
    assert known[[0, 13]].tolist() == [8382431759969802507, 12571524215496067138]


def edited(text, share, rng):
    """The text with that share of its words replaced."""
    return " ".join("changed" if rng.random() < share else word for word in text.split())


def test_near_copies_are_found_and_others_not(web):
    pytest.importorskip("rensa")
    texts = [text for text in web if len(text.split()) >= 100]
    rng, seen = random.Random(2), KeySet(EMPTY)
    assert len(texts) > 200 and not any(seen.add(near_keys(text)) for text in texts)
    assert all(seen.add(near_keys(text.upper())) for text in texts)
    found = {share: np.mean([seen.add(near_keys(edited(text, share, rng))) for text in texts])
             for share in (0.01, 0.3)}
    assert found[0.01] > 0.97 and found[0.3] < 0.02  # 0.9 and 0.1 of the 5-grams are the same


def test_the_keys_of_english_stay_as_they_are(web):
    """Files of keys outlive this code: those of a preparation that goes on are read again."""
    pytest.importorskip("rensa")
    keys = b"".join(near_keys(text).tobytes() for text in web)
    assert hashlib.sha256(keys).hexdigest() == (
        "1654618884c25ed3c5efa241ccb2d452c910750b08f0b6d372cbb1e03d90ca46")


SPACELESS = {  # letters or syllables, of which texts without blanks are made
    "Chinese": [chr(i) for i in range(0x4e00, 0x5a00)],
    "Japanese": [chr(i) for i in (*range(0x3041, 0x3097), *range(0x4e00, 0x5200))],
    "Thai": [a + b for a in map(chr, range(0xe01, 0xe2f)) for b in ("", "\u0e32", "\u0e34\u0e48")]}


@pytest.mark.parametrize("script", SPACELESS)
def test_near_copies_in_scripts_without_blanks(script):
    pytest.importorskip("rensa")
    seen = KeySet(EMPTY)
    for text, copy in text_and_copy(SPACELESS[script], 50):
        assert not seen.add(near_keys(text)) and seen.add(near_keys(copy))


def text_and_copy(letters, count):
    """Yield random texts of these letters, each with a copy of which one in a hundred is changed"""
    rng = random.Random(4)
    for _ in range(count):
        text = "\u3002".join("".join(rng.choices(letters, k=40)) for _ in range(30))
        yield text, "".join(rng.choice(letters) if rng.random() < 0.01 else c for c in text)


# ---------------------------------------------------------------------- the set of keys


@pytest.mark.parametrize("width", [1, 14])
def test_key_set_is_a_set(width, monkeypatch):
    monkeypatch.setattr(dedup, "RECENT_KEYS", 100)  # so that they are merged some times
    rng, keys, reference = np.random.default_rng(width), KeySet(EMPTY), set()
    pool = rng.integers(1, 2**64, 20_000, dtype=np.uint64, endpoint=False)
    extremes = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    pool = np.concatenate([pool, np.arange(500, dtype=np.uint64), extremes])
    for _ in range(30_000 // width):
        document = rng.choice(pool, width)
        known = not reference.isdisjoint(document.tolist())
        assert keys.add(document) == known
        if not known:
            reference.update(document.tolist())
    assert len(keys.sorted_keys) > 500
    assert sorted([*keys.sorted_keys.tolist(), *keys.recent]) == sorted(reference)


def test_a_key_set_goes_on_from_the_keys_of_a_file():
    rng = np.random.default_rng(3)
    documents = rng.integers(0, 2**64, (7_001, 3), dtype=np.uint64)
    keys = KeySet(documents.reshape(-1))
    assert all(keys.add(document) for document in documents[::50])
    others = rng.integers(0, 2**64, (1000, 3), dtype=np.uint64)
    assert not any(keys.add(document) for document in others)
    assert all(keys.add(document[1:2]) for document in others)
    assert KeySet(EMPTY).add(np.zeros(1, np.uint64)) is False
