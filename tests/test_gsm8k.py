"""evaluation/gsm8k.py: the numbers that are found in solutions, and how these are written."""

import gzip
import json
import re

import pytest
import torch
from conftest import ROOT, in_processes

from evaluation import gsm8k
from evaluation.gsm8k import flexible_answer, normalize, solve, strict_answer, write_solution
from evaluation.questions import gsm8k as gsm8k_question
from model import GPTConfig
from runtime.processes import Runtime
from text.tokenizer import Tokenizer

GOLD = ROOT.parent / "shared/data/evals/gsm8k_test.jsonl.gz"
CPU = Runtime(torch.device("cpu"), torch.float32)
BYTES = Tokenizer({"kind": "bytes"})


@pytest.mark.parametrize(("text", "strict", "flexible"), [
    (" 3 + 4 = 7.\n#### 7", "7", "7"),
    (" It is $1,234.50.\n#### $1,234.50", "[invalid]", "1234.50"),  # strict wants a digit
    ("#### -12", "-12", "-12"),
    ("#### 12. So 13", "12", "13"),
    ("#### 5\n#### 6", "5", "6"),  # the first, the last
    ("#### 1,000 eggs", "1000", "1000"),
    ("The answer is 42", "[invalid]", "42"),
    ("no number", "[invalid]", "[invalid]"),
    ("", "[invalid]", "[invalid]"),
    ("It costs $5.", "[invalid]", "5")])
def test_the_number_in_a_solution(text, strict, flexible):
    assert normalize(strict_answer(text)) == strict
    assert normalize(flexible_answer(text)) == flexible


@pytest.mark.skipif(not GOLD.is_file(), reason=f"no solutions: {GOLD} is missing")
def test_all_gold_solutions_answer_themselves():
    with gzip.open(GOLD, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        solution = gsm8k_question(row).requests[0][1]
        number = re.search(r"#### ([-\d,]+)$", solution)[1].replace(",", "")
        assert normalize(strict_answer(solution)) == number == normalize(solution)
        assert normalize(flexible_answer(solution)) == number
    assert len(rows) == 1319


class Typist:
    """Stands in for a model: writes a text, byte by byte, after any prompt."""

    training = False

    def __init__(self, text, block_size=101):
        self.config = GPTConfig(block_size=block_size)
        self.ids, self.prompt, self.written = [*text.encode(), BYTES.eot], None, 0

    def eval(self):
        return self

    def train(self, mode):
        assert not mode

    def make_cache(self, batch_size, dtype, length):
        return torch.zeros(1, 2, batch_size, 1, self.config.block_size, 1)

    def hidden(self, tokens, cache, start):
        if start == 0:
            self.prompt, self.written = "", 0
        if self.written == 0:
            self.prompt += bytes(tokens[0].tolist()).decode()
        return torch.zeros(*tokens.shape, 1)

    def head(self, x):
        logits = torch.zeros(len(x), 257)
        logits[:, self.ids[self.written % len(self.ids)]] = 1
        self.written += 1
        return logits


@pytest.mark.parametrize(("text", "written"), [
    (" 7\n#### 7\n\nQuestion: What", " 7\n#### 7\n\n"), ("#### 8</s> 9", "#### 8"),
    ("#### 8<|im_end|> 9", "#### 8"), ("#### 8", "#### 8")])
def test_a_solution_ends_at_a_stop_or_at_the_end_of_the_text(text, written):
    model = Typist(text)
    assert write_solution(model, BYTES, CPU, "Question: a\nAnswer:") == written
    assert model.written <= len(text) + 1


def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_the_solution(monkeypatch):
    model = Typist("1" * 500, block_size=101)
    assert write_solution(model, BYTES, CPU, "x" * 90 + "Answer:") == "1" * 50
    assert model.prompt == "x" * 44 + "Answer:"  # 51 tokens, and the window never moves
    monkeypatch.setattr(gsm8k, "MAX_NEW_TOKENS", 3)
    assert write_solution(model, BYTES, CPU, "x" * 90 + "Answer:") == "111"
    assert model.prompt == "x" * 90 + "Answer:"


QUESTIONS = [gsm8k_question({"question": "?", "answer": f"It is {n}.\n#### {n}"})
             for n in (7, "1,007", 5, 8, 5)]


def test_strict_and_flexible_answers_are_counted():
    seen = []
    result = solve(Typist(" 1 + 4\n#### 5. Not 8"), BYTES, CPU, QUESTIONS, seen.append)
    assert result["exact_match"] == result["centred"] == 2 / 5
    assert result["flexible_match"] == 1 / 5
    assert result["exact_match_stderr"] == pytest.approx((0.4 * 0.6 / 4) ** 0.5)
    assert (result["questions"], result["chance"], seen) == (5, 0, [0.2, 0.4, 0.6, 0.8, 1])


def test_several_processes_share_the_questions_and_agree():
    def solve_a_share(rank):
        from runtime.processes import setup

        with setup("cpu", "float32") as runtime:
            runtime.init_process_group()
            model = Typist(" 1 + 4\n#### 5. Not 8")
            result = solve(model, BYTES, runtime, QUESTIONS)
            print(result["exact_match"], result["flexible_match"], result["questions"])

    codes, said = in_processes(2, solve_a_share)
    assert codes == [0, 0] and said == ["0.4 0.2 5\n"] * 2
