"""prepare.py: text in, the same text out; splits, sizes, tokenizers, every kind of bad input."""

import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

import prepare
import tokens
from tokenizer import Tokenizer
from tokens import TokenReader

ROOT = Path(prepare.__file__).parent
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
TRICKY = ("First\r\nline\r\n\r\n\r\nit's 3.14 -- don't!\n\n\n\n\n    indented = True  # 1,000\n\t"
          "tab \n  \n漢字かな、カナ。句点！これは空白のない文章です。 😀 👩\u200d👩 é e\u0301 ½"
          " \u00a0\u3000x\u0085y <|endoftext|>\n")


@pytest.fixture
def quick_gpt2(gpt2, monkeypatch):
    """GPT-2's tokenizer without the second that reading its files takes."""
    monkeypatch.setattr(prepare, "gpt2_spec", lambda: gpt2.spec)


@pytest.fixture
def do(tmp_path):
    """Return a function that prepares files or texts and returns the dataset's folder."""
    def prepared(source, name="data", **settings):
        prepare.main(dataset=f"{tmp_path}/{name}", input=str(source), **settings)
        return tmp_path / name

    return prepared


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


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def write_jsonl(path, texts, field="text"):
    lines = "".join(json.dumps({"id": 7, field: text}) + "\n" for text in texts)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


def write_parquet(path, texts, field="text"):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": list(range(len(texts))), field: texts})
    pq.write_table(table, path, row_group_size=7)
    return path


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


def test_stdlib_files_are_in_a_stable_order_without_tests():
    paths = prepare.stdlib_files()
    assert paths == prepare.stdlib_files() and len(paths) == len(set(paths)) > 300
    root = Path(json.__file__).parent.parent
    names = [path.relative_to(root).as_posix() for path in paths]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    for part in ("test", "tests", "idle_test", "site-packages", "__pycache__"):
        assert not any(part in name.split("/") for name in names)


def test_the_default_corpus_is_the_standard_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tokens, "ROOT", tmp_path)
    some = prepare.stdlib_files()[::7]
    monkeypatch.setattr(prepare, "stdlib_files", lambda: some)
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

    monkeypatch.setattr(tokens, "ROOT", tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        prepare.main(dataset="shakespeare_char")
    folder = tmp_path / "data/shakespeare_char"
    assert asked == [prepare.SHAKESPEARE_URL] and meta_of(folder)["tokenizer"] == "chars"
    assert "".join(documents(folder, "train") + documents(folder, "val")) == "Tö be,\r\nor not." * 7


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"),
                                   http.client.IncompleteRead(b"half")])
def test_offline_says_what_to_do(monkeypatch, tmp_path, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(tokens, "ROOT", tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for dataset in ("shakespeare", "shakespeare_char"):
        with pytest.raises(ValueError, match="cannot download https.*add --input=FILE"):
            prepare.main(dataset=dataset)
    assert not (tmp_path / "data").exists()


def test_gpt2_s_tokenizer_offline(monkeypatch, tmp_path, do):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(
        ConnectionError("no route")))
    monkeypatch.setattr(prepare, "survey", lambda *args: 1 / 0)  # it is found out before reading
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
    assert str(prepare.find_files("x", "in/deep/0[01].*", None, "")[0]) == os.path.join(
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
    monkeypatch.setattr(prepare, "PIECE", 64)
    rng = random.Random(2)
    parts = [" ", "\n", "word", "It's", "x_1", "1,000", "3.14", "漢字、", "かな。\n", "😀", "--",
             "\r\n", "\n\n\n", "    ", "\t", "é", "e\u0301", "...", "हिन्दी", "½", "\u3000", "!"]
    texts = [TRICKY, "word " * 100, "漢字、かな。" * 50, "a\r\n" * 99, "😀 " * 99,
             "x = 1\n    y\n" * 40]
    texts += ["".join(rng.choices(parts, k=100)) for _ in range(60)]
    cuts = 0
    for text in texts:
        pieces = prepare.cut(text)
        assert "".join(pieces) == text and all(0 < len(piece) <= 64 for piece in pieces)
        if not any(len(piece) == 64 for piece in pieces):  # no cut in an unbroken run
            assert [i for ids in gpt2.encode_batch(pieces) for i in ids] == gpt2.encode(
                text).tolist()
            cuts += len(pieces) - 1
    assert cuts > 200

    text = "".join(texts[:6]) * 3
    folder = do(write(tmp_path / "x.txt", text), tokenizer="gpt2", val_fraction=0.2)
    at = int(len(text) * 0.8)
    assert ids_of(folder, "train") == gpt2.encode(text[:at]).tolist()
    assert ids_of(folder, "val") == gpt2.encode(text[at:]).tolist()
    folder = do(write_jsonl(tmp_path / "x.jsonl", texts), tokenizer="gpt2", overwrite=True)
    found = documents(folder, "train")[1:] + documents(folder, "val")[1:]
    assert sorted(found) == sorted(texts)


def test_text_without_a_safe_place_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 5)
    assert prepare.cut("abcdefghijkl") == ["abcde", "fghij", "kl"]
    assert prepare.cut("abcde") == ["abcde"] and prepare.cut("") == [""]
    assert prepare.cut("ab cd ef") == ["ab", " cd", " ef"]
    assert prepare.cut("ab  cd\nf") == ["ab", "  cd", "\nf"]
    assert prepare.cut("don't, so") == ["don't", ", so"]


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


@pytest.mark.parametrize("at", ["finish", "close_shard", "save", "meta", "unlink"])
def test_an_interrupted_preparation(tmp_path, do, monkeypatch, at):
    path = write_jsonl(tmp_path / "x.jsonl", some_texts(100))
    whole = do(path, "whole", shard_tokens=500)
    do(write_jsonl(tmp_path / "long.jsonl", some_texts(300, seed=5)), shard_tokens=500)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "save":
            patch.setattr(Tokenizer, "save", stop)
        elif at == "meta":
            patch.setattr(prepare, "write_aside", stop)
            patch.setattr(Tokenizer, "save", lambda self, folder: None)
        elif at == "unlink":  # meta.json is there already, and UNFINISHED still
            unlink = Path.unlink
            patch.setattr(Path, "unlink", lambda self, **kwargs: (
                stop() if self.name == "UNFINISHED" else unlink(self, **kwargs)))
        else:
            patch.setattr(tokens.ShardWriter, at, stop)
        do(path, shard_tokens=500, overwrite=True)
    folder = tmp_path / "data"
    assert (folder / "UNFINISHED").exists() and not any(folder.glob("*.tmp"))
    assert (folder / "meta.json").exists() == (at == "unlink")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="did not finish; run python prepare.py"):
            TokenReader(f"{folder}", split)
    do(path, shard_tokens=500)  # without --overwrite
    assert {p.name: p.read_bytes() for p in folder.glob("*.bin")} == {
        p.name: p.read_bytes() for p in whole.glob("*.bin")}
    assert meta_of(folder)["splits"] == meta_of(whole)["splits"]
    assert not (folder / "UNFINISHED").exists()


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
            ({"shard_tokens": 2**31}, "shard_tokens=2147483648: must be at least 1 and below"),
            ({"tokenizer": "GPT2"}, "tokenizer='GPT2': choose bytes, chars, gpt2, bpe or the")):
        with pytest.raises(ValueError) as error:
            do(path, **settings)
        assert says in str(error.value)
    for dataset, says in (("mine", "dataset='mine': not one of stdlib, shakespeare_char"),
                          ("fineweb", "fineweb: its text is not fetched by this version; add --re"),
                          ("openwebtext", "give the text with --input=FILES"),
                          ("", "give it a name")):
        with pytest.raises(ValueError) as error:
            prepare.main(dataset=dataset)
        assert says in str(error.value)
    assert [*tmp_path.iterdir()] == [path]


MANY = some_texts(300)
BAD = {  # what is in the input, and what is said of it; {path} is its path
    "missing": (lambda p: p / "x.txt", "input='{path}': no files there"),
    "no match": (lambda p: p / "*.txt", "input='{path}': no files there"),
    "no suffix known": (lambda p: write(p / "x.jpg", "x").parent, "no files there"),
    "empty": (lambda p: write(p / "x.txt", ""), "{path}: there is no text in its 1 file(s)"),
    "empty lines": (lambda p: write(p / "x.jsonl", "\n\n"), "{path}: there is no text"),
    "zero bytes": (lambda p: write(p / "x.txt", "ab\0c"), "{path}, near byte 0: has zero bytes"),
    "no column": (lambda p: write_jsonl(p / "x.jsonl", ["a", "b"], "body"),
                  "{path}, line 1: no text in field 'text' (it has: id, body); name the field"),
    "not text": (lambda p: write(p / "x.jsonl", '{"text": "a"}\n{"text": 3}\n'),
                 "{path}, line 2: no text in field 'text' (it has: text)"),
    "a list": (lambda p: write(p / "x.jsonl", '["text"]\n'), "line 1: no text in field 'text'"),
    "not JSON": (lambda p: write(p / "x.jsonl", '{"text": "a"}\n\n{"text": "b"\n'),
                 "{path}, line 3: not JSON"),
    "no parquet column": (lambda p: write_parquet(p / "x.parquet", ["a", "b"], "body"),
                          "{path}: no column 'text' (it has: id, body); name it with"),
    "no text in parquet": (lambda p: write_parquet(p / "x.parquet", [["a"], ["b"]]),
                           "{path}: cannot be read as parquet"),
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
                    "{path}: cannot be read as parquet"),
    "changed parquet": (lambda p: broken(write_parquet)(
        p / "x.parquet", lambda raw: raw[:200] + b"\xff" * 400 + raw[600:]),
        "{path}: cannot be read as parquet"),
    "empty parquet": (lambda p: write(p / "x.parquet", ""), "{path}: cannot be read as parquet"),
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
    with pytest.raises(PermissionError):
        do(path)


# ---------------------------------------------------------------------- ready-made tokens


def test_ready_made_tokens_are_fetched_as_far_as_asked(tmp_path, monkeypatch, capsys):
    """A stand-in for the hub, with files of 50 tokens in the published layout."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repo, name, repo_type, local_dir):
        asked.append(name)
        assert (repo, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 50
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        ids = np.arange(50, dtype="<u2")
        (Path(local_dir) / name).write_bytes(header.tobytes() + ids.tobytes())

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setattr(prepare, "dataset_folder", lambda name: tmp_path / name)
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=60)
    assert asked == ["fineweb_val_000000.bin", "fineweb_train_000001.bin",
                     "fineweb_train_000002.bin"]
    prepare.main(dataset="fineweb", ready_made=True, max_tokens=101)
    assert asked[3:] == ["fineweb_train_000003.bin"]  # the others were there
    assert "150 tokens for training" in capsys.readouterr().out
    assert TokenReader(f"{tmp_path}/fineweb", "train").tokens == 150
    with pytest.raises(ValueError, match="choose fineweb or fineweb_edu"):
        prepare.main(dataset="openwebtext", ready_made=True)


def test_ready_made_tokens_offline(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fetch(*args, **settings):
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setattr(prepare, "dataset_folder", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="cannot download fineweb_val_000000.bin of kjj0/fineweb10B"
                                         ".* fetch it elsewhere and put it into"):
        prepare.main(dataset="fineweb", ready_made=True)


# ---------------------------------------------------------------------- packed files, bad text


def packed(path, data):
    """Write bytes as the name's suffix says: plain, .gz or .zst."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


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


@pytest.mark.parametrize("bad_text, kept", [("skip", ["good one"]),
                                            ("replace", ["bad \ufffd one", "good one"])])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_bad_text_is_skipped_or_replaced(tmp_path, do, capsys, kind, bad_text, kept):
    prepare.say_once.cache_clear()
    if kind == "txt":
        packed(tmp_path / "in/a.txt", b"bad \xff one")
        packed(tmp_path / "in/b.txt", b"good one")
    else:
        rows = {"jsonl": b'{"text": "bad \xff one"}\n{"text": "good one"}\n',
                "csv": b"text\nbad \xff one\ngood one\n"}[kind]
        packed(tmp_path / f"in/x.{kind}", rows)
    pieces = list(prepare.read_pieces(sorted((tmp_path / "in").iterdir()), "text", bad_text))
    assert pieces == [(True, text) for text in kept]
    list(prepare.read_pieces(sorted((tmp_path / "in").iterdir()), "text", bad_text))
    said = capsys.readouterr().err
    assert said.count("skipped: ") == (bad_text == "skip")
    assert (": not UTF-8" in said) == (bad_text == "skip")


def test_the_position_of_bad_text_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 8)
    for good in range(1, 40):
        path = packed(tmp_path / "x.txt", b"\xc3\xa9" * good + b"\xc3(" + b"x" * 30)
        with pytest.raises(ValueError, match=rf"x\.txt, byte {2 * good}: not UTF-8 \(0xc3"):
            list(prepare.read_pieces([path], "text"))


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.jsonl.zst"])
def test_a_damaged_packed_file_is_named(tmp_path, name):
    path = packed(tmp_path / name, b'{"text": "' + bytes(range(65, 91)) * 99 + b'"}')
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name}(: damaged|, line 1: not JSON)"):
        list(prepare.read_pieces([path], "text"))
    path.write_bytes(b"this is not packed")
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        list(prepare.read_pieces([path], "text"))


def test_a_csv_without_the_column(tmp_path):
    path = packed(tmp_path / "x.csv", b"id,body\n1,text\n")
    with pytest.raises(ValueError, match="no column 'text' .it has: id, body.; name it with"):
        list(prepare.read_pieces([path], "text"))


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
        for i in range(200):
            file.write(b"%06d, some words\n" % i * 55_000 if lines else b"x" * 10**6)
    done = subprocess.run([sys.executable, "-c", MEASURE, f"{tmp_path}/data", path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 140, "MB, of a text of 200 MB"
