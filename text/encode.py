"""Filter and tokenize on all cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from configurator import UserError
from text import dedup
from text import filters as rules
from text.tokenizer import Tokenizer

# ---------------------------------------------------------------------- filtering and tokenizing


def encoded(units, spec, filter_settings, workers):
    """Yield (unit, place, [(reason to remove it, ids, bytes, keys)]) for units, in their order.

    At most a few units are under way, so memory is bounded. Without a spec, ids are the text.
    """
    if workers == 1:
        encode = encoder(spec, filter_settings)
        for unit, place in units:
            yield unit, place, encode(unit)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                               (spec, filter_settings))
    waiting = deque()
    try:
        for unit, place in units:
            waiting.append((unit, place, pool.submit(work, unit)))
            if len(waiting) > 2 * workers:
                unit, place, future = waiting.popleft()
                yield unit, place, future.result()
        while waiting:
            unit, place, future = waiting.popleft()
            yield unit, place, future.result()
    except BrokenProcessPool as error:
        raise UserError(f"one of the {workers} worker processes was killed (for memory?); run the "
                         "same command again, it goes on; fewer of them: --workers=") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(spec, filter_settings):
    """Prepare a worker process, which ends with its parent, whatever ends that."""
    global work_on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    work_on = encoder(spec, filter_settings)


def work(unit):
    return work_on(unit)


def encoder(spec, filter_settings):
    """Return the function that filters and tokenizes a unit. A document longer than a piece is
    judged by its first; the others are cleaned only."""
    judge, keys_of = rules.make_judge(filter_settings), dedup.key_function(filter_settings)
    clean = [rule for rule in (rules.c4, rules.pii) if rule.__name__ in filter_settings["filters"].split()]
    tokenizer = Tokenizer(spec) if spec else None

    def encode(unit):
        results = []
        for _, starts, text, row in unit:
            reason = ""
            if starts:
                reason, text = judge(text, row)
            for rule in () if starts else clean:
                text = rule(text)[1]
            keys = keys_of(text) if keys_of and starts and not reason else None
            ids = text if not tokenizer else None if reason else tokenizer.encode(text)
            results.append((reason, ids, len(text.encode()), keys))
        return results

    return encode
