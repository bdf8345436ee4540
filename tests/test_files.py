"""formats/files.py: files are written whole or not at all; what is not JSON is named."""

import errno
import json
import os

import pytest

from configurator import UserError
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


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left on device"), "(No space left on device); make room, th"),
    (OSError(errno.EACCES, "Permission denied"), "(Permission denied); remove the cause, then go "),
    (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "make room"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed wri"),
     "(torch.save failed); make room, if the disk is full, then go on with")])
def test_what_cannot_be_written_names_the_cause_and_the_remedy(tmp_path, error, says):
    with pytest.raises(UserError) as raised, files.naming_write_errors(tmp_path / "x"):
        raise error
    assert str(raised.value).startswith(f"{tmp_path}/x: cannot be written (")
    assert says in str(raised.value)


def test_a_folder_that_vanished_is_no_full_disk(tmp_path):
    path = tmp_path / "run/x"
    with pytest.raises(UserError) as raised, files.naming_write_errors(path):
        path.write_text("text")
    assert str(raised.value) == (f"{path}: cannot be written (its folder has vanished); put it "
                                 "back, then go on with --init_from=resume")


def test_a_bug_while_writing_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError), files.naming_write_errors(tmp_path / "x"):
        raise KeyError("a bug")
