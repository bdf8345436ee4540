"""sample.py: seeds, checkpoints, prompts, how samples are printed, wrong input."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import in_float32
from test_generate import BLOCK, window_length

import sample
from configurator import UserError
from formats.checkpoint import load_model, save_weights
from inference.text_stream import TextStream
from model import GPT, GPTConfig
from sample import newest_run, print_samples, read_prompt
from text.tokenizer import Tokenizer

ROOT = Path(sample.__file__).parent
BYTES = Tokenizer({"kind": "bytes"})  # 257 tokens, the last of them end of text
LETTERS = Tokenizer({"kind": "chars", "alphabet": "\n abcdefgé", "documents": True})  # 11
ONE_TEXT = Tokenizer({"kind": "chars", "alphabet": "abc", "documents": False})  # no end of text


def write_checkpoint(folder, tokenizer, rows=0, seed=1, block_size=BLOCK):
    """A tiny model with a vocabulary of `rows` rows, or just the tokenizer's, as train.py does."""
    folder.mkdir(parents=True)
    config = GPTConfig(block_size=block_size, vocab_size=rows or tokenizer.vocab_size, n_layer=2,
                       n_head=3, n_embd=21)
    model = GPT(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # or a token's likeliest successor is itself
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    save_weights(model, folder)
    tokenizer.save(folder)
    (folder / "meta.json").write_text(json.dumps({"model": asdict(config)}))
    return folder


def set_logits(folder, logits):
    """Make a checkpoint's model give these logits whatever it reads."""
    model = load_model(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight[:, 0] = torch.as_tensor(logits)
    save_weights(model, folder)


@pytest.fixture
def run_dir(tmp_path, number_format):
    """out/letters/ with two checkpoints, the better one not the latest."""
    run = tmp_path / "out" / "letters"
    for name, seed in (("iter_000002", 1), ("iter_000003", 2)):
        write_checkpoint(run / name, LETTERS, seed=seed)
    (run / "best").write_text("iter_000002\n")
    (run / "latest").write_text("iter_000003\n")
    return run


def texts(capsys, **settings):
    """Run sample.main; return its samples."""
    settings = {"device": "cpu", "dtype": "auto", "num_samples": 1, "max_new_tokens": 13,
                "start": "abc", **{key: str(value) if isinstance(value, Path) else value
                                   for key, value in settings.items()}}
    sample.main(**settings)
    *samples, rest = capsys.readouterr().out.split("\n---------------\n")
    assert rest == "" and len(samples) == settings["num_samples"]
    return samples


# ---------------------------------------------------------------------- the whole script


def test_seeds(run_dir, capsys):
    settings = {"out_dir": run_dir, "num_samples": 3, "temperature": 1.0}
    first, again = (texts(capsys, **settings, seed=1) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    other = texts(capsys, **settings, seed=2)
    assert not set(first) & set(other)  # samples 2, 3 of a seed are not samples 1, 2 of the next
    assert all(text.startswith("abc") and len(text) > 3 for text in first + other)


@in_float32
def test_samples_are_the_same_in_batches_of_any_size(run_dir, capsys):
    one, two, three = (texts(capsys, out_dir=run_dir, num_samples=3, seed=1, batch_size=size)
                       for size in (1, 2, 3))
    assert one == two == three


@in_float32
def test_greedy_samples_are_the_argmax_of_the_model(run_dir, capsys):
    model = load_model(run_dir / "iter_000002").eval()
    ids = LETTERS.encode_prompt("abc")
    while len(ids) < 16 and (token := int(model.logits(torch.tensor(
            [ids[-window_length(len(ids), 3):]]))[0, -1].argmax())) != LETTERS.eot:
        ids.append(token)
    assert len(ids) > BLOCK  # or the test is too easy
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-6}):
        assert texts(capsys, out_dir=run_dir, **settings) == [LETTERS.decode(ids)]


@pytest.mark.usefixtures("number_format")
def test_padded_ids_are_never_drawn_from_a_checkpoint(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "padded", LETTERS, rows=16)
    set_logits(folder, [0.0, 0.0, 0.0, 0.0, 1.0] + [0.0] * 6 + [9.0] * 5)
    assert texts(capsys, init_from=folder, temperature=0.0, start="a") == ["a" + "c" * 13]
    set_logits(folder, [0.0] * 10 + [3.0] + [9.0] * 5)  # end of text, then padding
    assert texts(capsys, init_from=folder, temperature=0.0, start="a") == ["a"]


def test_the_checkpoint_that_is_asked_for(run_dir, capsys):
    settings = {"temperature": 0.0}
    best = texts(capsys, init_from=run_dir / "iter_000002", **settings)
    latest = texts(capsys, init_from=run_dir / "iter_000003", **settings)
    assert best != latest
    assert texts(capsys, out_dir=run_dir, **settings) == best
    assert texts(capsys, out_dir=run_dir, checkpoint="latest", **settings) == latest
    assert texts(capsys, init_from=run_dir, checkpoint="latest", **settings) == latest
    with pytest.raises(ValueError, match="checkpoint='last': choose 'best', 'latest'"):
        texts(capsys, out_dir=run_dir, checkpoint="last")


def test_without_a_name_the_newest_run_is_taken(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older = tmp_path / "out" / "older"
    write_checkpoint(older / "iter_000005", LETTERS, seed=3)
    (older / "latest").write_text("iter_000005\n")
    for run, time in ((run_dir, 2000), (older, 1000)):
        os.utime(run / "latest", (time, time))
    assert newest_run(Path("out")) == Path("out/letters")
    assert texts(capsys, temperature=0.0) == texts(capsys, out_dir=run_dir, temperature=0.0)
    os.utime(older / "latest", (3000, 3000))
    assert newest_run(Path("out")) == Path("out/older")
    assert newest_run(older) == older


@pytest.mark.usefixtures("number_format")
def test_a_folder_whose_name_begins_like_gpt2s_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "gpt2-mine", LETTERS)
    assert texts(capsys, init_from="gpt2-mine")[0].startswith("abc")
    with pytest.raises(ValueError, match="gpt2-yours: neither a folder nor one of gpt2, gpt2-med"):
        texts(capsys, init_from="gpt2-yours")


# ---------------------------------------------------------------------- prompts


def test_prompts_from_a_file_and_from_standard_input(tmp_path, run_dir, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("gé\n", encoding="utf-8")
    start = f"FILE:{tmp_path / 'prompt.txt'}"
    assert read_prompt(start) == "gé\n"
    assert texts(capsys, out_dir=run_dir, start=start)[0].startswith("gé\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("fé".encode()), "ascii"))
    assert texts(capsys, out_dir=run_dir, start="-")[0].startswith("fé")
    assert read_prompt("-x") == "-x"


def test_prompts_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, reason in (("none", "cannot be read .No such file"),
                         ("latin", "is not UTF-8 text .*0xe9"),
                         ("", "cannot be read .*directory")):
        with pytest.raises(ValueError, match=f"start='FILE:.*{reason}"):
            read_prompt(f"FILE:{tmp_path / name}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9"), "latin-1"))
    with pytest.raises(ValueError, match="start='-': is not UTF-8 text .*0xe9"):
        read_prompt("-")


def test_an_empty_prompt_begins_at_end_of_text_where_there_is_one(run_dir, tmp_path, capsys):
    token = texts(capsys, out_dir=run_dir, start="<|endoftext|>", temperature=0.0)[0]
    empty = texts(capsys, out_dir=run_dir, start="", temperature=0.0)[0]
    assert token.startswith("<|endoftext|>")
    assert token.removeprefix("<|endoftext|>") == empty.removeprefix("<|endoftext|>") != ""
    folder = write_checkpoint(tmp_path / "one_text", ONE_TEXT)
    assert len(texts(capsys, init_from=folder, start="a")[0]) == 14
    with pytest.raises(ValueError, match="the prompt is empty, and this model has no end-of-text"):
        texts(capsys, init_from=folder, start="")


# ---------------------------------------------------------------------- printing


def test_a_character_of_several_tokens_is_printed_whole():
    text = "aé€😀"
    ids = BYTES.encode(text).tolist()
    for prompt_ids, new_ids, printed in (
            (ids[:2], ids[2:], text),  # the prompt ends inside é
            (ids[:1], ids[1:-1], "aé€\N{REPLACEMENT CHARACTER}")):  # 😀 is cut short
        stream = TextStream(BYTES)
        text = stream.prompt(prompt_ids)
        for new_id in new_ids:
            piece = stream.add(new_id)
            assert "\N{REPLACEMENT CHARACTER}" not in piece
            text += piece
        assert text + stream.end() == printed


def test_text_is_printed_as_it_comes(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8"))

    def steps():
        assert printed.getvalue() == b"a"
        yield [ord("b"), ord("x")]
        assert printed.getvalue() == b"ab"
        yield [ord("c"), None]
        assert printed.getvalue() == b"abc"

    print_samples(steps(), 2, [ord("a")], BYTES)
    assert printed.getvalue() == b"abc\n---------------\nax\n---------------\n"


@in_float32
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(run_dir, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    sample.main(out_dir=str(run_dir), start="ég", num_samples=1, max_new_tokens=1, device="cpu")
    assert printed.getvalue().startswith(b"?g")


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
    ({"top_k": -1}, "top_k=-1: must be at least 0"),
    ({"num_samples": 0}, "num_samples=0: must be at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
    ({"top_p": 1.1}, "top_p=1.1: must be above 0"),
    ({"device": "gpu"}, "device='gpu': choose auto, cpu"),
    ({"dtype": "half"}, "dtype='half': choose auto, float32"),
    ({"compile": "maybe"}, "compile='maybe': choose auto"),
    ({"start": "abc X\tY"}, r"lacks '\\tXY'"),
    ({"out_dir": "nowhere"}, "nowhere: no checkpoint here.*train one.*--out_dir="),
])
@in_float32
def test_wrong_settings(settings, message, run_dir, capsys):
    with pytest.raises(ValueError, match=message):
        texts(capsys, **{"out_dir": run_dir, **settings})


def command(*flags, cwd, **kwargs):
    return subprocess.run([sys.executable, ROOT / "sample.py", *flags], cwd=cwd, timeout=120,
                          capture_output=True, **kwargs)


@pytest.mark.parametrize("other", [{"interactive": True}, {"show_probs": True},
                                   {"prompts": "questions.jsonl"}])
def test_a_draft_is_for_plain_samples(other):
    with pytest.raises(UserError, match="draft='lookup': is for plain samples; leave it out"):
        sample.main(draft="lookup", **other)


@in_float32
def test_a_draft_changes_nothing_but_the_speed(run_dir, tmp_path, capsys):
    settings = {"out_dir": run_dir, "num_samples": 2, "max_new_tokens": 23, "start": "ab"}
    smaller = write_checkpoint(tmp_path / "smaller", LETTERS, rows=16, seed=3, block_size=5)
    for temperature in (0.0, 1.0):
        plain = texts(capsys, **settings, temperature=temperature)
        for draft in ("lookup", run_dir, smaller):
            assert texts(capsys, **settings, temperature=temperature, draft=draft) == plain


@pytest.mark.parametrize(("draft", "message"), [
    ("other", "other': its tokenizer is not the model's; name a model that was trained on"),
    ("nowhere", "nowhere: no checkpoint here"),
])
@in_float32
def test_drafts_that_cannot_be_used(run_dir, tmp_path, draft, message, capsys):
    write_checkpoint(tmp_path / "other", BYTES)
    with pytest.raises(UserError, match=message):
        texts(capsys, out_dir=run_dir, draft=tmp_path / draft)


def test_a_missing_run_ends_in_one_line_and_exit_code_2(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode() == ("error: out/ has no run yet; train one with python train.py, "
                                    "or name a run's folder with --out_dir=\n")


@in_float32
def test_a_prompt_beyond_the_vocabulary_ends_in_one_line_and_exit_code_2(run_dir):
    done = command(f"--out_dir={run_dir}", "--start=-", cwd=run_dir, input=b"abXcYX")
    assert done.returncode == 2 and done.stdout == b""
    place, error = done.stderr.decode().splitlines()
    assert place == str(run_dir / "iter_000002")
    assert error.startswith("error: the vocabulary of 11 characters lacks 'XY'")


@pytest.mark.parametrize("command, says", [
    ("{} sample.py --out_dir={} >&-", "standard output is closed"),
    ("{} sample.py --out_dir={} --start=- <&-", "start='-': standard input is closed"),
])
@in_float32
def test_a_closed_stream_is_one_line(run_dir, command, says):
    done = subprocess.run(command.format(sys.executable, run_dir), shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {says}"), done.stderr
    assert done.stderr.count("\n") == 1
