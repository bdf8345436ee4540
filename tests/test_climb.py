"""climb.py: rungs are trained once and measured alike; what a user can get wrong."""

import json

import numpy as np
import pytest

import climb
import prepare
from configurator import UserError

QUICK = dict(sample_tokens=7, seconds=0.0, max_iters=1, width=12, layers=1, eval_tokens=300)


@pytest.fixture(scope="module", name="folder")
def prepared(tmp_path_factory):
    """A folder with the dataset `data`, and `other` of the same tokenizer."""
    folder = tmp_path_factory.mktemp("ladder")
    texts = {"train": "the cat sat on the mat. " * 300, "val": "the mat sat on the cat. " * 40}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    for name in ("data", "other"):
        prepare.main(dataset=f"{folder}/{name}", input=f"{folder}/train.txt",
                     val_input=f"{folder}/val.txt", tokenizer="chars")
    return folder


def climb_with(folder, name, **settings):
    """Climb one rung; return its meta.json."""
    climb.main(**{"dataset": f"{folder}/data", "out_dir": f"{folder}/out", "model": name,
                  "start": "the ", **QUICK, **settings})
    return json.loads((folder / "out" / name / "meta.json").read_text())


@pytest.mark.parametrize("name", climb.NGRAMS)
def test_a_rung_is_measured_and_drawn(folder, name, capsys):
    meta = climb_with(folder, name, test=f"{folder}/other")
    assert meta["unit"] == "bytes" and meta["test_loss"] == meta["loss"]
    assert len(meta["sample"]) == 4 + 7 and meta["sample"].startswith("the ")
    # each character is a byte
    assert meta["bits_per_byte"] == pytest.approx(meta["loss"] / np.log(2))
    assert f"{meta['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert (folder / "out/climb.png").stat().st_size > 1000


def test_a_finished_rung_is_not_trained_again(folder, monkeypatch):
    first = climb_with(folder, "kneser_ney", order=3)

    def refuse(*arguments):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(climb, "train_model", refuse)
    with monkeypatch.context() as inner:
        inner.setattr(climb, "measure", refuse)
        assert climb_with(folder, "kneser_ney", order=3) == first
    # another sample needs the model, as it was saved
    again = climb_with(folder, "kneser_ney", order=3, sample_tokens=5)
    assert again["loss"] == first["loss"] and again["sample"] == first["sample"][:-2]
    with pytest.raises(AssertionError, match="it was trained again"):
        climb_with(folder, "kneser_ney", order=4)


def test_a_transformer_is_a_run_of_train_py(folder):
    meta = climb_with(folder, "gpt", max_iters=2)
    assert (folder / "out/gpt/latest").is_file() and meta["unit"] == "parameters"
    assert len(meta["curve"]) >= 1 and np.isfinite(meta["loss"])


def test_word_vectors_are_described_and_drawn(folder):
    meta = climb_with(folder, "vectors", words="cat mat")
    assert meta["sample"].startswith("cat: ") and "\nmat: " in meta["sample"]
    assert (folder / "out/vectors/words.png").is_file()


@pytest.mark.parametrize("settings, says", [
    (dict(order=0), "order=0: must be at least 1"),
    (dict(model="kneser"), "model='kneser': choose '', 'maximum_likelihood', 'add_k', "),
    (dict(model="kneser_ney", order=100, train_tokens=90), "order=100: the training text has 90"),
    (dict(model="add_k", start=""), "start='': this dataset has no documents"),
    (dict(model="vectors", words="cat dog"), "words: the vocabulary of 5 lacks 'dog'; choose"),
    (dict(dataset="nowhere"), "nowhere: no token files here; prepare them with python prepare.py"),
])
def test_wrong_settings_are_said_in_one_line(folder, settings, says):
    name = settings.pop("model", "add_k")
    with pytest.raises(UserError) as error:
        climb_with(folder, name, **settings)
    assert says in str(error.value) and "\n" not in str(error.value)
