"""Filter and tokenize pieces of documents on all cores.

Pieces travel in work units, of about a megabyte of text each. They come back in the same order, so
the result does not depend on the number of processes.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from configurator import UserError
from documents.dedup import key_function
from documents.filters import make_judge
from documents.rules import c4, pii
from text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A whole document, or a part of a long one."""

    # "train" or "val"; "" where the first tokens of the dataset become the validation file.
    split: str
    starts_document: bool
    text: str
    # The document's other columns, as far as the filters use them: its url, its language.
    columns: dict


class WorkUnit(NamedTuple):
    """Consecutive pieces, which one process filters and tokenizes at a time."""

    pieces: list
    # From where `text.split.work_units` goes on after this unit.
    position: dict


class EncodedPiece(NamedTuple):
    """What a piece became."""

    # Why its document is removed; "" to keep it.
    removed_because: str
    # An array of token ids, without a tokenizer the filtered text; None if removed.
    ids: object
    # How many bytes of text the ids stand for.
    byte_count: int
    # An array by which copies of the document are found, or None.
    dedup_keys: object


def encode_units(units, spec, filter_settings, workers):
    """Yield (work unit, its encoded pieces) for each of an iterable of work units, in their order.

    spec: the tokenizer's; None only filters. At most a few units per process are under way, so
    memory is bounded. Raises UserError if the system kills a process.
    """
    if workers == 1:
        encoder = Encoder(spec, filter_settings)
        for unit in units:
            yield unit, encoder.encode_all(unit.pieces)
        return

    # Keep two units per process waiting, and give the results out in the units' order.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                               (spec, filter_settings))
    waiting = deque()  # (unit, future), the oldest first
    try:
        for unit in units:
            waiting.append((unit, pool.submit(encode_in_worker, unit.pieces)))
            if len(waiting) > 2 * workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        for unit, future in waiting:
            yield unit, future.result()
    except BrokenProcessPool as error:
        raise UserError(f"one of the {workers} worker processes was killed (perhaps memory ran "
                        "out); run the same command again, it goes on; --workers= starts fewer "
                        "processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(spec, filter_settings):
    """Set up a worker process. It ends when its parent ends, for whatever reason."""
    global worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker_encoder = Encoder(spec, filter_settings)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(pieces):
    return worker_encoder.encode_all(pieces)


class Encoder:
    """Filters and tokenizes pieces; each process has its own."""

    def __init__(self, spec, filter_settings):
        self.judge = make_judge(filter_settings)
        self.dedup_keys = key_function(filter_settings)
        names = filter_settings["filters"].split()
        self.cleaners = [rule for rule in (c4, pii) if rule.__name__ in names]
        self.tokenizer = None
        if spec is not None:
            self.tokenizer = Tokenizer(spec)

    def encode_all(self, pieces):
        return [self.encode(piece) for piece in pieces]

    def encode(self, piece):
        text, dedup_keys = piece.text, None

        # The first piece of a document decides whether the document is removed. The others are
        # only cleaned: c4 drops lines, pii replaces addresses.
        if piece.starts_document:
            removed_because, text = self.judge(text, piece.columns)
            if removed_because:
                return EncodedPiece(removed_because, None, 0, None)
            if self.dedup_keys is not None:
                dedup_keys = self.dedup_keys(text)
        else:
            for clean in self.cleaners:
                _, text = clean(text)

        ids = text
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(text)
        return EncodedPiece("", ids, len(text.encode()), dedup_keys)
