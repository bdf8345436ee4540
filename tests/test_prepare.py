"""prepare.py: text in, the same text out; splits, sizes, tokenizers, every kind of bad input."""

import csv
import gzip
import hashlib
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from test_corpus import TRICKY, on_hub, packed, write, write_jsonl, write_parquet

import prepare
from configurator import UserError
from documents import corpus, dedup
from formats import preparation, ready_made, shards
from formats.shards import TokenReader
from text import show
from text import split as text_split
from text.tokenizer import Tokenizer

ROOT = Path(prepare.__file__).parent
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"


@pytest.fixture
def quick_gpt2(gpt2, monkeypatch):
    """GPT-2's tokenizer without the second that reading its files takes."""
    monkeypatch.setattr(prepare, "gpt2_spec", lambda: gpt2.spec)
    monkeypatch.setattr("text.bpe.gpt2_spec", lambda: gpt2.spec)


@pytest.fixture
def do(tmp_path):
    """Return a function that prepares files or texts and returns the dataset's folder."""
    def prepared(source, name="data", **settings):
        prepare.main(dataset=f"{tmp_path}/{name}", input=str(source), **settings)
        return tmp_path / name

    return prepared


def make_pieces_small(monkeypatch, characters):
    """Let even short texts have many pieces and work units."""
    monkeypatch.setattr(corpus, "PIECE", characters)
    monkeypatch.setattr(text_split, "UNIT_CHARACTERS", characters)


def ids_of(folder, split):
    reader = TokenReader(f"{folder}", split)
    return reader.rows(np.array([0]), reader.tokens)[0].tolist()


def documents(folder, split):
    """Return the texts of a split, cut at its end-of-text tokens."""
    tokenizer, found = Tokenizer.load(folder), [[]]
    for token in ids_of(folder, split):
        found.append([]) if token == tokenizer.eot else found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found]


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def some_texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(["aß", "bb", "漢字", "dd\n", "e"], k=rng.randint(1, 30)))
            for i in range(count)]


# ---------------------------------------------------------------------- known corpora


needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="../shared/data/tinyshakespeare/input.txt is not there")


@needs_shakespeare
def test_shakespeare_in_characters(do):
    folder = do(SHAKESPEARE, tokenizer="chars")
    text, meta = SHAKESPEARE.read_bytes().decode(), meta_of(folder)
    assert meta["vocab_size"] == 65
    assert [meta["splits"][s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]
    train, val = documents(folder, "train"), documents(folder, "val")
    assert [train, val] == [[text[:1_003_854]], [text[1_003_854:]]]
    # nanoGPT's ids: the place among the sorted characters
    alphabet = sorted(set(text))
    assert ids_of(folder, "val")[:100] == [alphabet.index(c) for c in val[0][:100]]


@needs_shakespeare
def test_shakespeare_in_gpt2_tokens(do, gpt2):
    folder = do(SHAKESPEARE, tokenizer="gpt2")
    meta = meta_of(folder)
    assert meta["vocab_size"] == 50257
    assert [meta["splits"][s]["tokens"] for s in ("train", "val")] == [301_966, 36_059]
    assert "".join(documents(folder, "train") + documents(folder, "val")) == \
        SHAKESPEARE.read_bytes().decode()


def test_the_default_corpus_is_the_standard_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    some = corpus.stdlib_files()[::7]
    monkeypatch.setattr(corpus, "stdlib_files", lambda: some)
    prepare.main()
    folder = tmp_path / "data/stdlib"
    meta = meta_of(folder)
    assert (meta["dataset"], meta["tokenizer"], meta["vocab_size"]) == ("stdlib", "bytes", 257)
    found = sorted(documents(folder, "train")[1:] + documents(folder, "val")[1:])
    assert found == sorted(text for p in some if (text := p.read_bytes().decode("utf-8-sig")))
    total = sum(len(text.encode()) for text in found)
    assert 0.05 < meta["splits"]["val"]["bytes"] / total < 0.2
    assert "data/stdlib: done; tokenizer bytes, vocabulary 257" in capsys.readouterr().out


def test_shakespeare_is_downloaded_once(monkeypatch, tmp_path):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return open(write(tmp_path / "server", "Tö be,\r\nor not." * 7), "rb")

    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        prepare.main(dataset="shakespeare_char")
    folder = tmp_path / "data/shakespeare_char"
    assert asked == [corpus.SHAKESPEARE_URL] and meta_of(folder)["tokenizer"] == "chars"
    assert "".join(documents(folder, "train") + documents(folder, "val")) == "Tö be,\r\nor not." * 7


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"),
                                   http.client.IncompleteRead(b"half")])
def test_offline_says_what_to_do(monkeypatch, tmp_path, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for dataset in ("shakespeare", "shakespeare_char"):
        with pytest.raises(ValueError, match="cannot download https.*add --input=FILE"):
            prepare.main(dataset=dataset)
        assert [*(tmp_path / "data").iterdir()] == []


def test_gpt2_s_tokenizer_offline(monkeypatch, tmp_path, do):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(
        ConnectionError("no route")))
    # It is found out before the text is read.
    monkeypatch.setattr(prepare, "survey_corpus", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*or use --tokenizer=bytes"):
        do(write(tmp_path / "x.txt", "text"), tokenizer="gpt2")


# ---------------------------------------------------------------------- your own text


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.py", "x", "x.log"])
def test_one_text_is_split_by_position(tmp_path, do, name, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("quick_gpt2")
    text = TRICKY * 30
    folder = do(write(tmp_path / name, text), tokenizer=tokenizer)
    train, val = documents(folder, "train"), documents(folder, "val")
    at = int(len(text) * 0.9)
    assert (train, val) == ([text[:at]], [text[at:]])  # and no end-of-text token
    splits = meta_of(folder)["splits"]
    assert [splits[s]["bytes"] for s in ("train", "val")] == [len(text[:at].encode()),
                                                              len(text[at:].encode())]


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_many_documents(tmp_path, do, suffix, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("quick_gpt2")
    texts = some_texts(200)
    writer = write_parquet if suffix == "parquet" else write_jsonl
    folder = do(writer(tmp_path / f"x.{suffix}", texts), tokenizer=tokenizer)
    before_first, *train = documents(folder, "train")
    assert before_first == ""  # each begins with the end-of-text token
    before_first, *val = documents(folder, "val")
    assert before_first == ""
    assert sorted(train + val) == sorted(texts) and 8 < len(val) < 40
    assert train == [text for text in texts if text in set(train)]  # in the corpus's order
    splits = meta_of(folder)["splits"]
    assert [splits[s]["documents"] for s in ("train", "val")] == [len(train), len(val)]
    assert splits["val"]["bytes"] == sum(len(text.encode()) for text in val)


def test_a_folder_and_a_glob(tmp_path, do, monkeypatch):
    texts = some_texts(60)
    for i, text in enumerate(texts[:40]):
        write(tmp_path / f"in/deep/{i:02d}{['.txt', '.md', '.py'][i % 3]}", text)
    write_jsonl(tmp_path / "in/a.jsonl", texts[40:50])
    write_jsonl(tmp_path / "in/z.jsonl.gz", texts[50:])
    for name in ("x.bin", "x.jpg", "x.json", "x.txt.zip"):
        (tmp_path / "in" / name).write_bytes(b"\xff\0")
    whole = do(tmp_path / "in")
    ids = ids_of(whole, "train") + ids_of(whole, "val")
    found = sorted("".join(map(chr, ids)).split(chr(256))[1:])
    assert found == sorted(text.encode().decode("latin-1") for text in texts)
    monkeypatch.chdir(tmp_path)
    for pattern, count in (("in/deep/*.md", 13), ("in/**/*.txt", 14), ("in/../in/d*/*.py", 13),
                           (f"{tmp_path}/in/*/*", 40), ("in/deep/0[0-4].*", 5)):
        some = do(pattern, name=f"glob{count}", overwrite=True)
        splits = meta_of(some)["splits"].values()
        assert sum(info["documents"] for info in splits) == count, pattern
    assert str(corpus.find_files("x", "in/deep/0[01].*", None, "")[0]) == os.path.join(
        "in", "deep", "00.txt")


def test_a_byte_order_mark_is_not_text(tmp_path, do):
    folder = do(write(tmp_path / "x.txt", "\ufeffab"), val_fraction=0.5)
    assert (ids_of(folder, "train"), ids_of(folder, "val")) == ([97], [98])
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "ab"}\n\n  \n')
    folder = do(path, val_fraction=0.5, overwrite=True)
    assert (ids_of(folder, "train"), ids_of(folder, "val")) == ([97], [98])


def test_another_column(tmp_path, do):
    for path in (write_jsonl(tmp_path / "x.jsonl", ["ab", "cd"], "content"),
                 write_parquet(tmp_path / "x.parquet", ["ab", "cd"], "content")):
        folder = do(path, text_column="content", overwrite=True)
        assert "".join(documents(folder, "train") + documents(folder, "val")) == "abcd"


def test_empty_documents_and_odd_characters(tmp_path, do):
    write_jsonl(tmp_path / "x.jsonl", ["", "a\0b", "c\ud800d", "", "ef\u2028g\x1c"])
    folder = do(tmp_path / "x.jsonl")
    text = "\n".join(documents(folder, "train")) + "".join(documents(folder, "val"))
    assert text == "\na\0b\nc?d\nef\u2028g\x1c"  # a lone surrogate is no character
    folder = do(write_parquet(tmp_path / "x.parquet", ["ab", None, "", "cd"]), overwrite=True)
    assert documents(folder, "train") + documents(folder, "val") == ["", "ab", "c", "d"]


# ---------------------------------------------------------------------- splits


def test_exact_copies_are_on_one_side(tmp_path, do):
    texts = some_texts(150) * 4
    random.Random(1).shuffle(texts)
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), val_fraction=0.2)
    train, val = documents(folder, "train")[1:], documents(folder, "val")[1:]
    assert len(train) + len(val) == 600 and not set(train) & set(val)
    assert 0.1 < len(val) / 600 < 0.4


def test_new_documents_move_none_of_the_old(tmp_path, do):
    old = do(write_jsonl(tmp_path / "x.jsonl", some_texts(200)))
    new = do(write_jsonl(tmp_path / "y.jsonl", some_texts(50, seed=3) + some_texts(200)), "new")
    assert set(documents(old, "val")) <= set(documents(new, "val"))
    assert set(documents(old, "train")) <= set(documents(new, "train"))


def test_a_handful_of_documents_is_split_by_position(tmp_path, do):
    texts = ["a" * 70, "b" * 20, "c" * 10]
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), val_fraction=0.25)
    assert documents(folder, "train") == ["", "a" * 70, "b" * 5]
    assert documents(folder, "val") == ["b" * 15, "c" * 10]  # b began in training
    splits = meta_of(folder)["splits"]
    assert [splits[s]["documents"] for s in ("train", "val")] == [2, 1]
    folder = do(tmp_path / "x.jsonl", val_fraction=0.3, overwrite=True)
    assert documents(folder, "train") == ["", "a" * 70]
    assert documents(folder, "val") == ["", "b" * 20, "c" * 10]


@pytest.mark.parametrize("text, val_fraction", [("ab", 0.1), ("ab", 0.9), ("abc", 0.99),
                                                ("a" * 50, 0.001), ("a" * 50, 1e-30)])
def test_neither_split_is_empty(tmp_path, do, text, val_fraction):
    folder = do(write(tmp_path / "x.txt", text), val_fraction=val_fraction)
    train, val = documents(folder, "train"), documents(folder, "val")
    assert train[0] and val[0] and train[0] + val[0] == text


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, do, gpt2, quick_gpt2, monkeypatch):
    make_pieces_small(monkeypatch, 64)
    texts = [TRICKY, "word " * 100, "漢字、かな。" * 50, "a\r\n" * 99, "x = 1\n    y\n" * 40]
    text = "".join(texts[:2] + texts[3:]) * 3
    folder = do(write(tmp_path / "x.txt", text), tokenizer="gpt2", val_fraction=0.2)
    at = int(len(text) * 0.8)
    assert ids_of(folder, "train") == gpt2.encode(text[:at]).tolist()
    assert ids_of(folder, "val") == gpt2.encode(text[at:]).tolist()
    texts = [f"{i} {text}" for i, text in enumerate(texts * 20)]
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), tokenizer="gpt2", overwrite=True)
    found = documents(folder, "train")[1:] + documents(folder, "val")[1:]
    assert sorted(found) == sorted(texts)


# ---------------------------------------------------------------------- again, and interrupted


def test_again_there_is_nothing_to_do(tmp_path, do, capsys):
    path = write(tmp_path / "x.txt", "some text " * 99)
    folder = do(path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    assert set(before) == {"train_000000.bin", "val_000000.bin", "tokenizer.json", "meta.json"}
    capsys.readouterr()
    do(path)
    assert capsys.readouterr().out == f"{folder}: already prepared, nothing to do\n"
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


@pytest.mark.parametrize("change", ["text", "tokenizer", "val_fraction", "shard_tokens", "column"])
def test_a_change_is_refused_or_replaces(tmp_path, do, change):
    folder = do(write_jsonl(tmp_path / "x.jsonl", ["some text", "more"] * 9), shard_tokens=20)
    before, settings = ids_of(folder, "train"), {"shard_tokens": 20}
    if change == "text":
        write_jsonl(tmp_path / "x.jsonl", ["other text", "more"] * 9)
    elif change == "column":
        settings["text_column"] = "id2"
        with gzip.open(tmp_path / "y.jsonl.gz", "wt") as file:
            file.write(json.dumps({"id2": "other " * 20}))
    else:
        settings[change] = {"tokenizer": "chars", "val_fraction": 0.3, "shard_tokens": 50}[change]
    path = tmp_path / ("y.jsonl.gz" if change == "column" else "x.jsonl")
    with pytest.raises(ValueError, match="other text or other settings.*--overwrite=True"):
        do(path, **settings)
    assert ids_of(folder, "train") == before
    do(path, overwrite=True, **settings)
    shards = [shard["file"] for info in meta_of(folder)["splits"].values()
              for shard in info["shards"]]
    assert sorted(p.name for p in folder.glob("*.bin")) == sorted(shards)
    if change == "shard_tokens":
        assert ids_of(folder, "train") == before and len(shards) < 10
    else:
        assert ids_of(folder, "train") != before


def test_a_corpus_that_moved_is_still_the_same(tmp_path, do, capsys):
    path = write(tmp_path / "here/x.txt", "some text " * 9)
    folder = do(path)
    (tmp_path / "there").mkdir()
    os.replace(path, tmp_path / "there/x.txt")
    capsys.readouterr()
    do(tmp_path / "there/x.txt")
    assert capsys.readouterr().out == f"{folder}: already prepared, nothing to do\n"


def test_files_of_others_are_not_replaced_unasked(tmp_path, do):
    """Ready-made shards, nanoGPT's files, and what else lies in the folder that was named."""
    text = write(tmp_path / "x.txt", "some text " * 9)
    names = {"train.bin", "fineweb_train_000001.bin", "model.bin", "train_labels.csv", "x.tmp"}
    for name in names:
        write(tmp_path / "data" / name, "precious")
    with pytest.raises(ValueError, match="--overwrite=True"):
        do(text)
    folder = do(text, overwrite=True)
    assert all((folder / name).read_text() == "precious" for name in names)
    assert documents(folder, "train") == [("some text " * 9)[:81]]
    other = write(tmp_path / "other/meta.json", '{"title": "not ours"}')
    with pytest.raises(ValueError, match="--overwrite=True"):
        do(text, name="other")
    assert other.read_text() == '{"title": "not ours"}'


def test_shards_and_sizes_are_as_meta_json_says(tmp_path, do):
    texts = some_texts(300)
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), shard_tokens=1000)
    one = do(tmp_path / "x.jsonl", name="one")
    meta = meta_of(folder)
    for split, info in meta["splits"].items():
        ids = ids_of(one, split)
        assert ids_of(folder, split) == ids
        assert info["tokens"] == len(ids) == sum(shard["tokens"] for shard in info["shards"])
        assert info["bytes"] == len(ids) - info["documents"] and info["documents"] == ids.count(256)
        assert [shard["tokens"] for shard in info["shards"][:-1]] == [1000] * (
            len(info["shards"]) - 1)
        for shard in info["shards"]:
            raw = (folder / shard["file"]).read_bytes()
            assert len(raw) == 1024 + 2 * shard["tokens"]
            assert hashlib.sha256(raw[1024:]).hexdigest() == shard["sha256"]
        reader = TokenReader(f"{folder}", split)
        assert reader.bytes_per_token == info["bytes"] / info["tokens"]
        starts = np.arange(0, len(ids) - 30, 29)
        assert reader.rows(starts, 30).tolist() == [ids[start:start + 30] for start in starts]
    assert sum(info["documents"] for info in meta["splits"].values()) == 300


def test_a_vocabulary_above_65536_has_uint32_files(tmp_path, do):
    text = "".join(map(chr, range(0x20, 0xd800))) + "".join(map(chr, range(0x10000, 0x15000)))
    folder = do(write(tmp_path / "x.txt", text), tokenizer="chars")
    meta = meta_of(folder)
    assert meta["vocab_size"] == len(text) == 75744
    raw = (folder / "val_000000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240801, 7, 7575]
    assert len(raw) == 1024 + 4 * 7575 and ids_of(folder, "val") == [*range(75744 - 7575, 75744)]
    assert documents(folder, "train") + documents(folder, "val") == [text[:-7575], text[-7575:]]


# ---------------------------------------------------------------------- bad input


def broken(write_it):
    """Return a function that writes a file of 300 documents and damages its bytes."""
    def of(path, change):
        write_it(path, some_texts(300))
        path.write_bytes(change(path.read_bytes()))
        return path

    return of


def test_bad_settings(tmp_path, do):
    path = write(tmp_path / "x.txt", "some text")
    for settings, says in (
            ({"val_fraction": 0.0}, "val_fraction=0.0: must be above 0 and below 1"),
            ({"val_fraction": 1.0}, "val_fraction=1.0: must be above 0 and below 1"),
            ({"val_fraction": -0.5}, "val_fraction=-0.5: must be above"),
            ({"shard_tokens": 0}, "shard_tokens=0: must be at least 1"),
            ({"shard_tokens": 2**31}, "shard_tokens=2147483648: must be at least 1 and below 2147"),
            ({"workers": 100_000}, "workers=100000: must be at least 0 and at most 1024"),
            ({"workers": -1}, "workers=-1: must be at least 0"),
            ({"max_tokens": -7}, "max_tokens=-7: must be at least 0"),
            ({"bad_text": "drop"}, "bad_text='drop': choose 'stop', 'skip', 'replace'"),
            ({"filters": "gofer"}, "unknown name 'gofer'; did you mean 'gopher'?"),
            ({"dedup": "fuzzy"}, "dedup='fuzzy': choose '', 'exact', 'near'"),
            ({"dedup": "exact"}, "a single text, and --dedup chooses among documents"),
            ({"filters": "gopher"}, "a single text, and --filters chooses among documents"),
            ({"tokenizer": "GPT2"}, "tokenizer='GPT2': choose bytes, chars, words, gpt2, bpe or")):
        with pytest.raises(ValueError) as error:
            do(path, **settings)
        assert says in str(error.value)
    for dataset, says in (("mine", "dataset='mine': not one of stdlib, shakespeare_char"),
                          ("", "give it a name"),
                          ("n" * 300, f"--dataset='{'n' * 50}': no folder can have this name"),
                          (f"{tmp_path}/{'n' * 300}", ": no folder can have this name"),
                          ("\ud800", r"--dataset='\ud800': no folder can have this name"),
                          ("\udcff", r"--dataset='\udcff': no folder can have this name")):
        with pytest.raises(ValueError) as error:
            prepare.main(dataset=dataset)
        assert says in str(error.value)
    assert [*tmp_path.iterdir()] == [path]


def test_text_of_one_s_own_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    path = write(tmp_path / "x.txt", "some text")
    with pytest.raises(UserError, match="x.txt': also name the dataset .* --dataset=mine; stdlib"):
        prepare.main(input=str(path))
    assert not (tmp_path / "data/stdlib").exists()


MANY = some_texts(300)
BAD = {  # what is in the input, and what is said of it; {path} is its path
    "missing": (lambda p: p / "x.txt", "input='{path}': no files there"),
    "no match": (lambda p: p / "*.txt", "input='{path}': no files there"),
    "no suffix known": (lambda p: write(p / "x.jpg", "x").parent, "no files there"),
    "empty": (lambda p: write(p / "x.txt", ""), "{path}: there is no text in its 1 file(s)"),
    "empty lines": (lambda p: write(p / "x.jsonl", "\n\n"), "{path}: there is no text"),
    "zero bytes": (lambda p: write(p / "x.txt", "ab\0c"), "{path}, near byte 0: has zero bytes"),
    "no column": (lambda p: write_jsonl(p / "x.jsonl", ["a", "b"], "body"),
                  "{path}, line 1: no field 'text' (it has: id, body); name the one with"),
    "not text": (lambda p: write(p / "x.jsonl", '{"text": "a"}\n{"text": 3}\n'),
                 "{path}, line 2: field 'text' holds a number and no text; name another"),
    "a list": (lambda p: write(p / "x.jsonl", '["text"]\n'), "line 1: no text in field 'text'"),
    "not JSON": (lambda p: write(p / "x.jsonl", '{"text": "a"}\n\n{"text": "b"\n'),
                 "{path}, line 3: not JSON"),
    "a long number": (lambda p: write(p / "x.jsonl", '{"text": "a", "id": %s}' % ("7" * 4301)),
                      "{path}, line 1: not JSON that can be read (Exceeds the limit"),
    "nested JSON": (lambda p: write(p / "x.jsonl", '{"text": "a", "id": ' + "[" * 100_000),
                    "{path}, line 1: not JSON that can be read (maximum recursion"),
    "no parquet column": (lambda p: write_parquet(p / "x.parquet", ["a", "b"], "body"),
                          "{path}: no column 'text' (it has: id, body); name it with"),
    "no text in parquet": (lambda p: write_parquet(p / "x.parquet", [["a"], ["b"]]),
                           "{path}: column 'text' cannot be read as text"),
    "not UTF-8": (lambda p: broken(lambda path, _: write(path, "a" * 99))(
        p / "x.txt", lambda raw: raw + b"caf\xe9 ol\xe9"),
        "{path}, byte 102: not UTF-8 (0xe9, "),
    "UTF-16": (lambda p: broken(lambda path, _: write(path, "a" * 99))(
        p / "x.txt", lambda raw: "text".encode("utf-16")), "{path}, byte 0: not UTF-8 (0xff, "),
    "JSON not UTF-8": (lambda p: broken(write_jsonl)(
        p / "x.jsonl", lambda raw: raw + b'{"text": "\xe9"}'), "{path}, line 301, byte 10: not"),
    "cut gzip": (lambda p: broken(write_jsonl)(p / "x.jsonl.gz", lambda raw: raw[:-20]),
                 "{path}: damaged, or not"),
    "changed gzip": (lambda p: broken(write_jsonl)(
        p / "x.jsonl.gz", lambda raw: raw[:500] + bytes(50) + raw[550:]),
        "{path}: damaged, or not"),
    "changed sum": (lambda p: broken(write_jsonl)(
        p / "x.jsonl.gz", lambda raw: raw[:-8] + bytes(8)), "{path}: damaged, or not"),
    "not gzip": (lambda p: broken(write_jsonl)(p / "x.jsonl.gz", lambda raw: b"text" + raw),
                 "{path}: damaged, or not"),
    "cut parquet": (lambda p: broken(write_parquet)(p / "x.parquet", lambda raw: raw[:-20]),
                    "{path}: damaged, or not"),
    "changed parquet": (lambda p: broken(write_parquet)(
        p / "x.parquet", lambda raw: raw[:200] + b"\xff" * 400 + raw[600:]),
        "{path}: damaged, or not"),
    "empty parquet": (lambda p: write(p / "x.parquet", ""), "{path}: damaged, or not"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, do, name):
    make, says = BAD[name]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    with pytest.raises(ValueError) as error:
        do(path)
    assert says.format(path=path) in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_bad_file_among_many_leaves_the_old_dataset_alone(tmp_path, do):
    write(tmp_path / "in/a.txt", "some text " * 9)
    folder = do(tmp_path / "in")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write(tmp_path / "in/z.txt", "\0")
    with pytest.raises(ValueError, match="z.txt, near byte 0: has zero bytes"):
        do(tmp_path / "in", overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, do):
    path = write(tmp_path / "x.txt", "text")
    path.chmod(0)
    with pytest.raises(ValueError, match="x.txt: Permission denied"):
        do(path)


# ---------------------------------------------------------------------- any number of workers


PROSE = ("the river of words that he wrote be with have many small stones and to the sea it went "
         "over hills where grass grew tall under clouds while birds sang of rain").split()


def prose(count, seed=0):
    """Pages that pass Gopher's rules, with short ones, exact copies and near copies among them."""
    rng, found = random.Random(seed), []
    for i in range(count):
        page = " ".join(" ".join(rng.choices(PROSE, k=9)) + "." for _ in range(rng.randint(7, 13)))
        page += f" It was page {i}."
        kinds = {3: page[:90], 5: found[-1] if found else page,
                 6: found[-2].replace("river", "stream", 1) if len(found) > 1 else page}
        found.append(kinds.get(i % 7, page))
    return found


def corpus_of_all_kinds(folder):
    texts = prose(150)
    write_jsonl(folder / "a.jsonl.gz", texts[:60])
    write_parquet(folder / "b.parquet", texts[60:110])
    packed(folder / "c.txt.gz", " ".join(prose(40, seed=1)).encode())  # longer than a piece
    for i, text in enumerate(texts[110:]):
        write(folder / f"d/{i:02d}.md", text)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


ALL = {"filters": "gopher c4 pii", "dedup": "near"}


@pytest.mark.parametrize("settings", [{"tokenizer": "bytes"}, {"tokenizer": "gpt2", **ALL}],
                         ids=["bytes", "gpt2, filtered"])
def test_the_same_bytes_with_any_number_of_workers(tmp_path, do, monkeypatch, settings, request):
    if settings["tokenizer"] == "gpt2":
        request.getfixturevalue("quick_gpt2")
    make_pieces_small(monkeypatch, 3000)
    (tmp_path / "in").mkdir()
    path = corpus_of_all_kinds(tmp_path / "in")
    one, two, three = (files_of(do(path, f"{workers}/data", shard_tokens=9000, workers=workers,
                                   **settings)) for workers in (1, 2, 3))
    assert one == two == three
    meta = json.loads(one["meta.json"])
    assert len(meta["splits"]["train"]["shards"]) > 1 and meta["splits"]["val"]["tokens"] > 900
    assert ("removed" in meta) == ("removed.jsonl" in one) == ("dedup" in settings)


# ---------------------------------------------------------------------- stopped and gone on


@pytest.fixture
def stop(monkeypatch):
    """Return a function: let the run be stopped at its k-th step that changes anything on the
    disk, or in 10**9 (never); the steps that were made are stop.made."""
    def at(k):
        at.made, at.last = 0, k

    def counted(owner, name):
        real = getattr(owner, name)

        def step(*args, **settings):
            at.made += 1
            if at.made > at.last:
                raise KeyboardInterrupt
            return real(*args, **settings)

        monkeypatch.setattr(owner, name, step)

    at(10**9)
    for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"),
                        (preparation, "write_atomically"), (shards.ShardWriter, "add"),
                        (shards.ShardWriter, "publish"), (shards.ShardWriter, "finish"),
                        (dedup.RemovalLog, "add")):
        counted(owner, name)
    monkeypatch.setattr(prepare, "SAVE_INTERVAL", 0)
    return at


KINDS = {
    "position": {}, "few documents": {}, "document": {}, "limited": {"max_tokens": 9777},
    "filtered": {**ALL, "max_tokens": 9000}, "chars": {"tokenizer": "chars", "dedup": "exact"},
    "bpe": {"tokenizer": "bpe", "vocab_size": 300}, "first file": {"max_tokens": 4321, **ALL}}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_it_goes_on(tmp_path, monkeypatch, stop, kind):
    monkeypatch.setattr(prepare, "gpt2_spec", lambda: (_ for _ in ()).throw(UserError("offline")))
    make_pieces_small(monkeypatch, 1500)
    texts, dataset = prose(70), f"{tmp_path}/{{}}/data"
    source = tmp_path / "x.jsonl"
    if kind == "first file":
        monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
        on_hub(monkeypatch, tmp_path / "hub", texts)
        source = ""
        monkeypatch.setitem(corpus.ON_THE_HUB, "x", corpus.ON_THE_HUB["fineweb"])
    elif kind == "position":
        source = write(tmp_path / "x.txt", " ".join(texts)[:20000])
    else:
        few = [" ".join(texts[:40]), *texts[:2]]
        write_jsonl(source, few if kind == "few documents" else texts)

    def run(name, last):
        stop(last)
        if kind == "first file":
            monkeypatch.setattr("formats.dataset.ROOT", tmp_path / name)
        prepare.main(dataset="fineweb" if kind == "first file" else dataset.format(name),
                     input=str(source), shard_tokens=3000, workers=1,
                     **{"tokenizer": "bytes", **KINDS[kind]})
        return files_of(tmp_path / name / ("data/fineweb" if kind == "first file" else "data"))

    whole = run("whole", 10**9)
    steps, seen = stop.made, set()
    assert steps > 60
    points = 3 if kind in ("bpe", "first file") else 8
    for last in sorted({*range(0, steps, steps // points), *range(steps - points, steps)}):
        with pytest.raises(KeyboardInterrupt):
            run(f"at {last}", last)
        folder = next((tmp_path / f"at {last}").rglob("UNFINISHED"), None)
        if folder:
            left = json.loads(folder.read_text())
            seen.add(bool(left.get("state")))
            with pytest.raises(ValueError, match="did not finish"):
                TokenReader(f"{folder.parent}", "train")
        assert run(f"at {last}", 10**9) == whole, last
    assert True in seen
    rng, stops = random.Random(3), 0
    while stops < 20:  # again and again
        try:
            assert run("often", rng.randint(10, 60)) == whole
            break
        except KeyboardInterrupt:
            stops += 1
    assert run("often", 10**9) == whole and stops > 1


def test_stopped_it_does_not_go_on_with_other_settings(tmp_path, do, stop, monkeypatch, capsys):
    make_pieces_small(monkeypatch, 500)
    path = write_jsonl(tmp_path / "x.jsonl", prose(50))
    whole = files_of(do(path, "whole/data", shard_tokens=900))
    steps = stop.made
    stop(steps // 2)
    with pytest.raises(KeyboardInterrupt):
        do(path, shard_tokens=900)
    stop(10**9)
    (tmp_path / "data/.lock").unlink()
    before = files_of(tmp_path / "data")
    for settings, says in (({"shard_tokens": 800}, "(shard_tokens=900)"),
                           ({"shard_tokens": 900, "max_tokens": 5}, "(no max_tokens)"),
                           ({"tokenizer": "chars"}, "(tokenizer='bytes', shard_tokens=900)")):
        with pytest.raises(ValueError, match="was stopped half-way; finish it .* --overw") as error:
            do(path, **settings)
        assert says in str(error.value)
    with pytest.raises(ValueError, match=r"\(other files\)"):
        do(write_jsonl(tmp_path / "y.jsonl", ["a", "b"]), shard_tokens=900)
    assert files_of(tmp_path / "data") == before
    do(path, shard_tokens=800, overwrite=True)
    assert meta_of(tmp_path / "data")["source"]["shard_tokens"] == 800
    stop(steps // 2)  # a dataset that is being replaced goes on with the same command
    with pytest.raises(KeyboardInterrupt):
        do(path, shard_tokens=900, overwrite=True)
    stop(10**9)
    capsys.readouterr()
    do(path, shard_tokens=900, overwrite=True)
    assert f"{tmp_path}/data: going on after " in capsys.readouterr().out
    assert files_of(tmp_path / "data") == whole


def command(*flags):
    return [sys.executable, str(ROOT / "prepare.py"), *flags]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_killed_it_leaves_no_workers_and_goes_on(tmp_path, do):
    rng, pages = random.Random(5), prose(4000)
    path = write_jsonl(tmp_path / "x.jsonl", [f"{rng.random()} {page}" for page in pages])
    whole = do(path, "whole/data", shard_tokens=150_000, workers=1, dedup="exact")
    data, killed = tmp_path / "data", 0
    for shard_count in (1, 4, 8):
        run = subprocess.Popen(command(
            f"--dataset={data}", f"--input={path}", "--shard_tokens=150_000", "--workers=2",
            "--dedup=exact"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while run.poll() is None and len([*data.glob("*_*.bin")]) < shard_count:
            time.sleep(0.002)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() \
            if run.poll() is None else []
        run.kill()
        run.communicate()
        killed += len(children) > 1
        until = time.monotonic() + 5
        while any(map(alive, children)) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(map(alive, children))
    assert killed and (data / "UNFINISHED").is_file()
    do(path, shard_tokens=150_000, workers=1, dedup="exact")
    assert files_of(data) == files_of(whole)


def test_a_worker_that_is_killed(tmp_path, do, monkeypatch):
    make_pieces_small(monkeypatch, 1000)
    monkeypatch.setattr(prepare, "SAVE_INTERVAL", 0)
    path = write_jsonl(tmp_path / "x.jsonl", prose(150))
    whole = do(path, "whole/data", workers=1)
    with monkeypatch.context() as patch:
        work_units = text_split.work_units

        def and_kill(*args):
            for i, unit in enumerate(work_units(*args)):
                if i == 20:
                    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                yield unit

        patch.setattr(prepare, "work_units", and_kill)
        with pytest.raises(ValueError, match="one of the 2 worker processes was killed .* it goes"):
            do(path, workers=2)
    assert multiprocessing.active_children() == []
    assert json.loads((tmp_path / "data/UNFINISHED").read_text())["state"]
    do(path, workers=1)
    assert files_of(tmp_path / "data") == files_of(whole)


@pytest.mark.parametrize("kind", ["bytes", "filtered"])
def test_a_full_disk(tmp_path, do, monkeypatch, kind):
    """A limit on files' sizes stands in: of the system's errors it is the like one."""
    resource = pytest.importorskip("resource")
    make_pieces_small(monkeypatch, 3000)
    monkeypatch.setattr(prepare, "SAVE_INTERVAL", 0)
    path = write_jsonl(tmp_path / "x.jsonl", prose(90))
    settings = {"shard_tokens": 5000, "workers": 1, **(ALL if kind == "filtered" else {})}
    whole = files_of(do(path, "whole/data", **settings))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 300, 1020, 3000, 5000, 9300):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
            with pytest.raises(ValueError) as error:
                do(path, f"{size}/data", **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        folder = tmp_path / f"{size}/data"
        assert str(error.value) == (f"{folder}: File too large; make room and run the same command "
                                    "again, it goes on")
        left = files_of(folder) if folder.exists() else {}
        assert "meta.json" not in left and ".lock" not in left
        for name in left:
            assert not name.endswith(".bin") or left[name] == whole[name]
        do(path, f"{size}/data", **settings)
        assert files_of(folder) == whole


def test_a_folder_that_vanishes(tmp_path, do, monkeypatch):
    path, save = write_jsonl(tmp_path / "x.jsonl", prose(90)), preparation.save_unfinished

    def vanish(folder, unfinished):
        shutil.rmtree(folder)
        save(folder, unfinished)

    monkeypatch.setattr(preparation, "save_unfinished", vanish)
    with pytest.raises(UserError, match="data: the folder has vanished; run the same command ag"):
        do(path)


def test_a_full_disk_ends_in_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    path = write_jsonl(tmp_path / "x.jsonl", prose(200))
    done = subprocess.run(command(f"--dataset={tmp_path}/data", f"--input={path}"), text=True,
                          capture_output=True, preexec_fn=lambda: resource.setrlimit(
                              resource.RLIMIT_FSIZE, (9000, 9000)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: {tmp_path}/data: File too large; make room and run the same "
                           "command again, it goes on\n")


def test_two_preparations_of_one_dataset(tmp_path, do):
    path = write(tmp_path / "x.txt", "some text " * 99)
    with preparation.lock_dataset(tmp_path / "data"):
        done = subprocess.run(command(f"--dataset={tmp_path}/data", f"--input={path}"),
                              capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: {tmp_path}/data: another process is preparing it; wait for "
                           "that, or choose another --dataset=NAME\n")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/.lock").touch()  # a process that was killed left it
    assert ".lock" not in files_of(do(path))


# ---------------------------------------------------------------------- left out, or enough


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
def test_max_tokens_is_exact(tmp_path, do, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("quick_gpt2")
    path = write_jsonl(tmp_path / "x.jsonl", ["aß漢字 and more " * 9 + str(i) for i in range(200)])
    whole = ids_of(do(path, "whole", tokenizer=tokenizer, shard_tokens=700), "train")
    ends = [i for i, token in enumerate(whole) if token == whole[0]]
    for limit in (1, ends[9], ends[9] + 1, len(whole) - 1, 10**9):
        folder = do(path, f"{limit}", tokenizer=tokenizer, shard_tokens=700, max_tokens=limit)
        assert ids_of(folder, "train") == whole[:limit]
        info = meta_of(folder)["splits"]["train"]
        assert info["documents"] == whole[:limit].count(whole[0])
        text = Tokenizer.load(folder).decode_bytes([i for i in whole[:limit] if i != whole[0]])
        assert info["bytes"] == len(text)
    one = write(tmp_path / "one.txt", "some text " * 99)
    folder = do(one, "one", max_tokens=7)
    assert (len(ids_of(folder, "train")), len(ids_of(folder, "val"))) == (7, 99)


def test_what_was_removed_is_counted_and_shown(tmp_path, do, capsys):
    texts = prose(210)
    texts[0] += " Write to joe@some.org."
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), filters="pii gopher", dedup="exact")
    kept = [text for split in ("train", "val") for text in documents(folder, split)[1:]]
    removed = meta_of(folder)["removed"]
    long = [text.replace("joe@some.org", "email@example.com") for text in texts
            if len(text.split()) > 50]
    assert sorted(kept) == sorted(set(long))
    assert removed == {"documents_read": 210, "gopher: fewer than 50 words": 210 - len(long),
                       "dedup: exact copy": len(long) - len(kept)}
    lines = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    short = [line for line in lines if line["reason"].startswith("gopher")]
    assert [line["number"] for line in short] == [*range(1, 11), 16]
    assert all(line["text"] in texts for line in lines)
    out = capsys.readouterr().out
    assert f"removed {210 - len(kept)} of 210 documents" in out and f"{folder}/removed.jsonl" in out
    splits = meta_of(folder)["splits"].values()
    assert sum(info["documents"] for info in splits) == len(kept)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_filters_use_the_columns(tmp_path, do, kind):
    pytest.importorskip("py3langid")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"text {i}", "language": "fr" if i % 3 else "en", "url": f"http://{i % 2}.org",
             "language_score": 0.9 if i % 5 else 0.3} for i in range(200)]
    path, blocked = tmp_path / f"x.{kind}", write(tmp_path / "list", "1.org\n")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = do(path, language="fr", url_blocklist=str(blocked), val_fraction=0.3)
    kept = {text for split in ("train", "val") for text in documents(folder, split)[1:]}
    assert kept == {f"text {i}" for i in range(200) if i % 3 and i % 5 and not i % 2}
    assert meta_of(folder)["removed"]["url: domain in the block list"] == 100
    sample = json.loads((folder / "removed.jsonl").read_text().splitlines()[0])
    assert {"language", "language_score", "url", "text", "reason", "number"} == set(sample)


def test_all_is_removed(tmp_path, do, monkeypatch):
    make_pieces_small(monkeypatch, 100)
    path = write_jsonl(tmp_path / "x.jsonl", some_texts(100))
    with pytest.raises(ValueError, match="no tokens are left for the train split .100 documents, "
                       "100 removed, most for .gopher: fewer than 50 words..; filter less"):
        do(path, filters="gopher")
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="no tokens are left for the val split"):
        do(path, max_tokens=1)


def test_later_pieces_of_a_document_are_cleaned_too(tmp_path, do, monkeypatch):
    make_pieces_small(monkeypatch, 700)
    long = " ".join(prose(30)[0].split() * 9) + " to joe@some.org"
    texts = [f"{i} {long}" for i in range(60)]
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), filters="gopher pii",
                val_fraction=0.3)
    kept = [text for split in ("train", "val") for text in documents(folder, split)[1:]]
    assert len(kept) == 60 and all(text.endswith(" to email@example.com") for text in kept)
    folder = do(write(tmp_path / "x.txt", long * 5), filters="pii", overwrite=True)
    assert "joe" not in documents(folder, "train")[0]


def test_characters_that_filters_write_are_in_the_alphabet(tmp_path, do):
    texts = [f"A B@C.DE 9.9.9.9 {i}" for i in range(99)]
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), filters="pii", tokenizer="chars")
    assert documents(folder, "train")[1].startswith("A email@example.com 22.214.171.124 ")


# ---------------------------------------------------------------------- from the hub


@pytest.fixture
def fineweb(tmp_path, monkeypatch):
    """Return the texts of a stand-in for FineWeb and the folder of its dataset."""
    texts = prose(100)
    on_hub(monkeypatch, tmp_path / "hub", texts)
    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    return texts, tmp_path / "data/fineweb"


def test_fineweb_s_first_file_is_for_validation(fineweb, gpt2, quick_gpt2, monkeypatch, capsys):
    texts, folder = fineweb
    prepare.main(dataset="fineweb", shard_tokens=1000, max_tokens=3333, workers=1)
    ids = [i for text in texts for i in (gpt2.eot, *gpt2.encode(text).tolist())]
    assert ids_of(folder, "val") == ids[:1000] and ids_of(folder, "train") == ids[1000:4333]
    meta = meta_of(folder)
    assert [shard["tokens"] for shard in meta["splits"]["val"]["shards"]] == [1000]
    assert meta["source"]["files"] == " ".join(corpus.ON_THE_HUB["fineweb"])
    monkeypatch.setattr(corpus.Hub, "connect", lambda self: 1 / 0)
    prepare.main(dataset="fineweb", shard_tokens=1000, max_tokens=3333)  # also offline
    assert "already prepared, nothing to do" in capsys.readouterr().out


def test_fineweb_with_bytes_filters_and_workers(fineweb, monkeypatch):
    texts, folder = fineweb
    prepare.main(dataset="fineweb", tokenizer="bytes", shard_tokens=5000, workers=2, language="en")
    both = documents(folder, "val")[1:] + documents(folder, "train")
    joined = "".join(both)
    assert joined == "".join(text for text in texts if len(text) % 7 and len(text) % 50 >= 15)
    assert len(ids_of(folder, "val")) == 5000 and meta_of(folder)["removed"][
        "language: another one"] == sum(len(text) % 7 == 0 for text in texts)


def test_a_vocabulary_learned_from_fineweb(fineweb, quick_gpt2):
    texts, folder = fineweb
    prepare.main(dataset="fineweb", tokenizer="bpe", vocab_size=300, shard_tokens=700, workers=1)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 300 and len(ids_of(folder, "val")) == 700
    assert tokenizer.decode(ids_of(folder, "val") + ids_of(folder, "train")) == "".join(
        "<|endoftext|>" + text for text in texts)


def test_fineweb_that_cannot_be_had(tmp_path, fineweb, monkeypatch):
    import datasets

    _, folder = fineweb
    with pytest.raises(ValueError, match="tokenizer='chars' must read all of the text"):
        prepare.main(dataset="fineweb", tokenizer="chars")
    with pytest.raises(ValueError, match="no column 'body'"):
        prepare.main(dataset="fineweb", tokenizer="bytes", text_column="body")
    with pytest.raises(ValueError, match="no tokens are left for the train split"):
        prepare.main(dataset="fineweb", tokenizer="bytes", workers=1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: (
        _ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(ValueError, match="cannot download .*no route.*--input=FILES"):
        prepare.main(dataset="fineweb", tokenizer="bytes")
    assert not folder.exists()


# ---------------------------------------------------------------------- ready-made tokens


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A stand-in for the hub with one validation file and five for training, of 50 tokens each;
    returns the names that were asked for, and the dataset's folder."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    class File:
        def __init__(self, path):
            self.path, self.size = path, 1024 + 100

    class HfApi:
        def dataset_info(self, name, revision, timeout):
            asked.append("hub")
            assert name == "kjj0/fineweb10B-gpt2"
            assert revision in (ready_made.READY_MADE["fineweb"][1], "abc")
            self.sha = "abc"
            return self

        def list_repo_tree(self, name, repo_type, revision):
            assert (repo_type, revision) == ("dataset", "abc")
            names = [*(f"fineweb_train_{i:06d}.bin" for i in (3, 1, 2, 5, 4)), "README.md"]
            return map(File, [*names, "fineweb_val_000000.bin"])

    def fetch(repo, name, repo_type, revision, local_dir):
        asked.append(name)
        assert (repo, repo_type, revision) == ("kjj0/fineweb10B-gpt2", "dataset", "abc")
        plan = json.loads((Path(local_dir) / "meta.json").read_text())  # is there before the files
        assert plan["order"] == "by_file"
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 50
        ids = np.arange(50, dtype="<u2") + 100 * int(name[-5])
        (Path(local_dir) / name).write_bytes(header.tobytes() + ids.tobytes())

    monkeypatch.setattr(hub, "HfApi", HfApi)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setattr("formats.dataset.ROOT", tmp_path)
    return asked, tmp_path / "data/fineweb"


def files(*numbers):
    return [f"fineweb_train_{i:06d}.bin" for i in numbers]


def test_ready_made_tokens_are_fetched_as_far_as_asked(ready, capsys):
    asked, folder = ready
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=60)
    assert asked == ["hub", "fineweb_val_000000.bin", *files(1, 2)]
    assert "100 tokens for training" in capsys.readouterr().out
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=60)
    assert asked[4:] == []  # and without asking the hub
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=101)
    assert asked[4:] == ["hub", *files(3)]  # the others were there
    reader = TokenReader(f"{folder}", "train")
    assert (reader.tokens, reader.by_file) == (150, True)
    assert reader.rows(np.array([48]), 4).tolist() == [[148, 149, 200, 201]]
    assert meta_of(folder)["ready_made"] == {"from": "kjj0/fineweb10B-gpt2", "commit": "abc",
                                             "max_tokens": 101}
    prepare.main(dataset="fineweb", ready_made=True)
    assert TokenReader(f"{folder}", "train").tokens == 250
    with pytest.raises(ValueError, match="choose fineweb or fineweb_edu"):
        prepare.main(dataset="openwebtext", ready_made=True)
    assert not (folder.parent / "openwebtext").exists()


def test_ready_made_tokens_go_on(ready, monkeypatch):
    asked, folder = ready
    download_file = ready_made.download_file

    def stops(*args):
        if len(asked) > 2:
            raise KeyboardInterrupt
        download_file(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ready_made, "download_file", stops)
        prepare.main(dataset="fineweb", ready_made=True)
    assert TokenReader(f"{folder}", "train").tokens == 250  # training can begin
    prepare.main(dataset="fineweb", ready_made=True)
    assert asked[2:] == [*files(1), "hub", *files(2, 3, 4, 5)]
    path = folder / files(2)[0]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="000002.bin: should have 50 tokens and has 49"):
        prepare.main(dataset="fineweb", ready_made=True)
    header = np.array([20240520, 1, 49, *[0] * 253], "<i4")
    path.write_bytes(header.tobytes() + bytes(98))
    with pytest.raises(ValueError, match="000002.bin: has 49 tokens and should have 50; remove it"):
        prepare.main(dataset="fineweb", ready_made=True)


def test_ready_made_tokens_and_a_dataset_of_text(tmp_path, ready, gpt2, monkeypatch):
    asked, folder = ready
    text = {"dataset": "fineweb", "input": str(write(tmp_path / "x.txt", "some text " * 99))}
    prepare.main(**text)
    with pytest.raises(ValueError, match="token files of other text; replace them with --over"):
        prepare.main(dataset="fineweb", ready_made=True)
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=1, overwrite=True)
    assert sorted(files_of(folder)) == [*files(1), "fineweb_val_000000.bin", "meta.json"]
    assert prepare.load_tokenizer(f"{folder}").spec == gpt2.spec
    with pytest.raises(ValueError, match="--overwrite=True"):
        prepare.main(**text)
    prepare.main(**text, overwrite=True)
    assert TokenReader(f"{folder}", "train").tokens == 891


def test_ready_made_tokens_offline(ready, monkeypatch):
    import huggingface_hub as hub

    def offline(*args, **settings):
        raise hub.errors.LocalEntryNotFoundError("offline")

    asked, folder = ready
    with monkeypatch.context() as patch:
        patch.setattr(hub.HfApi, "dataset_info", offline)
        with pytest.raises(ValueError, match="cannot download the list of kjj0/fineweb10B-gpt2'"):
            prepare.main(dataset="fineweb", ready_made=True)
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "hf_hub_download", offline)
        with pytest.raises(ValueError, match="cannot download fineweb_val_000000.bin of kjj0/"):
            prepare.main(dataset="fineweb", ready_made=True)
    with monkeypatch.context() as patch:  # the files are known: no file is asked for, which is slow
        patch.setattr(hub.HfApi, "dataset_info", offline)
        with pytest.raises(ValueError, match="cannot download the files of kjj0/fineweb10B-gpt2"):
            prepare.main(dataset="fineweb", ready_made=True)
        assert asked == ["hub"]
    with pytest.raises(ValueError, match="fineweb_train_000001.bin: is not there yet"):
        prepare.main(dataset="fineweb", show=2)


# ---------------------------------------------------------------------- a look at it


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
def test_show(tmp_path, do, capsys, monkeypatch, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("quick_gpt2")
    texts = [f"{i} {TRICKY[:-15]}" for i in range(90)]
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=tokenizer, shard_tokens=999)
    capsys.readouterr()
    prepare.main(dataset=str(folder), show=3)
    out, info = capsys.readouterr().out, meta_of(folder)["splits"]["train"]
    assert out.startswith(f"train: {info['tokens']:,} tokens, {info['bytes']:,} bytes (")
    assert f", {info['documents']:,} documents, {len(info['shards'])} file(s)\nval: " in out
    assert out.count("\n--- tokens ") == 3 and "\033" not in out
    for shown in out.split("\n--- tokens ")[1:]:
        assert "indented" in shown.replace("|", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    prepare.main(dataset=str(folder), show=1)
    assert "\033[44;97m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    prepare.main(dataset=str(folder), show=1)
    assert "\033" not in capsys.readouterr().out


def test_show_of_one_text_of_others_and_of_nothing(tmp_path, do, ready, capsys, gpt2):
    folder = do(write(tmp_path / "x.txt", "漢字" * 99), name="one")
    prepare.main(dataset=str(folder), show=2)
    out = capsys.readouterr().out
    assert out.count("from the middle of a document\n") == 2 and "漢|字|漢|字|漢" in out
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=60)
    prepare.main(dataset="fineweb", show=1)
    assert "train: 100 tokens, 2 file(s)" in capsys.readouterr().out
    for count in (-1, 1001):
        with pytest.raises(UserError, match=f"show={count}: must be at least 1 and at most 1000"):
            prepare.main(dataset=str(folder), show=count)
    with pytest.raises(ValueError, match="no token files here; prepare them with python prep"):
        prepare.main(dataset=f"{tmp_path}/nowhere", show=1)
    with pytest.raises(ValueError) as error:
        prepare.main(dataset=f"{tmp_path}/none_here/nowhere", show=1)
    assert str(error.value).endswith("(your own text: with --input=PATH)")
    assert not (tmp_path / "nowhere").exists()


def test_boundaries_joined_give_the_text(gpt2):
    ids = gpt2.encode(TRICKY).tolist()
    shown = show.mark_tokens(gpt2, ids, colour=False)
    assert "First|\r|\n|line" in shown and shown.replace("|", "") == TRICKY.replace("|", "")
    coloured = show.mark_tokens(gpt2, ids, colour=True)
    parts = re.findall("\033\\[4[0-9];97m(.*?)\033\\[0m", coloured, flags=re.DOTALL)
    assert "".join(parts) == TRICKY and "|".join(parts) == shown
    neighbours = re.findall("\033\\[(4.);97m", coloured)
    assert all(a != b for a, b in zip(neighbours, neighbours[1:], strict=False))
    half = gpt2.encode("漢字 and").tolist()  # from within a character, and to within one
    tokenizer = Tokenizer({"kind": "bytes"})
    assert show.mark_tokens(tokenizer, "é漢a".encode()[1:-2] + b"b", False) == "\ufffd|\ufffdb"
    assert show.mark_tokens(gpt2, half, False).endswith("| and")


# ---------------------------------------------------------------------- packed files, bad text


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_every_kind_of_file_plain_and_packed(tmp_path, do, kind, packing):
    texts = [f"Row {i}, with a \"quote\",\nand two lines; caf\u00e9 {i * i}." for i in range(200)]
    if kind == "txt":
        for i, text in enumerate(texts):
            packed(tmp_path / f"in/{i:03d}.txt{packing}", text.encode())
    elif kind == "jsonl":
        rows = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(texts))
        packed(tmp_path / f"in/x.jsonl{packing}", rows.encode())
    else:
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerows([["id", "body"], *enumerate(texts)])
        packed(tmp_path / f"in/x.csv{packing}", b"\xef\xbb\xbf" + file.getvalue().encode())
    folder = do(tmp_path / "in", text_column="body")
    found = [text for split in ("train", "val") for text in documents(folder, split)[1:]]
    assert sorted(found) == sorted(texts)


def test_suffixes_choose_what_is_read_of_a_folder(tmp_path, do):
    write(tmp_path / "in/a.rs", "fn main() {} " * 9)
    write(tmp_path / "in/b.txt", "text " * 9)
    with pytest.raises(ValueError, match="--suffixes="):
        do(tmp_path / "in", suffixes=".c")
    folder = do(tmp_path / "in", suffixes=".c .rs")
    assert b"".join(t.encode() for t in documents(folder, "train")).startswith(b"fn main")


# ---------------------------------------------------------------------- the command


def test_the_command(tmp_path):
    path = write(tmp_path / "x.txt", "some text " * 99)

    def command(*flags):
        return subprocess.run([sys.executable, ROOT / "prepare.py", f"--dataset={tmp_path}/data",
                               f"--input={path}", *flags], capture_output=True, text=True)

    done = command("--tokenizer=chars")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("train: 891 tokens of 1.00 bytes, 1 file(s)\n"
                           "val: 99 tokens of 1.00 bytes, 1 file(s)\n"
                           f"{tmp_path}/data: done; tokenizer chars, vocabulary 7\n")
    done = command()
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "--overwrite=True" in done.stderr


MEASURE = """
import sys, prepare
prepare.main(dataset=sys.argv[1], input=sys.argv[2])
status = open("/proc/self/status").read()  # getrusage's ru_maxrss counts the parent's memory too
print(int(status.split("VmHWM:")[1].split()[0]) / 1e3, file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "one line"])
def test_resident_memory_does_not_grow_with_the_text(tmp_path, lines):
    path = tmp_path / "x.txt"
    with open(path, "wb") as file:
        for i in range(120):
            file.write(b"%06d, some words\n" % i * 55_000 if lines else b"x" * 10**6)
    done = subprocess.run([sys.executable, "-c", MEASURE, f"{tmp_path}/data", path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 140, "MB, of a text of 120 MB"
