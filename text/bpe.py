"""Byte-pair encoding."""

import base64
import json
import re
from collections import Counter

from configurator import UserError
from formats.files import read_json
from text.tokenizer import EOT, Tokenizer

ITS_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>")  # of others
PATTERNS = {  # what cuts text into pieces: GPT-2's, and GPT-4's (cl100k), for any regex engine
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# GPT-2's order of the 256 bytes: those that print, then the others. Files of merges write a byte
# as one printable character (LETTERS), the others from U+0100 on.
PRINT = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [bytes([b]) for b in PRINT + sorted(set(range(256)) - set(PRINT))]
LETTERS = dict(zip(map(chr, PRINT + [*range(256, 324)]), BYTES, strict=True))


# ---------------------------------------------------------------------- trained here


def bpe_merges(text, count, pattern):
    """Train byte-pair encoding the plain way: return its first `count` merges, [(left, right)] in
    bytes. The lesson, and the tests' reference for train_bpe.

    Each turn joins the pair of neighbours that is most frequent within pieces. Ties: the pair whose
    left, then right, token is older (bytes in GPT-2's order, then merges as they came). It ends
    early where no pair comes twice. Overlapping pairs count: there are two of (a, a) in "aaa".
    """
    import regex  # Python's own re does not know \p{L}

    tokens, merges = list(BYTES), []  # tokens: id to bytes
    pieces = Counter(regex.findall(PATTERNS[pattern], text))
    words = [([BYTES.index(bytes([byte])) for byte in piece.encode()], times)
             for piece, times in pieces.items()]
    while len(merges) < count:
        pairs = Counter()
        for ids, times in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[best] < 2:
            break
        left, right = best
        merges.append((tokens[left], tokens[right]))
        for ids, _ in words:
            at = 0
            while at < len(ids) - 1:  # from the left, so "aaa" becomes (aa, a)
                if (ids[at], ids[at + 1]) == best:
                    ids[at:at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[left] + tokens[right])
    return merges


def check_bpe(vocab_size, pattern):
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: bpe has the 256 bytes and end-of-text, so it "
                         "must be at least 257")
    if pattern not in PATTERNS:
        raise UserError(f"split_pattern={pattern!r}: choose {' or '.join(PATTERNS)}")


def train_bpe(texts, vocab_size, pattern):
    """Train byte-pair encoding on an iterator of texts; return a Tokenizer's spec.

    Ids: the 256 bytes in GPT-2's order, the merges, end-of-text: vocab_size of them, or fewer where
    no pair comes twice any more. The same texts give the same spec. Memory: the different pieces
    with their counts, and 256 texts at a time, so give short ones. Merges: as in bpe_merges.
    """
    check_bpe(vocab_size, pattern)
    return convert(json.loads(train_by_library(texts, vocab_size, pattern).to_str()))


def train_by_library(texts, vocab_size, pattern):
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    trained = HuggingFace(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, special_tokens=[], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained.add_special_tokens([EOT])
    return trained


# ---------------------------------------------------------------------- from a file


def read_spec(path):
    """Return the spec of a tokenizer.json: Hugging Face's, or another dataset's gpt2 or bpe.

    The ids are those of Hugging Face's own encoding of text; special tokens in a text are ordinary
    text, and what a post-processor would put around it is left out. Its end-of-text token is
    <|endoftext|> here, whatever its name there. Raises UserError where that cannot be.
    """
    facts = read_json(path)
    if facts.get("kind") in ("gpt2", "bpe"):
        return Tokenizer.read(path).spec
    try:
        return convert(facts)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or no tokenizer.json of Hugging Face's byte-level BPE "
                         f"({error!r})") from error


def convert(facts):
    """Return the spec of what a Hugging Face tokenizer.json holds, or raise ValueError."""
    model, pattern = facts["model"], pattern_of(facts)
    special = {token["content"]: token["id"] for token in facts["added_tokens"]}
    tokens = {}  # bytes to id
    for text, i in model["vocab"].items():
        if text not in special:
            tokens[to_bytes(text)] = i
    if lacking := [byte for byte in BYTES if byte not in tokens]:
        raise UserError(f"its vocabulary lacks {len(lacking)} of the 256 bytes, so it could not "
                         "encode every text")
    if sorted([*tokens.values(), *special.values()]) != [*range(len(tokens) + len(special))]:
        raise UserError("its ids have gaps, or stand for two tokens")
    merges = [tuple(map(to_bytes, pair.split(" ") if isinstance(pair, str) else pair))
              for pair in model["merges"]]
    check_merges(tokens, merges, model.get("ignore_merges", False))
    check_pattern(pattern)
    ends = [name for name in ITS_NAMES if name in special]
    if not ends:
        raise UserError(f"none of its special tokens is an end-of-text ({', '.join(ITS_NAMES)}); "
                         f"it has: {', '.join(special) or 'none'}")
    special = {EOT if name == ends[0] else name: i for name, i in special.items()}
    in_order = [None] * (max(tokens.values()) + 1)  # None: the id of a special token
    for token, i in tokens.items():
        in_order[i] = base64.b64encode(token).decode()
    return {"kind": "bpe", "pattern": pattern, "tokens": in_order, "special_tokens": special}


def pattern_of(facts):
    """Return the split pattern of a Hugging Face tokenizer; refuse what tiktoken does not do."""
    model, steps = facts["model"], facts["pre_tokenizer"] or {}
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model['type']}; only byte-level BPE can be used")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"its model has {key}={model[key]!r}; only byte-level BPE without it "
                             "can be used")
    if facts.get("normalizer"):
        raise UserError(f"its normalizer ({facts['normalizer']['type']}) changes the text before "
                         "encoding; only tokenizers without one can be used")
    for token in facts["added_tokens"]:
        if not token["special"]:
            raise UserError(f"its added token {token['content']!r} is not a special one but part "
                             "of ordinary text; only byte-level BPE without such can be used")
    *splits, last = steps.get("pretokenizers", [steps])
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"] and len(splits) < 2:
        pattern, use_regex = PATTERNS["gpt2"], last.get("use_regex", True)
        if splits and splits[0]["type"] == "Split" and not use_regex:
            kept = splits[0]["behavior"], splits[0]["invert"]
            pattern = splits[0]["pattern"].get("Regex")
            if pattern and kept in (("Isolated", False), ("Removed", True)):
                return pattern
        elif not splits and use_regex:
            return pattern
    raise UserError("its pre-tokenizer is neither ByteLevel nor one Split by a Regex and then "
                     "ByteLevel, without a prefix space")


def to_bytes(text):
    """Return the bytes of a token as Hugging Face writes it, a character for each."""
    try:
        return b"".join(LETTERS[letter] for letter in text)
    except KeyError as error:
        raise UserError(f"its token {text!r} is not written in byte-level BPE's characters"
                         ) from error


def check_merges(tokens, merges, whole_first):
    """Refuse a list of merges that tiktoken would not follow. tokens: {bytes: id}.

    Hugging Face joins the pair that is first in the list of merges; tiktoken the pair whose joined
    bytes have the lowest id, whether or not it is in the list. They agree on every text if they
    agree on each token alone, since what happens inside a token's bytes before they are joined
    does not depend on what is around them. whole_first (ignore_merges): a piece that is in the
    vocabulary is taken whole without merging; tiktoken does that always.
    """
    ids, pairs = [], set(merges)
    for left, right in merges:
        if not {left, right, left + right} <= tokens.keys():
            raise UserError(f"its merge of {left!r} and {right!r} is not in its vocabulary")
        ids.append(tokens[left + right])
    if ids != sorted(ids):
        raise UserError("its merges are in another order than its ids")
    for token in tokens:
        parts = [token[at:at + 1] for at in range(len(token))]
        while len(parts) > 2:
            joined = [tokens.get(a + b, len(tokens) + 2**31)
                      for a, b in zip(parts, parts[1:], strict=False)]
            if (lowest := min(joined)) > 2**31:
                break
            at = joined.index(lowest)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) > 1 and tuple(parts) not in pairs and not (whole_first and len(parts) > 2):
            raise UserError(f"its token {token!r} is not made by its merges alone, so tiktoken "
                             "would give other ids")


def check_pattern(pattern):
    """Refuse a pattern that skips text, for tiktoken leaves out what no piece covers, and one whose
    meaning differs between tiktoken's regular expressions and Hugging Face's (Oniguruma)."""
    import tiktoken

    if found := re.search(r"(?<![\\\[])[$^]|\d}\+|\\[hHGKXRAzZ]", pattern):
        raise UserError(f"its split pattern has {found[0]!r}, which regular expressions read in "
                         "different ways")
    ranks = {byte: i for i, byte in enumerate(BYTES)}
    try:
        engine = tiktoken.Encoding("check", pat_str=pattern, mergeable_ranks=ranks,
                                   special_tokens={})
    except ValueError as error:
        raise UserError(f"its split pattern {pattern!r} cannot be used ({error})") from error
    characters = [chr(i) for i in range(0x20000) if not 0xd800 <= i < 0xe000]
    for between in ("", " ", "a"):
        text = between.join(characters)
        if engine.decode_bytes(engine.encode_ordinary(text)) != text.encode():
            raise UserError(f"its split pattern {pattern!r} leaves out some text")
