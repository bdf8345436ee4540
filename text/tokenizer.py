"""Text to ids and back: bytes, characters, words (words.py), GPT-2's byte-pair encoding, or another
one (bpe.py).

`Tokenizer` is for everybody; below it is a class for each kind.
"""

import base64
import json
from pathlib import Path

import numpy as np

from configurator import UserError
from formats.files import read_json, write_atomically
from formats.shards import dataset_folder, read_dataset_meta
from text.tokenizer_json import EOT
from text.words import Words


def load_tokenizer(dataset, *others):
    """Return the Tokenizer of a dataset. Raises UserError where one of the others differs."""
    # Compare all of the spec: two vocabularies of the same size may differ.
    tokenizer = load_dataset_tokenizer(dataset)
    for name in others:
        other = load_dataset_tokenizer(name)
        if other.spec != tokenizer.spec:
            raise UserError(
                f"{dataset} has the tokenizer {tokenizer.kind} ({tokenizer.vocab_size:,} tokens), "
                f"{name} another, {other.kind} ({other.vocab_size:,}); a mix needs one: prepare "
                "them with the same")
    return tokenizer


def check_same_tokenizer(tokenizer, source, dataset, may_add=False):
    """Return the Tokenizer that weights were trained with. Raises UserError where it is not the
    dataset's, to which special tokens may have been added (may_add).

    source: a checkpoint's folder, or the name of one of OpenAI's models.
    """
    if Path(source).is_dir():
        other = Tokenizer.load(source)
    else:
        other = Tokenizer(gpt2_spec())
    fits = other.spec == tokenizer.spec or (may_add and extends(other.spec, tokenizer.spec))
    if not fits:
        raise UserError(
            f"{source} was trained with the tokenizer {other.kind} ({other.vocab_size:,} tokens), "
            f"{dataset} is prepared with another, {tokenizer.kind} ({tokenizer.vocab_size:,}); "
            "prepare it with the same one")
    return other


def load_dataset_tokenizer(dataset):
    # Ready-made token files have GPT-2's tokens and no tokenizer.json; nanoGPT's have no meta.json.
    meta, folder = read_dataset_meta(dataset), dataset_folder(dataset)
    has_file = (folder / "tokenizer.json").is_file()
    if not meta or (meta.get("tokenizer") == "gpt2" and not has_file):
        return Tokenizer(gpt2_spec())
    return Tokenizer.load(folder)


def gpt2_spec():
    """Return the spec of GPT-2's Tokenizer. Raises UserError where tiktoken cannot download it."""
    from tiktoken_ext.openai_public import gpt2

    # tiktoken downloads the two files of GPT-2's vocabulary once, and caches them.
    try:
        parts = gpt2()
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's tokenizer cannot be downloaded ({type(error).__name__}); go online once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from error

    # ranks: {bytes: id}. JSON holds no bytes, hence base64.
    ranks = parts["mergeable_ranks"]
    return {"kind": "gpt2", "pattern": parts["pat_str"],
            "tokens": [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)],
            "special_tokens": parts["special_tokens"]}


def add_special(spec, names):
    """Return a spec with special tokens added: those of `names` that it lacks, in their order."""
    has = Tokenizer(spec).special
    missing = [name for name in names if name not in has]
    return {**spec, "special": [*spec.get("special", []), *missing]}


def extends(old, new):
    """Return whether the spec `new` is `old`, or `old` with special tokens added to its own."""
    added_before = old.get("special", [])
    has_the_same_first = new.get("special", [])[:len(added_before)] == added_before
    return has_the_same_first and {**old, "special": []} == {**new, "special": []}


class Tokenizer:
    """Text to ids and back. `spec` is all of it, and is what tokenizer.json holds.

    kind: bytes, chars, words, gpt2 or bpe. vocab_size: all ids are below it. eot: the id that
    begins a document; None where a corpus of one text with a `chars` tokenizer has none. special:
    {name: id} of the tokens that no text is encoded to, such as those of conversations
    (text/chat.py), beside end-of-text. Those that spec["special"] names are added ones: their ids
    come after all others.
    """

    def __init__(self, spec):
        self.spec, self.kind = spec, spec["kind"]
        if self.kind not in KINDS:
            raise UserError(f"unknown tokenizer {self.kind!r}; this version knows "
                            f"{', '.join(KINDS)}")

        # What differs between the kinds is in a class of its own.
        self.codec = KINDS[self.kind](spec)
        self.eot = self.codec.eot
        # The special tokens: those of a byte-pair encoding's own, then the added ones.
        self.added = spec.get("special", [])
        self.special = {name: i for name, i in spec.get("special_tokens", {}).items()
                        if i != self.eot}
        for i, name in enumerate(self.added, start=self.codec.vocab_size):
            self.special[name] = i
        self.vocab_size = self.codec.vocab_size + len(self.added)

    def encode(self, text):
        """Return the ids of a text, an array; the names of special tokens in it are ordinary text.
        Raises UserError naming the characters that a `chars` vocabulary lacks."""
        return self.codec.encode(text)

    def encode_prompt(self, text):
        """Return the ids of a prompt, a list, in which <|endoftext|> stands for its token."""
        if self.eot is None:
            return self.encode(text).tolist()

        # Put the token between the parts that its text separates.
        first, *others = text.split(EOT)
        ids = self.encode(first).tolist()
        for part in others:
            ids += [self.eot, *self.encode(part).tolist()]
        return ids

    def decode_bytes(self, ids):
        """Return the bytes of ids; end-of-text and the special tokens become their names."""
        if not self.added:
            return self.codec.decode_bytes(ids)

        parts = []
        for i in ids:
            if i < self.codec.vocab_size:
                parts.append(self.codec.decode_bytes([i]))
            else:
                parts.append(self.added[i - self.codec.vocab_size].encode())
        return b"".join(parts)

    def decode(self, ids):
        """Return the text of ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self):
        """Return how many bytes of text each id stands for, (vocab_size,); end-of-text and the
        special tokens stand for none."""
        counts = np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)])
        counts[list(self.special.values())] = 0
        if self.eot is not None:
            counts[self.eot] = 0
        return counts

    def save(self, folder):
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(self.spec) + "\n")

    @classmethod
    def load(cls, folder):
        """Return the Tokenizer that `save` wrote into a dataset's or a checkpoint's folder."""
        return cls.read(Path(folder) / "tokenizer.json")

    @classmethod
    def read(cls, path):
        """Return the Tokenizer of a file. Raises UserError where it is damaged."""
        spec = read_json(path)
        try:
            return cls(spec)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a tokenizer that can be used ({error!r})") from error


# ---------------------------------------------------------------------- one class for each kind


class Bytes:
    """The ids 0 to 255 are the bytes of UTF-8; 256 is end-of-text."""

    # There is nothing that a spec could choose.
    vocab_size, eot = 257, 256
    tokens = [*(bytes([i]) for i in range(256)), EOT.encode()]

    def __init__(self, spec):
        pass

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)


class Characters:
    """Ids are positions in an alphabet; the next one is end-of-text, if there are documents."""

    def __init__(self, spec):
        self.tokens, self.eot = list(spec["alphabet"]), None

        # id_of[code point]: an array, so that a text is encoded at once. -1 stands for characters
        # that are missing; its last entry, for all that come after the alphabet's last.
        code_points = np.array([ord(character) for character in self.tokens], int)
        self.id_of = np.full(code_points.max(initial=0) + 2, -1)
        self.id_of[code_points] = np.arange(len(self.tokens))

        # A corpus of a single text needs no end-of-text.
        if spec["documents"]:
            self.eot = len(self.tokens)
            self.tokens.append(EOT)
        self.vocab_size = len(self.tokens)

    def encode(self, text):
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self.id_of[np.minimum(code_points, len(self.id_of) - 1)]

        # Name the characters that are missing, once each.
        if (ids < 0).any():
            missing = "".join(sorted({text[i] for i in np.flatnonzero(ids < 0)}))
            raise UserError(f"the vocabulary of {self.vocab_size} characters lacks {missing!r}; "
                            "leave them out, or train with --tokenizer=bytes")
        return ids

    def decode_bytes(self, ids):
        return "".join(self.tokens[i] for i in ids).encode()


class BytePairs:
    """A byte-pair encoding: tiktoken joins the pair of neighbours with the lowest id first."""

    def __init__(self, spec):
        import tiktoken

        # None stands at the ids of special tokens.
        ranks = {base64.b64decode(token): i for i, token in enumerate(spec["tokens"])
                 if token is not None}
        self.encoding = tiktoken.Encoding(spec["kind"], pat_str=spec["pattern"],
                                          mergeable_ranks=ranks,
                                          special_tokens=spec["special_tokens"])
        self.vocab_size, self.eot = self.encoding.n_vocab, spec["special_tokens"][EOT]

    def encode(self, text):
        # No text is special: by default tiktoken refuses a text that has <|endoftext|>.
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(list(ids))


KINDS = {"bytes": Bytes, "chars": Characters, "words": Words, "gpt2": BytePairs,
         "bpe": BytePairs}
