"""formats/files.py: files are written whole or not at all; what is not JSON is named."""

import json
import os

import pytest

from formats import files


def test_a_written_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    files.write_atomically(path, "first\r\n\n")
    assert path.read_bytes() == b"first\r\n\n"
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "half \udcff")
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, "second")
    assert path.read_bytes() == b"first\r\n\n" and [*tmp_path.iterdir()] == [path]


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": "é"}), encoding="utf-8")
    assert files.read_json(tmp_path / "x.json") == {"a": "é"}
    with pytest.raises(ValueError, match="nowhere.json: No such file"):
        files.read_json(tmp_path / "nowhere.json")
