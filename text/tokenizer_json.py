"""Hugging Face's tokenizer.json, read as the spec of a Tokenizer (text/tokenizer.py), and written.

A spec is what our own tokenizer.json holds: {"kind": "bytes"}; {"kind": "chars", "alphabet": text,
"documents": whether there is an end-of-text}; or, for "gpt2" and "bpe", {"kind", "pattern": a
regular expression that cuts text into pieces, "tokens": their bytes in base64 by id,
"special_tokens": {text: id}}; and "special": [name, ...], special tokens with the ids after these,
where some were added. Text is encoded by tiktoken, so a file is refused if Hugging Face's
library would give other ids for some text. Only byte-level byte-pair encodings (BPE) can be read,
and what `hugging_face_from_spec` wrote for bytes and characters.
"""

import base64
import math
import re

from configurator import UserError

EOT = "<|endoftext|>"
# What other tokenizers call the end-of-text token; the first of these that one has is taken.
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's order of the 256 bytes: those that print, then the others. Files write each byte as one
# printable character: those that print as themselves, the others as U+0100 and following.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [bytes([b]) for b in PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))]
LETTERS = dict(zip(map(chr, PRINTABLE + [*range(256, 324)]), BYTES, strict=True))
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}
ANY_CHARACTER = r"[\s\S]"


def spec_from_hugging_face(contents):
    """Return the spec for the contents of a tokenizer.json, a dict. Raises UserError for one that
    cannot be used, and what a dict of another shape causes, such as KeyError."""
    # What we wrote for bytes or for characters, with or without added special tokens.
    added = [token["content"] for token in contents["added_tokens"] if token["content"] != EOT]
    model, ours = contents["model"], [{"kind": "bytes"}]
    if model.get("type") == "WordLevel":
        alphabet = "".join(token for token in model["vocab"] if token not in (EOT, *added))
        ours += [{"kind": "chars", "alphabet": alphabet, "documents": documents}
                 for documents in (False, True)]
    for spec in ours:
        if added:
            spec["special"] = added
        if hugging_face_from_spec(spec) == contents:
            return spec

    # A byte-pair encoding.
    check_model(contents)
    pattern = split_pattern(contents)
    check_pattern(pattern)

    # The vocabulary: {name: id} of the special tokens, {bytes: id} of the others.
    special = {token["content"]: token["id"] for token in contents["added_tokens"]}
    vocab = {text: i for text, i in model["vocab"].items() if text not in special}
    ids = {bytes_of(text): i for text, i in vocab.items()}
    missing = [byte for byte in BYTES if byte not in ids]
    if missing:
        raise UserError(f"its vocabulary lacks {len(missing)} of the 256 bytes, so it could not "
                        "encode every text")
    if sorted([*ids.values(), *special.values()]) != [*range(len(ids) + len(special))]:
        raise UserError("its ids have gaps, or stand for two tokens")

    # The merges: pairs; in older files texts with a space between the two.
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair)
              for pair in model["merges"]]
    check_merges(vocab, merges, model.get("ignore_merges", False))

    # Its end-of-text token gets our name.
    eot_names = [name for name in EOT_NAMES if name in special]
    if not eot_names:
        raise UserError(f"none of its special tokens is an end-of-text ({', '.join(EOT_NAMES)}); "
                        f"it has: {', '.join(special) or 'none'}")
    special = {EOT if name == eot_names[0] else name: i for name, i in special.items()}

    # The tokens in the order of their ids; None stands at the id of a special token.
    tokens = [None] * (max(ids.values()) + 1)
    for token, i in ids.items():
        tokens[i] = base64.b64encode(token).decode()
    return {"kind": "bpe", "pattern": pattern, "tokens": tokens, "special_tokens": special}


def check_model(contents):
    """Raise UserError for anything but byte-level BPE, which tiktoken does not do."""
    model, normalizer = contents["model"], contents.get("normalizer")
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model['type']}; only byte-level BPE can be used")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"its model has {key}={model[key]!r}; only byte-level BPE without it "
                            "can be used")
    if normalizer:
        raise UserError(f"its normalizer ({normalizer['type']}) changes the text before encoding; "
                        "only tokenizers without one can be used")
    for token in contents["added_tokens"]:
        if not token["special"]:
            raise UserError(f"its added token {token['content']!r} is not a special one but part "
                            "of ordinary text; only byte-level BPE without such can be used")


def split_pattern(contents):
    """Return the pattern of the pre-tokenizer, which cuts text into pieces."""
    steps = contents["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        use_regex = steps[-1].get("use_regex", True)

        # ByteLevel alone cuts by GPT-2's pattern, and writes bytes as letters.
        if len(steps) == 1 and use_regex:
            return GPT2_PATTERN

        # A Split whose matches are the pieces, and ByteLevel that only writes bytes as letters.
        if len(steps) == 2 and not use_regex and steps[0]["type"] == "Split":
            pattern = steps[0]["pattern"].get("Regex")
            behavior = (steps[0]["behavior"], steps[0]["invert"])
            if pattern and behavior in (("Isolated", False), ("Removed", True)):
                return pattern
    raise UserError("its pre-tokenizer is neither ByteLevel nor one Split by a Regex and then "
                    "ByteLevel, without a prefix space")


def check_pattern(pattern):
    """Raise UserError for a pattern that means something else to tiktoken's regular expressions
    than to Hugging Face's (Oniguruma), or that skips text: tiktoken drops what no piece covers."""
    import tiktoken

    ambiguous = re.search(r"(?<![\\\[])[$^]|\d}\+|\\[hHGKXRAzZ]", pattern)
    if ambiguous:
        raise UserError(f"its split pattern has {ambiguous[0]!r}, which regular expressions read "
                        "in different ways")
    byte_ids = {byte: i for i, byte in enumerate(BYTES)}
    try:
        encoding = tiktoken.Encoding("check", pat_str=pattern, mergeable_ranks=byte_ids,
                                     special_tokens={})
    except ValueError as error:
        raise UserError(f"its split pattern {pattern!r} cannot be used ({error})") from error

    # Encode all characters of Unicode's first two planes: next to each other, after a space, and
    # after a letter.
    characters = [chr(i) for i in range(0x20000) if not 0xd800 <= i < 0xe000]
    for separator in ("", " ", "a"):
        text = separator.join(characters)
        if encoding.decode_bytes(encoding.encode_ordinary(text)) != text.encode():
            raise UserError(f"its split pattern {pattern!r} leaves out some text")


def bytes_of(text):
    """Return the bytes of a token as Hugging Face writes it, with a letter for each byte."""
    try:
        return b"".join(LETTERS[letter] for letter in text)
    except KeyError as error:
        raise UserError(f"its token {text!r} is not written in byte-level BPE's characters"
                        ) from error


def check_merges(vocab, merges, whole_first):
    """Raise UserError for merges that tiktoken would not follow.

    vocab: {text: id} and merges: [(left, right)] as Hugging Face writes them. Its library joins the
    pair that comes first in the list of merges; tiktoken the pair whose joined bytes have the
    lowest id, be it in the list or not. They agree on every text if they agree on each token alone,
    since what happens inside a token before it is joined does not depend on what is around it.
    whole_first (ignore_merges): a piece of text that is a token is taken whole without merging;
    tiktoken does that always.
    """
    from tokenizers import models

    # The list must be in the order of ids.
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(f"its merge of {left!r} and {right!r} is not in its vocabulary")
    made = [vocab[left + right] for left, right in merges]
    if made != sorted(made):
        raise UserError("its merges are in another order than its ids")

    # Each token must be made by merges in the list: tiktoken would join the last two parts anyway.
    # It does not join three, so these are a token only where whole pieces are.
    merge = models.BPE(vocab=vocab, merges=merges).tokenize
    for token in vocab:
        parts = len(merge(token))
        if parts == 2 or (parts > 2 and not whole_first):
            raise UserError(f"its token {token!r} is not made by its merges alone, so tiktoken "
                            "would give other ids")


# ---------------------------------------------------------------------- written


def hugging_face_from_spec(spec):
    """Return the contents of a tokenizer.json, a dict, for a spec. Its ids of a text are ours, but
    the text of a special token becomes that token."""
    if spec["kind"] == "words":
        raise UserError("a tokenizer of words does not keep white space, so there is no "
                        "tokenizer.json for it; prepare the text with --tokenizer=bpe")
    # Where text is cut, what becomes of the pieces, and how their text is put together again.
    if spec["kind"] == "chars":
        special = {}
        if spec["documents"]:
            special = {EOT: len(spec["alphabet"])}
        vocab = {character: i for i, character in enumerate(spec["alphabet"])}
        # Without the unknown token that it names, a character that is missing is an error.
        model = {"type": "WordLevel", "vocab": {**vocab, **special}, "unk_token": "unknown"}
        pre_tokenizer, decoder = split_by(ANY_CHARACTER), {"type": "Fuse"}
    elif spec["kind"] == "bytes":
        special = {EOT: 256}
        model = byte_pair_model([bytes([i]) for i in range(256)], special)
        pre_tokenizer, decoder = in_sequence(ANY_CHARACTER), byte_level()
    else:
        special = spec["special_tokens"]
        tokens = [token and base64.b64decode(token) for token in spec["tokens"]]
        model = byte_pair_model(tokens, special)
        pre_tokenizer, decoder = in_sequence(spec["pattern"]), byte_level()
        if spec["kind"] == "gpt2" or spec["pattern"] == GPT2_PATTERN:
            pre_tokenizer = byte_level(use_regex=True)

    # The special tokens that were added come after all others.
    first = len(model["vocab"])
    added = {name: i for i, name in enumerate(spec.get("special", []), start=first)}
    model["vocab"] |= added
    special = {**special, **added}
    added_tokens = [{"id": special[text], "content": text, "single_word": False, "lstrip": False,
                     "rstrip": False, "normalized": False, "special": True}
                    for text in sorted(special, key=special.get)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": decoder, "model": model}


def byte_level(use_regex=False):
    """Return the step that writes bytes as letters; with use_regex it cuts by GPT-2's pattern."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": use_regex}


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}


def in_sequence(pattern):
    return {"type": "Sequence", "pretokenizers": [split_by(pattern), byte_level()]}


def byte_pair_model(tokens, special):
    """Return the model of byte-pair encoding. tokens: their bytes in the order of their ids, or
    None at the id of a special token."""
    ids = {token: i for i, token in enumerate(tokens) if token is not None}
    merges, is_merged = [], True
    for token in ids:
        parts = parts_of(token, ids)
        if len(parts) == 2:
            merges.append([as_letters(part) for part in parts])
        is_merged &= len(parts) <= 2
    vocab = {as_letters(token): i for token, i in ids.items()}
    # Tokens that no merge makes stand for whole pieces only (see check_merges).
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": not is_merged, "vocab": {**vocab, **special}, "merges": merges}


def parts_of(token, ids):
    """Return the two tokens that tiktoken joins last to make a token of several bytes. They are
    more where it does not come that far, and one where the token is a single byte."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ids.get(left + right, math.inf)
                  for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(joined)
        if lowest == math.inf:
            break
        i = joined.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def as_letters(token):
    return "".join(LETTER_OF[token[i:i + 1]] for i in range(len(token)))


def tokenizer_config(eot, block_size):
    """Return the contents of tokenizer_config.json, which says how transformers uses it."""
    end_of_text = None
    if eot is not None:
        end_of_text = EOT
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
            "bos_token": end_of_text, "eos_token": end_of_text,
            "clean_up_tokenization_spaces": False}
