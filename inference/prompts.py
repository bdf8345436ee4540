"""Samples for many prompts: a .jsonl file in, the same with the samples out.

Each line is an object with a "prompt", or with "messages" for a model that was trained on
conversations; or a text alone, which is the same as {"prompt": text}. In the file that is written
each object also has "samples": a list of texts. Prompts of any length are drawn together: as soon
as one sample has ended, the next one takes its row of the batch.
"""

import json
from collections import deque
from itertools import product
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from formats.files import naming_write_errors, write_atomically
from inference.generate import Batch
from inference.text_stream import TextStream
from inference.writing import encode_prompt, say_what_is_seen
from runtime.terminal import Progress


class Entry(NamedTuple):
    """A line of the file."""
    place: str  # where it stands, for messages
    row: dict  # with "prompt" or "messages"


def read_prompts(path):
    """Return the Entries of a .jsonl file. Raises UserError naming the line that has no prompt."""
    try:
        # splitlines would end lines within texts too, as at U+2028
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path!r}: cannot be read ({error}); name a .jsonl file of UTF-8 "
                        "text") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # an object, or a text alone
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # as it will be written
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON in UTF-8 ({error})") from error
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise UserError(f'{place}: neither a text nor an object with a "prompt" or "messages"')
        entries.append(Entry(place, row))
    if not entries:
        raise UserError(f"prompts={path!r}: has no line with a prompt")
    return entries


def encode_entries(entries, tokenizer, model, encode_messages):
    """Return the ids of each Entry, a list of lists. encode_messages: gives those of messages.
    Raises UserError naming the line that cannot be used."""
    ids_of_entries = []
    for place, row in entries:
        try:
            if "messages" in row:
                ids = encode_messages(row["messages"], "messages")
                say_what_is_seen(ids, model)
            elif isinstance(row["prompt"], str):
                ids = encode_prompt(row["prompt"], tokenizer, model)
            else:
                raise UserError("the prompt is not a text")
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        ids_of_entries.append(ids)
    return ids_of_entries


def check_out(out):
    """Raise UserError unless `out` names a file in a folder that is there."""
    if not out or not Path(out).parent.is_dir() or Path(out).is_dir():
        raise UserError(f"out={out!r}: with --prompts, name the file to write, in a folder that is "
                        "there")


def write_file(writing, entries, prompts, out, num_samples, batch_size):
    """Write num_samples samples for each Entry to the file `out`, which is whole or not there.
    prompts: the ids of each. Return how many tokens were drawn."""
    # (index of the entry, number of the sample)
    waiting = deque(product(range(len(entries)), range(num_samples)))
    count = len(waiting)
    texts = [[""] * num_samples for _ in entries]
    rows = min(batch_size, count)
    batch = Batch(writing.model, rows, writing.runtime, writing.compiled)
    jobs = {}  # {row of the batch: the sample there}
    streams = {}  # {row of the batch: its text as it comes}
    progress = Progress("sampling", lambda: 1 - (len(waiting) + len(jobs)) / count)
    tokens, eot = 0, writing.tokenizer.eot
    end_of_answer = writing.tokenizer.special.get("<|end|>")
    while waiting or jobs:
        # Begin a sample in each row that is free.
        while waiting and len(jobs) < rows:
            index, number = waiting.popleft()
            row = batch.add(prompts[index], writing.sampling, writing.generator(number))
            jobs[row] = (index, number)
            streams[row] = TextStream(writing.tokenizer, writing.stops)
            streams[row].prompt(prompts[index])

        # The next token of each sample; keep the text of those that end.
        new_ids = batch.step()
        for row, (index, number) in list(jobs.items()):
            stream, new_id = streams[row], new_ids[row]
            is_answer = "messages" in entries[index].row
            is_end = new_id == eot or (is_answer and new_id == end_of_answer)
            if not is_end:
                texts[index][number] += stream.add(new_id)
            if is_end or stream.has_stopped or stream.count == writing.max_new_tokens:
                texts[index][number] += stream.end()
                tokens += stream.count
                batch.remove(row)
                del jobs[row]
        progress.show()

    # The file.
    lines = [json.dumps({**entry.row, "samples": samples}, ensure_ascii=False)
             for entry, samples in zip(entries, texts, strict=True)]
    path = Path(out)
    with naming_write_errors(path, "run the command again"):
        write_atomically(path, "\n".join(lines) + "\n")
    return tokens
