"""neural.py and climb.py's neural rungs: the models, their training, the blanks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from token_files import write_token_file

import climb
from configurator import UserError
from ladder import neural
from ladder.neural import NEURAL, blanks_filled, make_neural, train_neural
from text.tokenizer import Tokenizer

LETTERS = Tokenizer({"kind": "chars", "alphabet": "abcdefg ", "documents": True})
TEXT = np.tile(np.arange(8), 150)
SMALL = SimpleNamespace(order=3, width=8, layers=2, dropout=0.0, learning_rate=0.01, seconds=0.0,
                        max_iters=5, seed=1, draws=6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(neural, "BATCH", (3, 7))
    monkeypatch.setattr(neural, "MASKED_BATCH", (3, 13))


@pytest.mark.parametrize("name", NEURAL)
def test_equal_seeds_give_equal_models(name):
    weights, curves = [], []
    for seed in (1, 1, 2):
        c = SimpleNamespace(**{**vars(SMALL), "seed": seed})
        model = make_neural(name, LETTERS, c)
        curve = train_neural(name, model, TEXT, TEXT[:50], LETTERS, c)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        curves.append([loss for _, loss in curve])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0]


def test_a_large_vocabulary_is_trained_on_a_part_of_the_softmax(monkeypatch):
    monkeypatch.setattr(neural, "LARGE_VOCABULARY", 9)
    for draws in (6, 0):
        c = SimpleNamespace(**{**vars(SMALL), "draws": draws})
        model = make_neural("rnn", LETTERS, c)
        train_neural("rnn", model, TEXT, TEXT[:50], LETTERS, c)
        assert (model.sampler is not None) == (draws > 0)


def test_an_mlp_of_order_1_is_refused():
    with pytest.raises(UserError, match="order=1: mlp predicts from the order - 1 tokens before"):
        make_neural("mlp", LETTERS, SimpleNamespace(**{**vars(SMALL), "order": 1}))


def test_blanks_of_a_prompt_or_of_the_text_are_filled():
    model = make_neural("masked", LETTERS, SMALL)
    text, first, second = blanks_filled(model, LETTERS, TEXT, "a[MASK]c[MASK]").splitlines()
    assert len(text) == 4 and text[0] + text[2] == "ac"
    assert first.startswith("blank 1: '") and second.count("%") == 5
    lines = blanks_filled(model, LETTERS, TEXT, "").splitlines()
    assert len(lines) == 2  # of 13 // 2 tokens one


def test_climb_trains_measures_and_compares_at_the_same_blanks(tmp_path, capsys):
    for split, ids in (("train", TEXT), ("val", TEXT[:90])):
        write_token_file(tmp_path / f"{split}_000000.bin", ids)
    (tmp_path / "tokenizer.json").write_text('{"kind": "chars", "alphabet": "abcdefg ", '
                                             '"documents": true}')
    (tmp_path / "meta.json").write_text('{"tokenizer": "chars", "vocab_size": 9, "splits": '
                                        '{"train": {}, "val": {}}}')
    settings = dict(dataset=f"{tmp_path}", out_dir=f"{tmp_path / 'out'}", start="a", seconds=0.0,
                    max_iters=3, width=8, sample_tokens=5, order=3)
    for name in ("lstm", "masked"):
        climb.main(**settings, model=name)
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in table.splitlines()
            if line.startswith(("lstm ", "masked "))}
    assert rows["masked"][1:5] == ["-"] * 4 and float(rows["masked"][5]) > 1
    assert float(rows["lstm"][2]) == pytest.approx(float(rows["lstm"][5]), abs=0.3)
    # a second call trains nothing
    climb.main(**settings, model="lstm")
    assert "training" not in capsys.readouterr().out
