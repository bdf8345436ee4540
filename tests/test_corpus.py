"""corpus.py: the pieces of documents, from files and from the hub, from any position on."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's libraries are imported

from configurator import UserError  # noqa: E402
from documents import corpus, readers  # noqa: E402
from documents.corpus import Files, find_files  # noqa: E402

TRICKY = ("First\r\nline\r\n\r\n\r\nit's 3.14 -- don't!\n\n\n\n\n    indented = True  # 1,000\n\t"
          "tab \n  \n漢字かな、カナ。句点！これは空白のない文章です。 😀 👩\u200d👩 é e\u0301 ½"
          " \u00a0\u3000x\u0085y <|endoftext|>\n")


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


def packed(path, data):
    """Write bytes as the name's suffix says: plain, .gz or .zst."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(paths, *settings):
    return [(starts, text) for starts, text, _ in Files(paths, *settings)]


def on_hub(monkeypatch, folder, texts):
    """Let "fineweb" be parquet files here, of the columns of the real one, which the datasets
    library streams as it does those of the hub; they have 31 rows each, in groups of 7."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for first in range(0, len(texts), 31):
        part = texts[first:first + 31]
        pq.write_table(pa.table({
            "text": part, "id": [f"<urn:{i}>" for i in range(len(part))],
            "url": [f"https://{len(text) % 5}.org/{i}" for i, text in enumerate(part)],
            "language": ["fr" if len(text) % 7 == 0 else "en" for text in part],
            "language_score": [0.5 + len(text) % 50 / 100 for text in part]}),
            folder / f"{first:04d}.parquet", row_group_size=7)
    real = datasets.load_dataset

    def load_dataset(name, config, revision, split, streaming):
        assert (name, config, revision) == corpus.ON_THE_HUB["fineweb"]
        assert (split, streaming) == ("train", True)
        return real("parquet", data_files=f"{folder}/*.parquet", split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "ask_hub", lambda name, revision: None)


# ---------------------------------------------------------------------- files


def test_stdlib_files_are_in_a_stable_order_without_tests():
    paths = corpus.stdlib_files()
    assert paths == corpus.stdlib_files() and len(paths) == len(set(paths)) > 300
    root = Path(json.__file__).parent.parent
    names = [path.relative_to(root).as_posix() for path in paths]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    for part in ("test", "tests", "idle_test", "site-packages", "__pycache__"):
        assert not any(part in name.split("/") for name in names)


def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(gpt2, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 64)
    rng = random.Random(2)
    parts = [" ", "\n", "word", "It's", "x_1", "1,000", "3.14", "漢字、", "かな。\n", "😀", "--",
             "\r\n", "\n\n\n", "    ", "\t", "é", "e\u0301", "...", "हिन्दी", "½", "\u3000", "!"]
    texts = [TRICKY, "word " * 100, "漢字、かな。" * 50, "a\r\n" * 99, "😀 " * 99,
             "x = 1\n    y\n" * 40]
    texts += ["".join(rng.choices(parts, k=100)) for _ in range(60)]
    cuts = 0
    for text in texts:
        pieces = corpus.cut(text)
        assert "".join(pieces) == text and all(0 < len(piece) <= 64 for piece in pieces)
        if not any(len(piece) == 64 for piece in pieces):  # no cut in an unbroken run
            assert [i for piece in pieces for i in gpt2.encode(piece).tolist()] == gpt2.encode(
                text).tolist()
            cuts += len(pieces) - 1
    assert cuts > 200


def test_text_without_a_safe_place_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 5)
    assert corpus.cut("abcdefghijkl") == ["abcde", "fghij", "kl"]
    assert corpus.cut("abcde") == ["abcde"] and corpus.cut("") == [""]
    assert corpus.cut("ab cd ef") == ["ab", " cd", " ef"]
    assert corpus.cut("ab  cd\nf") == ["ab", "  cd", "\nf"]
    assert corpus.cut("don't, so") == ["don't", ", so"]


def test_from_every_position_the_rest_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 50)
    monkeypatch.setattr(readers, "CHUNK", 50)
    long = "some words of it, " * 20
    paths = [packed(tmp_path / "a.txt.gz", long.encode()),
             write_jsonl(tmp_path / "b.jsonl", ["", "one", long, "two"]),
             write(tmp_path / "c.txt", ""),
             write_parquet(tmp_path / "d.parquet", ["three", None, long, "four"]),
             packed(tmp_path / "e.csv", b"text\nfive\n\"six\nseven\"\n"),
             packed(tmp_path / "f.txt", b"bad \xff"), write(tmp_path / "g.md", long)]
    files = Files(paths, "text", "skip")
    positions, whole, shares = [files.position], [], []
    for starts, text, _ in files:
        whole.append((starts, text))
        positions.append(files.position)
        shares.append(files.share_done())
    assert len(whole) > 30 and sum(starts for starts, _ in whole) == 10
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] <= 1
    for done, position in enumerate(positions):
        files = Files(paths, "text", "skip")
        files.position = json.loads(json.dumps(position))
        assert [(starts, text) for starts, text, _ in files] == whole[done:]


def test_what_is_hidden_in_a_folder_is_not_read(tmp_path):
    root = tmp_path / ".home/texts"
    seen = [write(root / name, "text") for name in ("a.txt", "sub/b.TXT", "c.txt.gz")]
    for name in (".git/x.txt", ".venv/lib/x.txt", "sub/.x.txt"):
        write(root / name, "x")
    assert find_files("mine", f"{root}", None, ".txt") == sorted(seen)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    readers.warn_once.cache_clear()
    locked, scandir = write(tmp_path / "locked/x.txt", "x").parent, os.scandir

    def refuse(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    path = write(tmp_path / "a.txt", "a")
    assert find_files("mine", f"{tmp_path}", None, ".txt") == [path]
    assert capsys.readouterr().err == f"skipped: {locked}: Permission denied\n"


def test_suffixes(tmp_path):
    for name in ("a.c", "b.h", "x.sh", "d.R", "e.cc", "f.c.gz"):
        write(tmp_path / name, "text")
    for suffixes, names in (("c h", "a.c b.h f.c.gz"), (".c .h", "a.c b.h f.c.gz"), ("R", "d.R"),
                            (".c.gz", "a.c f.c.gz"), ("c++ sh", "x.sh")):
        paths = find_files("mine", f"{tmp_path}", None, suffixes)
        assert [path.name for path in paths] == names.split()
    for wrong in (".c,.h", "*.c", "['.c']", ".gz", "."):
        with pytest.raises(UserError, match="is no ending of a file's name; write them with spac"):
            find_files("mine", f"{tmp_path}", None, wrong)


def test_json_is_read_as_text_and_says_so(tmp_path, capsys):
    readers.warn_once.cache_clear()
    path = write(tmp_path / "x.json", '{"text": "a"}')
    for pattern in (path, tmp_path):
        assert read(find_files("mine", str(pattern), None, ".json")) == [(True, '{"text": "a"}')]
    assert capsys.readouterr().err.startswith(".json files are read as plain text, brackets")
    find_files("mine", str(write_jsonl(tmp_path / "x.jsonl", ["a"])), None, "")
    assert capsys.readouterr().err == ""


def test_a_changed_corpus_has_another_fingerprint(tmp_path):
    path = write(tmp_path / "x.txt", "text")
    before = Files([path]).fingerprint()
    assert Files([path]).fingerprint() == before
    os.utime(path, ns=(1, 1))
    touched = Files([path]).fingerprint()
    write(path, "longer")
    assert len({before, touched, Files([path]).fingerprint()}) == 3


# ---------------------------------------------------------------------- the hub


def hub(column="text", extra_columns=()):
    opened = corpus.Hub("fineweb", column, extra_columns)
    opened.connect()
    return opened


def test_the_hub_s_rows_come_from_every_position(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 50)
    texts = [f"document {i}, " + "a word " * (30 if i % 11 == 0 else i % 4) for i in range(70)]
    on_hub(monkeypatch, tmp_path / "hub", [*texts, ""])
    stream, positions, whole = hub(extra_columns=("language", "no such")), [], []
    first = json.dumps(stream.position)
    for starts, text, row in stream:
        whole.append((starts, text))
        assert set(row) == {"language"}
        positions.append(json.dumps(stream.position) if stream.at_boundary else None)
    assert "".join(text for _, text in whole) == "".join(texts)
    assert sum(starts for starts, _ in whole) == 70 and None in positions
    assert stream.rows_read == 71 and 0 <= stream.share_done() <= 1
    some = [(0, first), *enumerate(positions, 1)][::17] + [(len(whole), positions[-1])]
    for done, position in some:
        if position:
            again = hub()
            again.position = json.loads(position)
            assert [(starts, text) for starts, text, _ in again] == whole[done:]
    stream.position = json.loads(first)
    assert [(starts, text) for starts, text, _ in stream] == whole


def test_a_column_that_the_hub_lacks(tmp_path, monkeypatch):
    on_hub(monkeypatch, tmp_path / "hub", ["text"])
    with pytest.raises(ValueError, match="HuggingFaceFW/fineweb: no column 'body' .it has: text, "
                                         "id, url, language, language_score.; name it with --te"):
        hub("body")


def test_the_hub_offline(monkeypatch, capsys):
    """One question shows it. The datasets library would ask again for 25 seconds."""
    import datasets
    import huggingface_hub

    def dataset_info(api, name, revision, timeout):
        assert (name, revision) == corpus.ON_THE_HUB["fineweb"][::2] and timeout <= 10
        assert "asking Hugging Face's hub for HuggingFaceFW/fineweb\n" in capsys.readouterr().err
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: pytest.fail("asked"))
    with pytest.raises(ValueError) as error:
        hub()
    assert str(error.value) == (
        "cannot download the dataset HuggingFaceFW/fineweb on Hugging Face's hub (ConnectionError: "
        "Couldn't reach the Hub); run the same command again where the hub can be reached, and it "
        "goes on; or give the text's files with --input=FILES")


def test_every_dataset_of_the_hub_is_pinned():
    for name, _, revision in corpus.ON_THE_HUB.values():
        assert "/" in name and len(revision) == 40
