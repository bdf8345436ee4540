"""Text to ids and back: bytes, characters, GPT-2's byte-pair encoding, one trained here, or that of
a Hugging Face tokenizer.json.

Byte-pair encoding (Sennrich and others 2016, arxiv.org/abs/1508.07909; on bytes: GPT-2) cuts text
into pieces with a pattern, then joins the bytes of each piece, most frequent pair first. bpe_merges
below is the whole idea; train_bpe is the same thing fast, by the library `tokenizers`; `tiktoken`
encodes.
"""

import base64
import json
from pathlib import Path

import numpy as np

from configurator import UserError
from formats.files import read_json, write_atomically
from formats.shards import dataset_folder, read_dataset_meta

EOT = "<|endoftext|>"


def load_tokenizer(dataset, *others):
    """Return a dataset's Tokenizer; GPT-2's for ready-made token files, as in nanoGPT.

    Raises UserError where one of the others has another.
    """
    meta, folder = read_dataset_meta(dataset), dataset_folder(dataset)
    downloaded = meta and meta.get("tokenizer") == "gpt2" and not (
        folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder) if meta and not downloaded else Tokenizer(gpt2_spec())
    for name in others:
        if (other := load_tokenizer(name)).spec != tokenizer.spec:
            raise UserError(
                f"{dataset} has the tokenizer {tokenizer.kind} ({tokenizer.vocab_size:,} tokens), "
                f"{name} another, {other.kind} ({other.vocab_size:,}); a mix needs one: prepare "
                "them with the same")
    return tokenizer


def gpt2_spec():
    """Return GPT-2's byte-pair encoding as a Tokenizer's spec; tiktoken fetches and caches it."""
    from tiktoken_ext.openai_public import gpt2

    try:
        parts = gpt2()
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's tokenizer cannot be downloaded ({type(error).__name__}); go online once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from error
    ranks = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].get)
    return {"kind": "gpt2", "pattern": parts["pat_str"],
            "tokens": [base64.b64encode(token).decode() for token in ranks],
            "special_tokens": parts["special_tokens"]}


class Tokenizer:
    """Text to ids and back. `spec` is all of it, and is what tokenizer.json holds.

    vocab_size: ids are below it. eot: the id that begins a document, or None where a corpus of
    one text with a `chars` tokenizer has none.
    """

    def __init__(self, spec):
        self.spec, self.kind = spec, spec["kind"]
        if self.kind == "bytes":
            self.vocab_size, self.eot = 257, 256
        elif self.kind == "chars":
            size = len(spec["alphabet"])
            self.eot = size if spec["documents"] else None
            self.vocab_size = size + spec["documents"]
            points = np.array([ord(c) for c in spec["alphabet"]], int)
            self.table = np.full(points.max(initial=0) + 2, -1)  # code point to id; the last: none
            self.table[points] = np.arange(size)
        elif self.kind in ("gpt2", "bpe"):
            import tiktoken

            ranks = {base64.b64decode(token): i for i, token in enumerate(spec["tokens"])
                     if token is not None}
            self.bpe = tiktoken.Encoding(self.kind, pat_str=spec["pattern"], mergeable_ranks=ranks,
                                         special_tokens=spec["special_tokens"])
            self.vocab_size, self.eot = self.bpe.n_vocab, spec["special_tokens"][EOT]
        else:
            raise UserError(f"unknown tokenizer {self.kind!r}; this version knows bytes, chars, "
                             "gpt2 and bpe")

    def encode(self, text):
        """Return the ids of a text, an array; <|endoftext|> in it is ordinary text. Raises
        ValueError naming the characters that a `chars` vocabulary lacks."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if self.kind == "chars":
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = self.table[np.minimum(points, len(self.table) - 1)]
            if (ids < 0).any():
                lacking = "".join(sorted({text[i] for i in np.flatnonzero(ids < 0)}))
                raise UserError(f"the vocabulary of {self.vocab_size} characters lacks "
                                 f"{lacking!r}; leave them out, or train with --tokenizer=bytes")
            return ids
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def encode_prompt(self, text):
        """Return the ids of a prompt, a list, in which <|endoftext|> stands for its token."""
        first, *others = text.split(EOT) if self.eot is not None else [text]
        ids = self.encode(first).tolist()
        for part in others:
            ids += [self.eot, *self.encode(part).tolist()]
        return ids

    def decode_bytes(self, ids):
        """Return the bytes of ids; those of <|endoftext|> as such."""
        if self.kind == "bytes":
            return b"".join(EOT.encode() if i == self.eot else bytes([i]) for i in ids)
        if self.kind == "chars":
            return "".join(EOT if i == self.eot else self.spec["alphabet"][i]
                           for i in ids).encode()
        return self.bpe.decode_bytes(list(ids))

    def decode(self, ids):
        """Return the text of ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder):
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(self.spec) + "\n")

    @classmethod
    def load(cls, folder):
        """Return the Tokenizer that `save` wrote into a dataset's or a checkpoint's folder."""
        return cls.read(Path(folder) / "tokenizer.json")

    @classmethod
    def read(cls, path):
        spec = read_json(path)
        try:
            return cls(spec)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a tokenizer that can be used ({error!r})") from error
