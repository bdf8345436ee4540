"""inference/prompts.py: many prompts through sample.py, and files that are wrong."""

import errno
import json

import pytest
import torch
from conftest import in_float32
from test_sample import LETTERS, texts, write_checkpoint

import sample
from inference.prompts import read_prompts


@in_float32
def test_each_prompt_gets_the_samples_that_it_gets_alone(tmp_path, capsys, number_format):
    folder = write_checkpoint(tmp_path / "model", LETTERS)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc", "id": 7}\n\n"g"\n{"prompt": "é' + "d" * 13 + '"}\n')
    settings = {"init_from": folder, "num_samples": 2, "max_new_tokens": 11, "temperature": 1.0}
    sample.main(**{**settings, "init_from": str(folder)}, prompts=str(prompts), out=str(out),
                batch_size=3, device="cpu")
    said = capsys.readouterr().err
    assert "the prompt has 14 tokens, of which the model sees the last 7" in said
    assert "tokens/s" in said
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry.pop("samples") and entry for entry in written] == [
        {"prompt": "abc", "id": 7}, {"prompt": "g"}, {"prompt": "é" + "d" * 13}]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    for entry in written:
        alone = texts(capsys, **settings, start=entry["prompt"])
        assert [entry["prompt"] + text for text in entry["samples"]] == alone


@pytest.mark.parametrize(("text", "message"), [
    ('{"prompt": "a"}\n{"prompt": 1}', "line 2: neither a text nor an object with a \"prompt\""),
    ('{"prompt": "a"\n', "line 1: not JSON"), ("[1]", "line 1: neither"), ("\n", "has no line")])
def test_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .*; name a .jsonl file"):
        read_prompts(str(tmp_path / "none"))
    for out in ("", str(tmp_path), str(tmp_path / "none" / "out.jsonl")):
        with pytest.raises(ValueError, match="with --prompts, name the file to write"):
            sample.main(prompts="x", out=out)


def test_a_failure_leaves_no_file(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", LETTERS)
    (tmp_path / "prompts.jsonl").write_text('"a"')
    monkeypatch.setattr(torch, "softmax", None)
    monkeypatch.setattr(torch, "searchsorted", None)
    with pytest.raises(TypeError):
        sample.main(init_from=str(folder), prompts=str(tmp_path / "prompts.jsonl"), device="cpu",
                    out=str(tmp_path / "out.jsonl"))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.jsonl"}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def write(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write_checkpoint(tmp_path / "model", LETTERS)
    (tmp_path / "prompts.jsonl").write_text('"a"')
    monkeypatch.setattr("inference.prompts.write_atomically", write)
    with pytest.raises(ValueError, match="out.jsonl: cannot be written .*make room, then run"):
        sample.main(init_from=str(folder), prompts=str(tmp_path / "prompts.jsonl"), device="cpu",
                    out=str(tmp_path / "out.jsonl"))
