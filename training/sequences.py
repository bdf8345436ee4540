"""The order in which training reads tokens: a pure function."""

import hashlib
import re
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from configurator import UserError
from formats.shards import TokenReader, dataset_folder

CHUNK = 1024  # sequences whose starts are worked out, and remembered, at a time


class Mixture:
    """One split of one dataset or of several, whose sequences come in exact shares.

    document_start: a token, where sequences are to begin at documents (TokenReader.at_documents).
    mix: as `parse_mix` returns it. Raises UserError where a split is shorter than a sequence.
    """

    document_start = None

    def __init__(self, mix, split, block_size):
        self.weights, self.block_size = list(mix.values()), block_size
        self.readers = {name: TokenReader(name, split) for name in mix}
        readers = self.readers.values()
        for reader in readers:
            longest = max(reader.counts) if reader.by_file else reader.tokens
            if longest <= block_size:
                raise UserError(
                    f"block_size={block_size} needs {block_size + 1:,} tokens, the {split} split "
                    f"of {reader.folder} has {longest:,}; use a smaller --block_size or prepare "
                    "more text")
        self.folder = " + ".join(str(reader.folder) for reader in readers)
        self.tokens = sum(reader.tokens for reader in readers)
        self.shards = [{"dataset": name, **shard} for name, reader in self.readers.items()
                       for shard in reader.shards]
        sizes = [reader.bytes_per_token for reader in readers]
        self.bytes_per_token = None if None in sizes else self.mean(sizes)

    def mean(self, values):
        """Return the mean of one value per dataset, in the datasets' shares."""
        return (sum(weight * value for weight, value in zip(self.weights, values, strict=True))
                / sum(self.weights))

    def sequences(self, numbers, seed):
        """Return (rows (n, block_size + 1) int64, their masks or None) of the run's sequences with
        these numbers, (n,) counted from the start of the run; a pure function."""
        T, readers = self.block_size, list(self.readers.values())
        rows, mask = np.empty((len(numbers), T + 1), np.int64), None
        if any(reader.masked for reader in readers):
            mask = np.ones(rows.shape, bool)
        places = np.array([split_sequence_number(number, self.weights) for number in numbers.tolist()])
        for index in np.unique(places[:, 0]).tolist():
            mine, reader = places[:, 0] == index, readers[index]
            starts = training_starts(reader, places[mine, 1], T,
                                     f"{seed}.{index}" if index else seed)
            if self.document_start is not None:
                starts = move_to_documents(reader, starts, T, self.document_start)
            rows[mine] = reader.rows(starts, T + 1)
            if reader.masked:
                mask[mine] = reader.masks(starts, T + 1)
        return rows, mask


def training_starts(reader, sequences, block_size, seed):
    """Return where each sequence of a run begins: `sequence_starts` of the split.

    By file: in each epoch the files come in their order, each with its blocks shuffled.
    """
    if not reader.by_file:
        return sequence_starts(sequences, reader.tokens, block_size, seed)
    blocks = np.array([blocks_in(count, block_size) for count in reader.counts])
    ends = np.cumsum(blocks)
    epochs, numbers = np.divmod(sequences, ends[-1])
    files = np.searchsorted(ends, numbers, side="right")
    starts = np.empty(len(sequences), np.int64)
    for index in np.unique(files).tolist():
        mine, before = files == index, ends[index] - blocks[index]
        starts[mine] = reader.firsts[index] + sequence_starts(
            epochs[mine] * blocks[index] + numbers[mine] - before, reader.counts[index],
            block_size, f"{seed} file {index}")
    return starts


def move_to_documents(reader, starts, block_size, document_start):
    """Return the starts of sequences, each moved to the first document that begins in its
    block, where one does and the sequence still ends within the split (by file: the file)."""
    begins = reader.rows(starts, block_size) == document_start
    moved = starts + begins.argmax(1)  # by 0 where there is none
    ends = np.cumsum(reader.counts) if reader.by_file else np.array([reader.tokens])
    return np.where(moved + block_size < ends[np.searchsorted(ends, starts, side="right")],
                    moved, starts)


def evenly_spaced_starts(reader, sequences, block_size):
    """Return the starts of at most so many sequences, evenly spread over the split."""
    blocks = (reader.tokens - 1) // block_size
    return np.unique(np.arange(sequences) * blocks // sequences) * block_size


def parse_mix(mix, dataset):
    """Return {dataset: weight}, whole numbers in the shares of mix, 'a:0.7,b:0.3', or of `dataset`
    alone where mix is ''. The shares need not sum to 1."""
    if not mix:
        return {dataset: 1}
    shares, names = {}, set()
    for part in mix.split(","):
        name, _, share = (text.strip() for text in part.rpartition(":"))
        if not name or not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or not Fraction(share):
            raise UserError(f"mix={mix!r}: {part!r} is not a dataset and its share above 0; write "
                             "--mix=NAME:0.7,OTHER:0.3")
        if (last := dataset_folder(name).name) in names:
            raise UserError(f"mix={mix!r}: {last!r} is in it twice; give it one share")
        names.add(last)
        shares[name] = Fraction(share)
    unit = lcm(*(share.denominator for share in shares.values()))
    return {name: int(share * unit) for name, share in shares.items()}


def split_sequence_number(number, weights):
    """Return (which dataset, its sequence's number in that dataset's own run); a pure function.

    The datasets are halved until one is left. Of the first n sequences of a group its left half
    has n * share, rounded, so that a level adds at most 1/2 to what a dataset is off by: of the
    first n it has its share of n, off by 1/2 at most with two datasets, by less than
    ceil(log2(datasets)) / 2 with more, so by less than 1 with four.
    """
    first, last = 0, len(weights)
    while last - first > 1:
        middle = (first + last) // 2
        part, whole = sum(weights[first:middle]), sum(weights[first:last])
        before, after = ((2 * n * part + whole) // (2 * whole) for n in (number, number + 1))
        if after > before:
            number, last = before, middle
        else:
            number, first = number - before, middle
    return first, number


def sequence_starts(sequences, tokens, block_size, seed):
    """Return where each sequence of a run begins in the training split; a pure function.

    sequences: (n,) numbers of sequences, counted from the start of the run. In each epoch the
    split is cut into blocks of block_size (from another first token each time, so that the cuts
    move), and each block comes once, in an order that depends on the seed and the epoch alone.
    """
    blocks = blocks_in(tokens, block_size)
    assert blocks, "Mixture checks the length"
    starts = []
    for number in sequences.tolist():
        epoch, block = divmod(number, blocks)
        chunk = starts_of_chunk(epoch, block // CHUNK, blocks, tokens, block_size, seed)
        starts.append(chunk[block % CHUNK])
    return np.array(starts, np.int64)


def blocks_in(tokens, block_size):
    """Return the sequences of an epoch of so many tokens: with room to move the cuts."""
    return max(1, tokens // block_size - 1) if tokens > block_size else 0


@lru_cache(maxsize=64)
def starts_of_chunk(epoch, chunk, blocks, tokens, block_size, seed):
    """Return the starts of an epoch's sequences [chunk * CHUNK, (chunk + 1) * CHUNK), a list."""
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=32).digest()
    slack = tokens - blocks * block_size  # how many first tokens are possible
    phase = int.from_bytes(key[:8], "little") % min(block_size, slack)
    order = permute(np.arange(chunk * CHUNK, min(chunk * CHUNK + CHUNK, blocks)), blocks, key)
    return (phase + order * block_size).tolist()


def permute(i, n, key):
    """Return a permutation of 0..n-1 at the indices i, without a table of it.

    A four-round Feistel network over the next even number of bits, walked along its cycle until it
    falls below n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). key: 32 bytes.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask, out = np.uint64(bits), np.uint64(2**bits - 1), np.array(i, np.uint64)
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in np.frombuffer(key, "<u8"):
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        out[todo] = left << half | right
        todo = out >= n
    return out.astype(np.int64)
