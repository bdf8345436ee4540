"""tokenizer.py, bpe.py and text/tokenizer_json.py: text in, the same text out; training against
its plain loop and Hugging Face's encoding; files that give Hugging Face's ids, or are refused."""

import base64
import json
import random
from pathlib import Path

import numpy as np
import pytest

import prepare
from configurator import UserError
from documents import corpus
from formats.shards import TokenReader
from text import split as text_split
from text.bpe import PATTERNS, bpe_merges, read_spec, train_bpe, train_by_library
from text.tokenizer import Tokenizer, add_special, extends, load_tokenizer
from text.tokenizer_json import BYTES, EOT, LETTERS

SHAKESPEARE = Path(prepare.__file__).parent.parent / "shared/data/tinyshakespeare/input.txt"
TRICKY = ("First\r\nline\r\n\r\n\r\nit's 3.14 -- don't!\n\n\n\n\n    indented = True  # 1,000\n\t"
          "tab \n  \n漢字かな、カナ。句点！これは空白のない文章です。 😀 👩\u200d👩 é e\u0301 ½"
          " \u00a0\u3000x\u0085y <|endoftext|>\n")
VARIED = [  # without the names of special tokens, which Hugging Face reads as such in any text
    "", " ", "a", TRICKY.replace(EOT, "<|endof text|>"), "aaaaaaa aaaaaaaaaaaaaaa  aa", " " * 99,
    Path(__file__).read_text(encoding="utf-8")[:600], "\n \n\t\t \r\n\r\n   x\n\n",
    "DON'T It'S we'LL 'Re x'd ſ'ſ 1234567890 12,345.678 ١٢٣ Ⅷ²", "\0\x01\x7f\x80\xff\ufeff\ufffd",
    "हिन्दी में ไทย العربية עברית 한국어 Ελληνικά Кириллица İıßﬁ", "🇩🇪🏳️‍🌈👨‍👩‍👧‍👦☺️" * 9,
    "def f(x):\n    return {**x, 'a': [1, 2][::-1]}  # ok\n\n\nclass A: ...\n" * 3]


@pytest.fixture(scope="session", name="corpus")
def half_a_megabyte():
    """Half a megabyte of English, code and the characters of VARIED, in short texts."""
    texts = [path.read_text(encoding="utf-8") for path in corpus.stdlib_files()[:9]]
    if SHAKESPEARE.is_file():
        texts.append(SHAKESPEARE.read_text(encoding="utf-8")[:300_000])
    texts = [part for text in texts for part in corpus.cut(text.replace(EOT, ""), 1000)]
    return texts + VARIED * 3


def merges_of(spec):
    return [base64.b64decode(token) for token in spec["tokens"] if token][256:]


def soup(count, seed=0):
    """Random strings of every kind of character, blanks and apostrophes often."""
    rng = random.Random(seed)
    pools = [" \n\t\r\u00a0\u3000", "'sdtREVEllm", "aeiouthnrs", "0123456789½", ".,;:-_#()",
             "漢字かなカナ", "😀👩\u200d\u0301é", [chr(i) for i in range(0x250)]]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 60)))
            for _ in range(count)]


def same_ids(ours, theirs, texts):
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, (
            text[:200])
        assert ours.decode(ours.encode(text)) == text


# ---------------------------------------------------------------------- every kind


@pytest.fixture(params=["bytes", "chars", "chars of documents", "gpt2"])
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    if request.param == "bytes":
        return Tokenizer({"kind": "bytes"})
    alphabet = "".join(sorted(set(TRICKY + "abc")))
    return Tokenizer({"kind": "chars", "alphabet": alphabet,
                      "documents": request.param == "chars of documents"})


def test_decode_undoes_encode(tokenizer):
    for text in (TRICKY, "", "a"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot for i in ids)


def test_in_a_prompt_endoftext_is_its_token(tokenizer):
    a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
    ids = tokenizer.encode_prompt(f"{EOT}a{EOT}{EOT}b")
    if tokenizer.eot is None:
        assert ids == tokenizer.encode(f"{EOT}a{EOT}{EOT}b").tolist()
    else:
        assert ids == [tokenizer.eot, *a, tokenizer.eot, tokenizer.eot, *b]
        assert tokenizer.encode_prompt(EOT) == [tokenizer.eot]
    assert tokenizer.decode(ids) == f"{EOT}a{EOT}{EOT}b"
    assert tokenizer.encode_prompt("") == []
    assert tokenizer.encode_prompt("a") == a


def test_known_ids(gpt2):
    assert Tokenizer({"kind": "bytes"}).encode("aé").tolist() == [97, 195, 169]
    assert gpt2.encode("Hello world!\n\n  x").tolist() == [15496, 995, 0, 628, 220, 2124]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    chars = Tokenizer({"kind": "chars", "alphabet": "ace", "documents": True})
    assert chars.encode("ecca").tolist() == [2, 1, 1, 0]
    assert (chars.vocab_size, chars.eot) == (4, 3)


def test_half_a_character_is_replaced():
    assert Tokenizer({"kind": "bytes"}).decode([195, 97]) == "\ufffda"


def test_characters_that_the_vocabulary_lacks_are_named():
    chars = Tokenizer({"kind": "chars", "alphabet": "abc", "documents": False})
    with pytest.raises(ValueError, match="vocabulary of 3 characters lacks '#dé😀'"):
        chars.encode("ab😀dé#c😀")
    assert chars.encode_prompt("cab") == [2, 0, 1]


def test_load_gives_what_save_wrote(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.spec == tokenizer.spec
    assert (again.kind, again.vocab_size, again.eot) == (tokenizer.kind, tokenizer.vocab_size,
                                                         tokenizer.eot)
    assert again.encode(TRICKY).tolist() == tokenizer.encode(TRICKY).tolist()


@pytest.mark.parametrize("text", [
    pytest.param("[" * 100_000, id="nested"),
    "", "{", "[]", "{}", "\udcff", '{"kind": "syllables"}', '{"kind": "chars"}',
    '{"kind": "chars", "alphabet": 7, "documents": true}',
    '{"kind": "chars", "alphabet": ["ab"], "documents": true}',
    '{"kind": "gpt2", "pattern": "x"}',
    '{"kind": "gpt2", "pattern": "x", "tokens": ["%"], "special_tokens": {}}',
    '{"kind": "gpt2", "pattern": "x", "tokens": ["YQ=="], "special_tokens": {}}',
    '{"kind": "gpt2", "pattern": "(", "tokens": ["YQ=="], "special_tokens": {"<|endoftext|>": 1}}',
])
def test_a_damaged_tokenizer_json(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_dataset_s_tokenizer(tmp_path, do, gpt2, monkeypatch):
    monkeypatch.setattr("text.tokenizer.gpt2_spec", lambda: gpt2.spec)
    folder, _ = do(["some text"], tokenizer="chars")
    assert load_tokenizer(f"{folder}").spec["alphabet"] == " emostx"
    for split in ("train", "val"):
        np.array([5, 6], "<u2").tofile(tmp_path / f"{split}.bin")
    assert load_tokenizer(f"{tmp_path}/").spec == gpt2.spec  # ready-made files
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: No such file"):
        load_tokenizer(f"{folder}")


# ---------------------------------------------------------------------- special tokens

SPECIAL = ["<|user|>", "<|end|>", "<é>"]


def test_special_tokens_have_the_next_ids_and_move_none(tmp_path, tokenizer):
    more = Tokenizer(add_special(tokenizer.spec, SPECIAL))
    assert list(more.special.items()) == [
        (name, tokenizer.vocab_size + i) for i, name in enumerate(SPECIAL)]
    assert more.vocab_size == tokenizer.vocab_size + 3 and more.eot == tokenizer.eot
    assert tokenizer.special == {} and "special" not in tokenizer.spec
    for i in range(0, tokenizer.vocab_size, 7):
        assert more.decode_bytes([i]) == tokenizer.decode_bytes([i])

    # They are decoded to their names, which count for no text.
    ids = [more.special["<é>"], *tokenizer.encode("abc").tolist(), more.special["<|user|>"]]
    assert more.decode(ids) == more.decode(np.array(ids)) == "<é>abc<|user|>"
    expected = [*tokenizer.token_bytes(), 0, 0, 0]
    assert more.token_bytes().tolist() == expected

    # What save writes, load reads; adding them again adds nothing.
    more.save(tmp_path)
    assert Tokenizer.load(tmp_path).special == more.special
    assert add_special(more.spec, SPECIAL[::-1]) == more.spec


def test_no_text_is_encoded_to_a_special_token(tokenizer):
    more = Tokenizer(add_special(tokenizer.spec, ["<a>", "abc", "<|end|>"]))
    parts = [*more.special, EOT, *"abc <|>", "漢字", "\n"]
    if tokenizer.kind == "chars":
        parts = ["abc", *"abc \n"]
    rng = random.Random(1)
    for _ in range(1000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 9)))
        ids = more.encode(text).tolist()
        assert ids == tokenizer.encode(text).tolist() and max(ids) < tokenizer.vocab_size
        assert more.decode(ids) == text
        assert not set(more.special.values()) & set(more.encode_prompt(text))


def test_a_vocabulary_s_own_special_tokens_are_not_added_again(trained, tmp_path):
    path, _ = as_file(tmp_path, trained)
    spec = read_spec(path)
    assert Tokenizer(spec).special == {"<pad>": 0}
    more = Tokenizer(add_special(spec, ["<|end|>", "<pad>"]))
    assert more.special == {"<pad>": 0, "<|end|>": 2000}


def test_which_tokenizers_extend_which():
    spec, other = {"kind": "bytes"}, {"kind": "chars", "alphabet": "ab", "documents": True}
    one, two = add_special(spec, ["<a>"]), add_special(spec, ["<a>", "<b>"])
    assert extends(spec, spec) and extends(spec, one) and extends(one, two) and extends(spec, two)
    assert not extends(one, spec) and not extends(two, one)
    assert not extends(add_special(spec, ["<b>"]), two) and not extends(other, one)


# ---------------------------------------------------------------------- trained here


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_gives_the_merges_of_the_plain_loop(pattern):
    text = "the hat; aaaaaaaa aaa aaaaa abababab a aa\n\n\n\n\n  x  y\t1234 12 99123 ".join(
        VARIED[3:5]) + (Path(prepare.__file__).read_text(encoding="utf-8")[:9000])
    expected = bpe_merges(text, 300, pattern)
    assert len(expected) == len(set(expected)) == 300
    spec = train_bpe([text], 557, pattern)
    assert merges_of(spec) == [left + right for left, right in expected]
    assert [base64.b64decode(token) for token in spec["tokens"][:256]] == BYTES
    assert spec["special_tokens"] == {EOT: 556} and Tokenizer(spec).vocab_size == 557


def test_the_plain_loop_on_known_text():
    # ties go to the oldest tokens: (a, b) before (b, a); a pair that comes once is none
    assert bpe_merges("abab cd", 9, "gpt2") == [(b"a", b"b")]
    assert bpe_merges("aaaa", 9, "gpt2") == [(b"a", b"a")]
    assert bpe_merges("hug hug hug pug", 2, "gpt2") == [(b"u", b"g"), (b"h", b"ug")]
    assert bpe_merges("x1 x1", 9, "gpt2") == [] == bpe_merges("", 9, "gpt2")
    assert bpe_merges("ÿ! ÿ! é", 1, "gpt2") == [("ÿ".encode()[:1], "ÿ".encode()[1:])]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_gives_the_trainer_s_own_ids(corpus, pattern):
    spec = train_bpe(iter(corpus), 3001, pattern)
    assert spec == train_bpe(iter(corpus), 3001, pattern)  # deterministic
    assert spec == train_bpe(reversed(corpus), 3001, pattern)  # whatever the order
    assert spec == train_bpe([*corpus, ""], 3001, pattern) != train_bpe(corpus, 3000, pattern)
    ours = Tokenizer(spec)
    same_ids(ours, train_by_library(iter(corpus), 3001, pattern), corpus + VARIED + soup(2000))
    assert (ours.vocab_size, ours.eot) == (3001, 3000) and len(set(spec["tokens"])) == 3000


def test_a_small_text_gives_a_smaller_vocabulary():
    spec = train_bpe(["ab ab, cd"], 5000, "gpt2")
    assert merges_of(spec) == [b"ab"] and spec["special_tokens"] == {EOT: 257}
    assert train_bpe([], 257, "gpt4")["special_tokens"] == {EOT: 256}


@pytest.mark.parametrize("size, pattern, says", [
    (256, "gpt2", "vocab_size=256: must be at least 257"), (-1, "gpt4", "vocab_size=-1: "),
    (10**30, "gpt4", "must be below 1e15"),
    (300, "gpt3", "split_pattern='gpt3': choose 'gpt2', 'gpt4'")])
def test_what_cannot_be_trained(size, pattern, says):
    with pytest.raises(ValueError, match=says):
        train_bpe(["text"], size, pattern)


# ---------------------------------------------------------------------- from a file


@pytest.fixture(scope="session")
def trained(corpus):
    """What Hugging Face's library writes: special tokens first, then bytes and merges."""
    return json.loads(library(corpus, ByteLevel(), ["<pad>", EOT]).to_str())


def ByteLevel(use_regex=True):
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def library(texts, pre_tokenizer, special_tokens):
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    made = HuggingFace(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def as_file(tmp_path, facts):
    from tokenizers import Tokenizer as HuggingFace

    path = tmp_path / "theirs.json"
    path.write_text(facts if isinstance(facts, str) else json.dumps(facts), encoding="utf-8")
    return path, (lambda: HuggingFace.from_file(str(path)))


@pytest.mark.parametrize("kind", ["ByteLevel", "Split", "Removed", "old", "eot last"])
def test_a_file_of_hugging_face_gives_its_ids(tmp_path, corpus, trained, kind):
    from tokenizers import Regex, pre_tokenizers

    facts = trained
    if kind in ("Split", "Removed"):
        split = pre_tokenizers.Split(Regex(PATTERNS["gpt4"]), "isolated")
        if kind == "Removed":
            split = pre_tokenizers.Split(Regex(PATTERNS["gpt4"]), "removed", invert=True)
        steps = pre_tokenizers.Sequence([split, ByteLevel(use_regex=False)])
        facts = json.loads(library(corpus, steps, ["</s>"]).to_str())
        facts["model"]["ignore_merges"] = kind == "Removed"
    elif kind == "old":  # as files were written once
        merges = [" ".join(pair) for pair in facts["model"]["merges"]]
        model = {"vocab": facts["model"]["vocab"], "merges": merges, "unk_token": ""}
        steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        facts = {**facts, "pre_tokenizer": steps, "model": model}
    elif kind == "eot last":
        made = library(corpus, ByteLevel(), [])
        made.add_special_tokens(["<|end_of_text|>", "<|x|>"])
        facts = json.loads(made.to_str())
    path, theirs = as_file(tmp_path, facts)
    ours = Tokenizer(read_spec(path))
    same_ids(ours, theirs(), corpus[::5] + VARIED + soup(2000))
    assert ours.vocab_size == theirs().get_vocab_size()
    names = ("</s>", EOT, "<|end_of_text|>")
    assert ours.eot in [theirs().token_to_id(name) for name in names]
    assert ours.decode([ours.eot]) == EOT
    assert ours.encode_prompt(f"{EOT}a")[0] == ours.eot not in ours.encode(f"{EOT}a")
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).spec == ours.spec == read_spec(tmp_path / "tokenizer.json")


def test_gpt2_as_hugging_face_has_it(tmp_path, gpt2):
    letters = {byte: letter for letter, byte in LETTERS.items()}
    tokens = [base64.b64decode(token) for token in gpt2.spec["tokens"]]
    text = {token: "".join(letters[bytes([b])] for b in token) for token in tokens}
    ids, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens[256:]:  # its merge: the two parts that its bytes become without it
        parts = [token[at:at + 1] for at in range(len(token))]
        while len(parts) > 2:
            joined = [ids.get(a + b, 10**6) for a, b in zip(parts, parts[1:], strict=False)]
            at = joined.index(min(joined))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        merges.append([text[part] for part in parts])
    added = {"id": 50256, "content": EOT, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
    path, theirs = as_file(tmp_path, {
        "version": "1.0", "added_tokens": [added], "normalizer": None, "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "merges": merges,
                  "vocab": {text[token]: i for token, i in ids.items()} | {EOT: 50256}}})
    spec = read_spec(path)
    assert spec["tokens"] == gpt2.spec["tokens"]
    assert spec["special_tokens"] == gpt2.spec["special_tokens"]
    same_ids(Tokenizer(spec), theirs(), VARIED + soup(500))
    ours = Tokenizer(spec)
    for text in VARIED + soup(500):  # its pattern is ours, written otherwise
        assert ours.encode(text).tolist() == gpt2.encode(text).tolist()


def changed(path, value):
    """Return a function that sets facts[a][b]... of a copy, where path is 'a.b...'."""
    def of(facts):
        facts = json.loads(json.dumps(facts))
        *keys, last = path.split(".")
        place = facts
        for key in keys:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
        return facts

    return of


def split_by(pattern, behavior="Isolated", use_regex=False, prefix=False):
    return changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False},
        {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": use_regex}]})


def swapped(facts):
    merges = facts["model"]["merges"]
    return changed("model.merges", [*merges[:500], merges[501], merges[500], *merges[502:]])(facts)


def other_merge(facts):
    """Merges say that zqj is made of z and qj, and zq comes before qj."""
    vocab = {**facts["model"]["vocab"]}
    size = max(vocab.values())
    vocab |= {"zq": size + 1, "qj": size + 2, "zqj": size + 3}
    merges = [*facts["model"]["merges"], ["z", "q"], ["q", "j"], ["z", "qj"]]
    return changed("model.merges", merges)(changed("model.vocab", vocab)(facts))


ALL = "[\\s\\S]"
REFUSED = {
    "Unigram": (changed("model.type", "Unigram"), "its model is Unigram"),
    "WordPiece": (changed("model.type", "WordPiece"), "its model is WordPiece"),
    "byte_fallback": (changed("model.byte_fallback", True), "byte_fallback=True"),
    "suffix": (changed("model.end_of_word_suffix", "</w>"), "end_of_word_suffix='</w>'"),
    "prefix": (changed("model.continuing_subword_prefix", "##"), "continuing_subword_prefix"),
    "dropout": (changed("model.dropout", 0.1), "dropout=0.1"),
    "normalizer": (changed("normalizer", {"type": "NFC"}), "normalizer (NFC) changes the text"),
    "added": (changed("added_tokens.0.special", False), "added token '<pad>' is not a special one"),
    "no eot": (lambda facts: changed("added_tokens.1.content", "<x>")(
        changed("model.vocab", {("<x>" if text == EOT else text): i for text, i in
                                facts["model"]["vocab"].items()})(facts)), "is an end-of-text"),
    "space": (changed("pre_tokenizer.add_prefix_space", True), "without a prefix space"),
    "no pieces": (changed("pre_tokenizer", {}), "its pre-tokenizer is neither"),
    "Whitespace": (changed("pre_tokenizer", {"type": "Whitespace"}), "is neither"),
    "no regex": (changed("pre_tokenizer.use_regex", False), "is neither"),
    "twice": (split_by({"Regex": ALL}, use_regex=True), "is neither"),
    "String": (split_by({"String": " "}), "is neither"),
    "Merged": (split_by({"Regex": ALL}, "MergedWithNext"), "is neither"),
    "gaps": (split_by({"Regex": r"\p{L}+|\s+"}), "leaves out some text"),
    "line end": (split_by({"Regex": r"\s+$|[\s\S]"}), "split pattern has '$'"),
    "not a regex": (split_by({"Regex": "("}), "split pattern '(' cannot be used"),
    "few bytes": (lambda facts: changed("model.vocab", {
        text: i for text, i in facts["model"]["vocab"].items() if text not in "aĀ"})(facts),
        "lacks 2 of the 256 bytes"),
    "no ids": (changed("model.vocab.the", 77777), "ids have gaps"),
    "not bytes": (changed("model.vocab.漢", 2000), "token '漢' is not written in"),
    "no such merge": (changed("model.merges.3", ["the", "qqqq"]), "not in its vocabulary"),
    "order": (swapped, "another order than its ids"),
    "never made": (other_merge, "'zqj' is not made by its merges alone"),
    "no vocab": (changed("model.vocab", None), "damaged, or no tokenizer.json of"),
    "no model": (changed("model", None), "damaged, or no tokenizer.json of"),
    "list": (changed("model.vocab", [["a", -1.5]]), "damaged, or no tokenizer.json of"),
    "cut": (lambda facts: json.dumps(facts)[:5000], "damaged, it is not a JSON object"),
    "empty": (lambda facts: "", "damaged, it is not a JSON object"),
    "other": (lambda facts: '{"kind": "syllables"}', "damaged, or no tokenizer.json of"),
    "ours": (lambda facts: '{"kind": "bpe", "tokens": []}', "not a tokenizer that can be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_line(tmp_path, trained, name):
    change, says = REFUSED[name]
    path, _ = as_file(tmp_path, change(trained))
    with pytest.raises(ValueError) as error:
        read_spec(path)
    assert says in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- prepare.py


@pytest.fixture
def do(tmp_path):
    """Return a function that prepares texts and returns the folder and its meta.json."""
    def prepared(texts, name="data", **settings):
        path = tmp_path / "x.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:
            path.write_text(lines, encoding="utf-8")
        prepare.main(dataset=f"{tmp_path}/{name}", input=str(path), **settings)
        return tmp_path / name, json.loads((tmp_path / name / "meta.json").read_text())

    return prepared


def ids_of(folder, split):
    reader = TokenReader(f"{folder}", split)
    return reader.rows(np.array([0]), reader.tokens)[0]


def split_texts(folder, tokenizer, split):
    return tokenizer.decode(ids_of(folder, split)).split(EOT)[1:]


def test_a_vocabulary_trained_on_the_training_split(do, corpus, gpt2, capsys, monkeypatch):
    monkeypatch.setattr("text.bpe.gpt2_spec", lambda: gpt2.spec)
    texts = [text for text in corpus if text]
    folder, meta = do(texts, tokenizer="bpe", vocab_size=1000)
    tokenizer = Tokenizer.load(folder)
    assert (meta["tokenizer"], meta["vocab_size"], tokenizer.eot) == ("bpe", 1000, 999)
    train, val = (split_texts(folder, tokenizer, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and len(val) > 9
    assert tokenizer.spec == train_bpe(train, 1000, "gpt2") != train_bpe(texts, 1000, "gpt2")
    assert {key: meta["source"][key] for key in ("vocab_size", "split_pattern", "bpe_characters")
            } == {"vocab_size": 1000, "split_pattern": "gpt2", "bpe_characters": 100_000_000}

    size = sum(len(text.encode()) for text in val)
    own, other = (sum(len(t.encode(text)) for text in val) for t in (tokenizer, gpt2))
    assert meta["compared"] == {"bytes": size, "tokens": own, "gpt2_tokens": other}
    assert (f"bytes per token on {size:,} bytes of held-out text: this vocabulary of 1,000 "
            f"{size / own:.3f}, gpt2 {size / other:.3f}\n") in capsys.readouterr().out

    do(texts, tokenizer="bpe", vocab_size=1000)
    assert "already prepared" in capsys.readouterr().out
    for change in ({"vocab_size": 999}, {"split_pattern": "gpt4"}, {"bpe_characters": 10**6}):
        with pytest.raises(ValueError, match="other settings"):
            do(texts, **{"tokenizer": "bpe", "vocab_size": 1000, **change})
    do(texts, vocab_size=7, split_pattern="gpt4", name="bytes")  # says nothing where not asked
    folder, _ = do(texts, tokenizer="bpe", vocab_size=1000, split_pattern="gpt4", overwrite=True)
    assert Tokenizer.load(folder).spec == train_bpe(train, 1000, "gpt4")


def test_the_text_that_bpe_is_trained_on_is_limited_and_spread():
    text = "abc" * 999
    assert "".join(text_split.spread_sample([text], 2997, 10**9)) == text
    texts = [chr(97 + i) * 5000 for i in range(26) if i % 3]
    sample = "".join(text_split.spread_sample(texts, 26 * 5000, 13000))
    assert 7000 < len(sample) <= 13000 and set(sample) == {text[0] for text in texts}
    sample = list(text_split.spread_sample(["ab " * 10**5], 300_000, 299_999))
    assert max(map(len, sample)) <= 2**14 and sum(map(len, sample)) <= 299_999


def test_a_small_text_is_said_to_be_small(do, capsys, monkeypatch):
    monkeypatch.setattr("text.bpe.gpt2_spec", lambda: (_ for _ in ()).throw(UserError("offline")))
    _, meta = do(["ab ab ab", "ab ab ba", "ab abc ab xyz"], tokenizer="bpe")
    out = capsys.readouterr().out
    assert "so the vocabulary is 259 and not 4,096\n" in out and meta["vocab_size"] == 259
    assert "GPT-2's tokenizer is not available here\n" in out
    assert "gpt2_tokens" not in meta["compared"]


def test_a_dataset_with_a_tokenizer_from_a_file(tmp_path, do, trained, corpus, capsys):
    path, theirs = as_file(tmp_path, trained)
    texts = [text[:700] for text in corpus if text]
    folder, meta = do(texts, tokenizer=str(path))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe", 2000)
    assert meta["source"]["tokenizer"] == "tokenizer.json" and "compared" in meta
    tokenizer = load_tokenizer(f"{folder}")
    assert tokenizer.spec == read_spec(path)
    expected = {tuple([1, *theirs().encode(text).ids]) for text in texts}
    found = np.split(ids := ids_of(folder, "val"), np.flatnonzero(ids == 1)[1:])
    assert {tuple(document.tolist()) for document in found} < expected
    capsys.readouterr()
    do(texts, tokenizer=str(path.rename(tmp_path / "moved.json")))
    assert "already prepared" in capsys.readouterr().out
    other, meta = do(texts, name="other", tokenizer=f"{folder}/tokenizer.json")  # of a dataset
    assert load_tokenizer(f"{other}").spec == tokenizer.spec
    with pytest.raises(ValueError, match="nowhere.json: No such file"):
        do(texts, name="new", tokenizer=f"{tmp_path}/nowhere.json")
    assert not (tmp_path / "new").exists()


def test_a_large_vocabulary_has_uint32_files(tmp_path, do):
    letters = list(LETTERS)
    merges = [[a, b] for a in letters for b in letters]
    vocab = {text: i for i, text in enumerate(letters + [a + b for a, b in merges])}
    path, theirs = as_file(tmp_path, {
        "added_tokens": [{"id": 65792, "content": EOT, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}})
    texts = [f"{text[:300]} {i} \xff" for i, text in enumerate(VARIED * 12)]
    folder, meta = do(texts, tokenizer=str(path), val_fraction=0.3)
    tokenizer = load_tokenizer(f"{folder}")
    assert meta["vocab_size"] == tokenizer.vocab_size == 65793
    raw = (folder / "val_000000.bin").read_bytes()
    assert np.frombuffer(raw[:8], "<i4").tolist() == [20240801, 7]
    assert ids_of(folder, "val").max() == 65792 == tokenizer.eot
    found = [text for split in ("train", "val") for text in split_texts(folder, tokenizer, split)]
    assert sorted(found) == sorted(texts)


def test_bad_settings_are_found_before_reading(do, monkeypatch):
    monkeypatch.setattr(prepare, "survey_corpus", lambda *args: 1 / 0)
    for settings, says in (({"vocab_size": 256}, "vocab_size=256: must be at least 257"),
                           ({"split_pattern": "gpt5"}, "split_pattern='gpt5': choose 'gpt2'"),
                           ({"bpe_characters": 0}, "bpe_characters=0: must be at least 1")):
        with pytest.raises(ValueError, match=says):
            do(["text"], tokenizer="bpe", **settings)


def test_a_download_without_tokenizer_json_has_gpt2_s(tmp_path, gpt2):
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2", "splits": {}}')
    assert load_tokenizer(f"{tmp_path}").spec == gpt2.spec
    (tmp_path / "meta.json").write_text('{"tokenizer": "chars", "splits": {}}')
    with pytest.raises(ValueError, match="tokenizer.json: No such file"):
        load_tokenizer(f"{tmp_path}")


def test_datasets_of_a_mix_need_one_tokenizer(tmp_path):
    for name, alphabet in (("a", "xy"), ("b", "xy"), ("c", "xyz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text('{"splits": {}}')
        Tokenizer({"kind": "chars", "alphabet": alphabet, "documents": False}).save(tmp_path / name)
    assert load_tokenizer(f"{tmp_path}/a", f"{tmp_path}/b").vocab_size == 2
    with pytest.raises(ValueError, match=r"/a has the tokenizer chars \(2 .*/c another, chars \(3"):
        load_tokenizer(f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c")
