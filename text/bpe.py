"""Byte-pair encoding: how it is trained, and how to use one that another project trained.

The idea (Sennrich and others 2016, arXiv 1508.07909; on bytes: GPT-2): cut text into pieces, much
like words, with a pattern; then join the most frequent pair of neighbouring tokens into a new
token, again and again. `bpe_merges` is the whole idea; `train_bpe` does the same fast, by Hugging
Face's library `tokenizers`; `read_spec` reads the tokenizer.json of a model on its hub.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError, check_settings
from formats.files import read_json
from formats.shards import read_header
from text.tokenizer import KINDS, Tokenizer, gpt2_spec
from text.tokenizer_json import BYTES, EOT, GPT2_PATTERN, spec_from_hugging_face

PATTERNS = {  # that cut text into pieces: GPT-2's, and GPT-4's (cl100k), for any regex engine
    "gpt2": GPT2_PATTERN,
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# 256 bytes and end-of-text, at least
LIMITS = {"vocab_size": ">= 257, <= 1000000", "split_pattern": tuple(PATTERNS)}


# ---------------------------------------------------------------------- training


def bpe_merges(text, count, pattern):
    """Train byte-pair encoding the plain way: return its first `count` merges, [(left, right)] in
    bytes. The lesson, and the tests' reference for train_bpe.

    Of pairs that are equally frequent, the one whose left, then right, token is older is taken:
    bytes are in GPT-2's order, then merges as they came. It ends early where no pair comes twice.
    Overlapping pairs count: there are two of (a, a) in "aaa".
    """
    import regex  # Python's own re does not know \p{L}

    # `tokens` has the bytes of each id; at first these are the 256 bytes.
    tokens, merges = list(BYTES), []

    # Cut the text into pieces, and write each different piece as a list of ids and its number.
    pieces = []
    for piece, times in Counter(regex.findall(PATTERNS[pattern], text)).items():
        ids = [BYTES.index(bytes([byte])) for byte in piece.encode()]
        pieces.append((ids, times))

    while len(merges) < count:
        # Count the pairs of neighbours within pieces.
        pairs = Counter()
        for ids, times in pieces:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += times

        # Choose the most frequent pair; of several, the one with the lowest ids.
        highest = max(pairs.values(), default=0)
        if highest < 2:
            break
        best = min(pair for pair, times in pairs.items() if times == highest)

        # Make it a new token.
        left, right = best
        new_id = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        merges.append((tokens[left], tokens[right]))

        # Replace it wherever it stands, from the left: (a, a, a) becomes (aa, a).
        for ids, _ in pieces:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [new_id]
                i += 1
    return merges


def check_bpe(vocab_size, pattern):
    """Raise UserError for settings that nothing can be trained with."""
    check_settings({"vocab_size": vocab_size, "split_pattern": pattern}, LIMITS)


def train_bpe(texts, vocab_size, pattern):
    """Train byte-pair encoding on an iterator of texts; return a Tokenizer's spec.

    Ids: the 256 bytes in GPT-2's order, the merges of bpe_merges, end-of-text: vocab_size of them,
    or fewer where no pair comes twice any more. The same texts give the same spec. Memory: the
    different pieces with their counts, and 256 texts at a time, so give short ones.
    """
    check_bpe(vocab_size, pattern)
    trained = train_by_library(texts, vocab_size, pattern)
    return spec_from_hugging_face(json.loads(trained.to_str()))


def train_by_library(texts, vocab_size, pattern):
    """Return a Tokenizer of Hugging Face's library, trained on the texts."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    # Cut by the pattern; then only write the bytes of each piece as letters.
    trained = HuggingFaceTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    # All 256 bytes are tokens, whether or not the texts have them; end-of-text comes last.
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, special_tokens=[], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained.add_special_tokens([EOT])
    return trained


def compare_with_gpt2(path, tokenizer):
    """Print how many bytes a token stands for, here and in GPT-2's vocabulary, by the first 2**20
    tokens of a validation file; return the counts: {tokens, bytes, gpt2_tokens}."""
    # Turn the tokens into texts again, one for each document.
    dtype, offset, count = read_header(path)
    ids = np.fromfile(path, dtype, min(count, 2**20), offset=offset)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    documents = [document[document != tokenizer.eot].tolist() for document in documents]
    texts = [tokenizer.decode(document) for document in documents]
    byte_count = sum(len(text.encode()) for text in texts)
    counts = {"tokens": sum(map(len, documents)), "bytes": byte_count}
    comparison = f"{byte_count / counts['tokens']:.3f}"

    # Tokenize them with GPT-2's tokenizer, which may have to be downloaded.
    try:
        gpt2 = Tokenizer(gpt2_spec())
        counts["gpt2_tokens"] = sum(len(gpt2.encode(text)) for text in texts)
        comparison += f", gpt2 {byte_count / counts['gpt2_tokens']:.3f}"
    except UserError:
        comparison += ", GPT-2's tokenizer is not available here"
    print(f"bytes per token on {byte_count:,} bytes of held-out text: this vocabulary of "
          f"{tokenizer.vocab_size:,} {comparison}")
    return counts


# ---------------------------------------------------------------------- from a tokenizer.json


def tokenizer_file(name):
    """Return the path of the tokenizer.json of a folder: a dataset's, a checkpoint's or a run's.
    Any other value of --tokenizer is returned as it is."""
    folder = Path(name)
    if not name or not folder.is_dir():
        return name
    if (folder / "latest").is_file():
        folder /= (folder / "latest").read_text(encoding="utf-8").strip()
    return str(folder / "tokenizer.json")


def read_spec(path):
    """Return the spec of a tokenizer.json: Hugging Face's, or our own of a dataset or checkpoint.

    The ids are those of Hugging Face's own encoding of text; special tokens in a text are ordinary
    text, and what a post-processor would put around it is left out. Its end-of-text token is
    <|endoftext|> here, whatever its name there. Raises UserError where that cannot be.
    """
    # Our own file holds a spec already.
    contents = read_json(path)
    if contents.get("kind") in KINDS:
        return Tokenizer.read(path).spec
    try:
        return spec_from_hugging_face(contents)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or no tokenizer.json of Hugging Face's byte-level BPE "
                        f"({error!r})") from error
