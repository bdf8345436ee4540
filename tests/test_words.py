"""text/words.py and --val_input: the most common words, line ends, files for validation."""

import numpy as np
import pytest
from test_prepare import ids_of, make_pieces_small, meta_of

import prepare
from configurator import UserError
from text.bpe import read_spec
from text.tokenizer import Tokenizer
from text.tokenizer_json import hugging_face_from_spec
from text.words import words_spec

TRAIN = "b a u.s. a b\n a <unk> it's , b\n"
VAL = " a c\n\n b"


@pytest.fixture
def prepare_words(tmp_path):
    """Return a function that prepares two texts as words and returns the dataset's folder."""
    def prepared(train, val, **settings):
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "val.txt").write_text(val)
        prepare.main(dataset=f"{tmp_path}/data", input=f"{tmp_path}/train.txt",
                     val_input=f"{tmp_path}/val.txt",
                     **{"tokenizer": "words", "vocab_size": 5, **settings})
        return tmp_path / "data"

    return prepared


def test_the_most_common_words_get_ids(prepare_words):
    folder = prepare_words(TRAIN, VAL)
    tokenizer = Tokenizer.load(folder)
    # a and b are equally common, and so are the others: in the order of the alphabet
    assert tokenizer.spec["words"] == ["\n", "<unk>", "a", "b", ","]
    assert ids_of(folder, "train") == [3, 2, 1, 2, 3, 0, 2, 1, 1, 4, 3, 0]
    assert ids_of(folder, "val") == [2, 1, 0, 0, 3]
    assert tokenizer.decode([2, 1, 0, 3]) == " a <unk>\n b" and tokenizer.eot == 0
    assert meta_of(folder)["splits"]["val"]["bytes"] == len(VAL)
    assert read_spec(folder / "tokenizer.json") == tokenizer.spec


def test_words_stay_whole_in_pieces_of_any_size(prepare_words, monkeypatch):
    words = [f"{'x' * (i % 7)}{i}.{i},{'y' * (i % 5)}" for i in range(300)]
    make_pieces_small(monkeypatch, 37)
    folder = prepare_words(" ".join(words) + "\n", VAL, vocab_size=1000)
    assert Tokenizer.load(folder).decode(ids_of(folder, "train")).split() == words
    assert len(np.unique(ids_of(folder, "train"))) == 301


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_files_for_validation_are_all_of_it(prepare_words, kind):
    folder = prepare_words("ab" * 500, "ba", tokenizer=kind)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(ids_of(folder, "train")) == "ab" * 500
    assert tokenizer.decode(ids_of(folder, "val")) == "ba"
    assert meta_of(folder)["source"]["val_input"] == "val.txt"


def test_what_words_cannot_do():
    with pytest.raises(UserError, match="vocab_size=2: words need at least 3"):
        words_spec(["a b"], 2)
    with pytest.raises(UserError, match="does not keep white space"):
        hugging_face_from_spec(words_spec(["a b"], 4))
    with pytest.raises(UserError, match="tokenizer='words' must read all of the text"):
        prepare.main(dataset="fineweb", tokenizer="words")
    with pytest.raises(UserError, match="val_input='x.txt': goes with text of your own"):
        prepare.main(dataset="fineweb", val_input="x.txt")
