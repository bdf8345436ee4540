"""inference/prompts.py: many prompts through sample.py, and files that are wrong."""

import errno
import json
from functools import partial

import pytest
import torch
from conftest import in_float32
from test_chat import LETTERS as CHAT
from test_sample import LETTERS, ONE_TEXT, set_logits, texts, write_checkpoint

import sample
from configurator import UserError
from formats.checkpoint import load_model
from inference.prompts import Entry, encode_entries, read_prompts
from text.chat import encode_messages


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


@in_float32
def test_conversations_are_answered_up_to_the_end_of_the_answer(tmp_path, number_format):
    folder = write_checkpoint(tmp_path / "model", CHAT, block_size=31)
    end, c = CHAT.special["<|end|>"], 4
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"},
                {"role": "user", "content": "e"}]
    lines = [{"messages": messages, "id": 7}, {"prompt": "a"}]
    for likeliest, samples in ((end, [[""], ["<|end|>" * 3]]), (c, [["ccc"], ["ccc"]])):
        set_logits(folder, [9.0 * (i == likeliest) for i in range(CHAT.vocab_size)])
        assert answers(tmp_path, folder, lines) == [
            {**line, "samples": texts} for line, texts in zip(lines, samples, strict=True)]
    # what the model reads
    ids, = encode_entries([Entry("", lines[0])], CHAT, load_model(folder),
                          partial(encode_messages, CHAT))
    assert CHAT.decode(ids) == ("<|endoftext|><|user|>abc<|end|><|assistant|>d<|end|>"
                                "<|user|>e<|end|><|assistant|>")


def answers(tmp_path, folder, lines):
    """Return the objects that sample.py writes for some lines."""
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sample.main(init_from=str(folder), prompts=str(tmp_path / "in.jsonl"), num_samples=1,
                out=str(tmp_path / "out.jsonl"), max_new_tokens=3, temperature=0, device="cpu")
    written = (tmp_path / "out.jsonl").read_text().split("\n")
    return [json.loads(line) for line in written if line]


@pytest.mark.parametrize(("tokenizer", "line", "message"), [
    (ONE_TEXT, '{"prompt": "abX"}', "line 2: the vocabulary of 3 characters lacks 'X'"),
    (ONE_TEXT, '{"prompt": ""}', "line 2: the prompt is empty, and this model has no end-of-text"),
    (ONE_TEXT, '{"prompt": 1}', "line 2: the prompt is not a text"),
    (ONE_TEXT, '{"messages": [{"role": "user", "content": "a"}]}',
     "line 2: messages: this model was not trained on conversations"),
    (CHAT, '{"messages": "a"}', "line 2: messages: must be a list of at least one object"),
    (CHAT, '{"messages": [{"role": "narrator"}]}', "line 2: messages, message 1: unknown role"),
])
@in_float32
def test_lines_that_the_model_cannot_read(tmp_path, tokenizer, line, message, number_format):
    folder = write_checkpoint(tmp_path / "model", tokenizer)
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=f"in.jsonl, {message}"):
        sample.main(init_from=str(folder), prompts=str(tmp_path / "in.jsonl"), device="cpu",
                    out=str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_ends_at_a_line_break_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a\u2028b\x85c"\r\n\n"d"\n', encoding="utf-8", newline="")
    assert [entry.row["prompt"] for entry in read_prompts(str(path))] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(("text", "message"), [
    ('{"prompt": "a"}\n{"text": "a"}', "line 2: neither a text nor an object with a \"prompt\""),
    ('{"prompt": "a", "messages": []}', "line 1: neither"),
    ('"a"\n"\\ud800"', "line 2: not JSON in UTF-8 .*surrogates not allowed"),
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
                    out=str(tmp_path / "out.jsonl"), num_samples=1, max_new_tokens=3)
