"""inference/chat.py: answers with a cache that is kept, turns that are forgotten, the terminal."""

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import CPU
from test_sample import LETTERS as PLAIN
from test_sample import ONE_TEXT, set_logits, write_checkpoint

import sample
from configurator import UserError
from formats.checkpoint import load_model
from inference.chat import Conversation, obey
from inference.generate import Batch
from inference.sampling import Sampling
from inference.writing import Writing
from text.chat import SPECIAL, encode_question
from text.tokenizer import Tokenizer, add_special

ROOT = Path(sample.__file__).parent
LETTERS = Tokenizer(add_special(
    {"kind": "chars", "alphabet": "\n abcdefgé", "documents": True}, SPECIAL))
END, ASSISTANT = LETTERS.special["<|end|>"], LETTERS.special["<|assistant|>"]


def random_model(folder, block_size, seed):
    write_checkpoint(folder, LETTERS, seed=seed, block_size=block_size)
    return load_model(folder).eval()


def writing(model, count, temperature, compiled=False):
    sampling = Sampling(temperature, 0, 1.0, LETTERS.vocab_size)
    return Writing(model, LETTERS, sampling, [], count, 1, CPU, compiled)


@torch.no_grad()
def read_anew(model, ids, count):
    """The likeliest answer, without a cache."""
    answer = []
    while len(answer) < count:
        new_id = int(model.logits(torch.tensor([ids + answer]))[0, -1].argmax())
        if new_id in (END, LETTERS.eot):
            break
        answer.append(new_id)
    return answer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_each_answer_is_that_to_all_turns_that_fit(seed, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    T, count = 61, 7
    model, reads = random_model(tmp_path / "it", T, seed), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: (
        reads.append(tokens.shape[1]), hidden(tokens, *rest))[1])
    conversation = Conversation(writing(model, count, 0.0, compiled))

    turns, forgotten, lengths = [], 0, set()
    for question in ("abc", "d", "efgabc", "é", "a" * 13, "b", "c" * 17, "d", "e"):
        ids = encode_question(LETTERS, question)
        turns.append(ids)
        dropped = 0
        while 1 + sum(map(len, turns)) + 1 + count > T:
            turns, dropped = turns[2:], dropped + 1
        assert conversation.ask(ids) == dropped
        forgotten += dropped
        prompt = [LETTERS.eot, *sum(turns, []), ASSISTANT]
        reads.clear()
        answer = list(conversation.answer())

        # Of what is remembered only the new message is read, with the end of the last answer.
        if len(turns) > 1 and not dropped:
            assert reads[0] <= len(ids) + 3  # <|assistant|> too
        assert set(reads[1:]) <= {1}
        assert answer == read_anew(model, prompt, count)
        turns.append([ASSISTANT, *answer, END])
        lengths.add(len(answer))
    assert forgotten >= 3 and count in lengths


def test_answers_that_end_at_once_and_questions_that_are_too_long(tmp_path):
    write_checkpoint(tmp_path / "it", LETTERS, block_size=31)
    set_logits(tmp_path / "it", [99.0 * (i == END) for i in range(LETTERS.vocab_size)])
    conversation = Conversation(writing(load_model(tmp_path / "it").eval(), 500, 1.0))
    with pytest.raises(ValueError, match="has 15 tokens, and the model can read 14; shorten it"):
        conversation.ask(encode_question(LETTERS, "a" * 13))
    for question, forgotten in (("a" * 12, 0), ("b", 1), ("c", 0), ("d", 0), ("ab", 1), ("ab", 2)):
        assert conversation.ask(encode_question(LETTERS, question)) == forgotten
        assert list(conversation.answer()) == []


# ---------------------------------------------------------------------- the terminal


@pytest.fixture
def chats(tmp_path, number_format):
    return write_checkpoint(tmp_path / "chats", LETTERS, block_size=31)


def talk(monkeypatch, text, folder, **settings):
    """Run sample.main with a standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    sample.main(**{"init_from": str(folder), "device": "cpu", "interactive": True,
                   "max_new_tokens": 5, **settings})


def test_each_line_gets_an_answer_and_a_seed_means_the_same(chats, monkeypatch, capsys):
    lines = "abc\n\n  \né\nb\ng\nd".encode()
    said = []
    for seed in (1, 1, 7):
        talk(monkeypatch, lines, chats, seed=seed)
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out != said[2].out
    assert "-----" not in said[0].out and not said[0].out.startswith("> ")
    assert "(the context is full; questions forgotten with their answers: 1)" in said[0].err


def test_what_cannot_be_answered(chats, monkeypatch, capsys):
    set_logits(chats, [99.0 * (i == 2) for i in range(LETTERS.vocab_size)])
    talk(monkeypatch, b"a" * 40 + b"\nxa\nb", chats)
    said = capsys.readouterr()
    assert said.out == "aaaaa\n"
    assert "this message has 42 tokens, and the model can read 24; shorten it" in said.err
    assert "the vocabulary of 11 characters lacks 'x'" in said.err

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        sample.main(init_from=str(chats), device="cpu", interactive=True)


def test_set_changes_each_setting(tmp_path):
    conversation = Conversation(writing(random_model(tmp_path / "it", 31, 1), 5, 1.0))
    for key, value, now in (("temperature", "0.5", 0.5), ("top_k", "3", 3), ("top_p", "0.75", 0.75),
                            ("min_p", "0.25", 0.25), ("repetition_penalty", "2", 2.0)):
        obey(["/set", key, value], conversation, sample.LIMITS)
        assert getattr(conversation.sampling, key) == now
    obey(["/set", "max_new_tokens", "3"], conversation, sample.LIMITS)
    assert conversation.room() == 3 and conversation.sampling.vocab_size == LETTERS.vocab_size


def test_set_holds_from_the_next_answer_on(chats, monkeypatch, capsys):
    set_logits(chats, [3.0 * (i in (2, 3)) for i in range(LETTERS.vocab_size)])
    lines = b"b\n/set top_k 1\nb\n/set max_new_tokens 2\nb\n"
    talk(monkeypatch, lines, chats, temperature=1.0, max_new_tokens=7)
    free, greedy, short = capsys.readouterr().out.splitlines()
    assert free != "aaaaaaa" == greedy and short == "aa"


def test_ctrl_c_ends_an_answer_and_not_the_program(chats, monkeypatch, capsys):
    set_logits(chats, [99.0 * (i == 2) for i in range(LETTERS.vocab_size)])
    step, calls = Batch.step, []

    def interrupted(self):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Batch, "step", interrupted)
    talk(monkeypatch, b"b\n/history\nc\n", chats)
    assert capsys.readouterr().out.splitlines() == [
        "aa", "<|endoftext|><|user|>b<|end|><|assistant|>aa<|end|><|assistant|>", "aaaaa"]


@pytest.mark.parametrize(("command", "message"), [
    ("/set topk 3", "/set topk: choose temperature, top_k, top_p, min_p, repetition_penalty, max_"),
    ("/set vocab_size 3", "/set vocab_size: choose temperature"),
    ("/set top_k many", "/set top_k many: not a whole number"),
    ("/set temperature -1", "temperature=-1.0: must be at least 0"),
    ("/set max_new_tokens 0", "max_new_tokens=0: must be at least 1"),
    ("/set top_k", "/set: give a setting and its value, as in /set top_k 50"),
    ("/sett top_k 3", "/sett top_k 3: no such command; /help lists them"),
])
def test_commands_that_cannot_be_obeyed(command, message, tmp_path):
    conversation = Conversation(writing(random_model(tmp_path / "it", 31, 1), 5, 1.0))
    before = conversation.sampling
    with pytest.raises(UserError, match=message):
        obey(command.split(), conversation, sample.LIMITS)
    assert conversation.sampling == before


def test_a_model_without_conversations_continues_what_is_typed(tmp_path, monkeypatch, capsys):
    for tokenizer, begin in ((PLAIN, "<|endoftext|>"), (ONE_TEXT, "")):
        folder = write_checkpoint(tmp_path / str(len(begin)), tokenizer, block_size=31)
        c = tokenizer.encode("c")[0]
        set_logits(folder, [9.0 * (i == c) for i in range(tokenizer.vocab_size)])
        talk(monkeypatch, b"ab\n/history\nb\n/history\n/new\n/history\n/exit\nb", folder,
             temperature=0, max_new_tokens=3)
        assert capsys.readouterr().out.split("\n") == [
            "ccc", f"{begin}abccc", "ccc", f"{begin}abcccbccc", begin, ""]


def test_in_a_terminal_there_is_a_prompt(tmp_path):
    pty = pytest.importorskip("pty")
    chats = write_checkpoint(tmp_path / "chats", LETTERS, block_size=31)
    set_logits(chats, [99.0 * (i == 2) for i in range(LETTERS.vocab_size)])
    ours, theirs = pty.openpty()
    command = [sys.executable, Path(sample.__file__), f"--init_from={chats}", "--device=cpu",
               "--interactive=True", "--max_new_tokens=5"]
    done = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(theirs)
    os.write(ours, b"b\n")
    answer = done.stdout.read(10)
    while done.stderr.readline() != b"/help lists the commands\n":
        pass
    # Ctrl-C at the prompt ends nothing. One that comes before the program reads waits for input.
    for _ in range(100):
        done.send_signal(signal.SIGINT)
        said, _, _ = select.select([done.stderr], [], [], 0.2)
        if said:
            break
    assert said, "it takes no notice"
    assert [done.stderr.readline(), done.stderr.readline()] == [b"\n", b"Ctrl-D ends\n"]
    os.write(ours, b"c\n\x04")
    out, error = done.communicate(timeout=60)
    os.close(ours)
    assert done.returncode == 0, error
    assert (answer + out).replace(b"> ", b"") == b"aaaaa\naaaaa\n\n"
