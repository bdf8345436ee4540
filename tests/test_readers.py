"""documents.py: every kind of file, packed or not, and what is wrong with them."""

import pytest
from test_corpus import packed, read, write_jsonl, write_parquet

from documents import readers
from documents.corpus import Files


@pytest.mark.parametrize("bad_text, kept", [("skip", ["good one"]),
                                            ("replace", ["bad \ufffd one", "good one"])])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_bad_text_is_skipped_or_replaced(tmp_path, capsys, kind, bad_text, kept):
    readers.warn_once.cache_clear()
    if kind == "txt":
        packed(tmp_path / "in/a.txt", b"bad \xff one")
        packed(tmp_path / "in/b.txt", b"good one")
    else:
        rows = {"jsonl": b'{"text": "bad \xff one"}\n{"text": "good one"}\n',
                "csv": b"text\nbad \xff one\ngood one\n"}[kind]
        packed(tmp_path / f"in/x.{kind}", rows)
    pieces = read(sorted((tmp_path / "in").iterdir()), "text", bad_text)
    assert pieces == [(True, text) for text in kept]
    read(sorted((tmp_path / "in").iterdir()), "text", bad_text)
    said = capsys.readouterr().err
    assert said.count("skipped: ") == (bad_text == "skip")
    assert (": not UTF-8" in said) == (bad_text == "skip")


def test_the_position_of_bad_text_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 8)
    for good in range(1, 40):
        path = packed(tmp_path / "x.txt", b"\xc3\xa9" * good + b"\xc3(" + b"x" * 30)
        with pytest.raises(ValueError, match=rf"x\.txt, byte {2 * good}: not UTF-8 \(0xc3"):
            read([path], "text")


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.jsonl.zst"])
def test_a_damaged_packed_file_is_named(tmp_path, name):
    path = packed(tmp_path / name, b'{"text": "' + bytes(range(65, 91)) * 99 + b'"}')
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name}(: damaged|, line 1: not JSON)"):
        read([path], "text")
    path.write_bytes(b"this is not packed")
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        read([path], "text")


def test_a_csv_without_the_column(tmp_path):
    path = packed(tmp_path / "x.csv", b"id,body\n1,text\n")
    with pytest.raises(ValueError, match="no column 'text' .it has: id, body.; name it with"):
        read([path], "text")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_other_columns_come_with_the_text(tmp_path, kind):
    if kind == "parquet":
        path = write_parquet(tmp_path / "x.parquet", ["a", "b"])
        rows = [{"id": 0}, {"id": 1}]
    elif kind == "jsonl":
        path, rows = write_jsonl(tmp_path / "x.jsonl", ["a", "b"]), [{"id": 7}, {"id": 7}]
    else:
        path, rows = packed(tmp_path / "x.csv", b"id,text\n7,a\n8,b\n"), [{"id": "7"}, {"id": "8"}]
    extra_columns = ("url", "id")
    found = [(True, "a", rows[0]), (True, "b", rows[1])]
    assert list(Files([path], "text", "stop", extra_columns)) == found
    assert [row for *_, row in Files([path])] == [{}, {}]
