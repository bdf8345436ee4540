"""Generate tokens: prompts' token ids in, new token ids out, by prefill, decode and sampling.

    sampling = Sampling(temperature=0.8, top_k=200, top_p=1.0, vocab_size=tokenizer.vocab_size)
    for new_ids in generate(model, prompts, generators, 500, sampling, tokenizer.eot, runtime):
        ...  # one id for each sample; None for a sample that has ended

`prefill` reads a prompt at once and fills the cache of keys and values; `decode` then reads one
token of each sequence at a time; `sample_ids` draws the next token from its logits. A Batch holds
the sequences. Each has a row of the cache, a position and settings of its own, so that a sequence
may begin while others go on (continuous batching: Yu et al. 2022, Orca):

    batch = Batch(model, rows=8, runtime)
    row = batch.add(prompt_ids, sampling, torch.Generator().manual_seed(7))
    new_ids = batch.step()  # the next id of each row; None where no sequence is
    batch.remove(row)       # another sequence may have this row

A sequence's text depends on its prompt, its settings and its generator alone, but for rounding.

Sizes: B rows, T tokens, C channels, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from configurator import UserError
from inference.sampling import Sampling, sample_ids, stack_settings
from runtime.cpu import use_fast_products


def generate(model, prompts, generators, max_new_tokens, sampling, end_of_text, runtime,
             compiled=False):
    """Yield a list for each new token: the next id of each sample, or None once it has ended.

    prompts: the ids of each sample's prompt, at least one. generators: the random generator of each
    sample. A sample ends at the id end_of_text (None: never); generation ends when all samples
    have, or after max_new_tokens. compiled: compile the decoding. Raises UserError where the logits
    are not finite.
    """
    # All samples begin together, with room for no more than will be generated.
    length = max(map(len, prompts)) + max_new_tokens
    batch = Batch(model, len(prompts), runtime, compiled, length)
    for prompt_ids, generator in zip(prompts, generators, strict=True):
        batch.add(prompt_ids, sampling, generator)
    # A token of each, until the last one has ended.
    for _ in range(max_new_tokens):
        new_ids = batch.step()
        for row, new_id in enumerate(new_ids):
            if new_id is not None and new_id == end_of_text:
                batch.remove(row)
                new_ids[row] = None
        if not any(batch.sequences):
            return
        yield new_ids


@dataclass
class Sequence:
    """A text that is being generated."""
    ids: list  # the prompt and what follows it
    sampling: Sampling
    uniforms: Iterator  # of random numbers in [0, 1), one for each token
    window_start: int  # the model sees the ids from here on
    cached: int = 0  # of so many of these ids the cache has the keys and values


class Batch:
    """Sequences that are generated together, each in a row of one cache.

    The model sees a window of at most block_size tokens of a sequence: at first the end of the
    prompt. Each time the window outgrows block_size, it becomes the newest half block, and
    positions start at 0 again. A window that moved by one token would shift every position, and so
    need a prefill for every token.
    """

    def __init__(self, model, rows, runtime, compiled=False, length=None):
        """rows: how many sequences there may be at once. compiled: compile the decoding. length: of
        the longest of them in tokens (None: without end)."""
        self.model, self.runtime, self.compiled = model, runtime, compiled
        self.sequences = [None] * rows
        self.logits = None  # of the last step, (B, V); for each row, before the settings
        self.settings = None  # of the rows in a step; None: they have changed
        self.seen = None  # (rows, V), True for the ids of a row's text; None: no row needs it
        # The cache, and what reads it.
        if compiled:
            self.cache = make_static_cache(model, rows, runtime.dtype)
            self.decode_step = compile_decode_step()
        else:
            length = min(length or model.config.block_size, model.config.block_size)
            self.cache = model.make_cache(rows, runtime.dtype, length)
            self.decode_step = decode_and_sample

    def add(self, prompt_ids, sampling, generator):
        """Begin a sequence in a free row, and return the number of the row. It is read in the next
        step. prompt_ids: at least one. generator: of its random numbers, on the CPU."""
        row = self.sequences.index(None)
        window_start = max(0, len(prompt_ids) - self.model.config.block_size)
        self.sequences[row] = Sequence(list(prompt_ids), sampling, draw_uniforms(generator),
                                       window_start)
        self.settings = None
        # The repetition penalty counts the prompt.
        if sampling.repetition_penalty != 1 and self.seen is None:
            self.seen = torch.zeros(len(self.sequences), sampling.vocab_size, dtype=torch.bool,
                                    device=self.runtime.sampling_device)
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, list(prompt_ids)] = True
        return row

    def extend(self, row, ids):
        """Add ids to the end of a row's sequence, which the model then continues."""
        self.sequences[row].ids += ids
        if self.seen is not None:
            self.seen[row, ids] = True

    def remove(self, row):
        """End the sequence of a row."""
        self.sequences[row] = None
        self.settings = None

    @torch.inference_mode()
    def step(self):
        """Draw the next id of each sequence. Return a list: the id of each row, None where no
        sequence is. Raises UserError where the logits are not finite."""
        # Read all but the newest token of each sequence. What is unread of a single one is read
        # with its newest token below: one pass of the model instead of two.
        is_single = len(self.sequences) == 1 and not self.compiled
        for row, sequence in enumerate(self.sequences):
            if sequence is not None:
                self.move_window(sequence)
                if not is_single:
                    self.read(row, sequence)

        # Decode the newest tokens, and draw the next ones.
        rows = self.rows_to_decode()
        length = 1
        if is_single:
            length = len(rows[0].ids) - rows[0].window_start - rows[0].cached
        if self.settings is None:
            samplings = [sequence.sampling for sequence in rows]
            self.settings = stack_settings(samplings, self.runtime.sampling_device)
        tokens = [sequence.ids[-length:] for sequence in rows]
        tokens = torch.tensor(tokens, device=self.runtime.device)  # (B, T)
        uniforms = [0.0 if sequence is None else next(sequence.uniforms)
                    for sequence in self.sequences[:len(rows)]]
        uniforms = torch.tensor(uniforms, dtype=torch.float64)  # (B,)
        seen = None
        if self.seen is not None:
            seen = self.seen[:len(rows)]  # (B, V)
        ids, is_finite, self.logits = self.decode_step(
            self.model, tokens, *self.cache_and_start(rows, length),
            uniforms.to(self.runtime.sampling_device), self.settings, seen, self.runtime)
        if seen is not None:
            seen[torch.arange(len(ids), device=ids.device), ids] = True

        # Add the ids to their sequences.
        new_ids = [None] * len(self.sequences)
        for row, new_id in enumerate(fetch_ids(ids, is_finite, self.runtime)):
            if self.sequences[row] is not None:
                new_ids[row] = new_id
                rows[row].ids.append(new_id)
                rows[row].cached += length
        return new_ids

    def move_window(self, sequence):
        """Forget the older half of the window when it has outgrown block_size."""
        block_size = self.model.config.block_size
        if len(sequence.ids) - sequence.window_start > block_size:
            sequence.window_start = len(sequence.ids) - (block_size + 1) // 2
            sequence.cached = 0

    def read(self, row, sequence):
        """Read what the model has not read of a sequence's window, but its newest token."""
        window = sequence.ids[sequence.window_start:-1]
        if len(window) == sequence.cached:
            return

        # Where the row before holds the same, as for several samples of a prompt, copy it.
        end = len(window)
        if row > 0 and begins_with(self.sequences[row - 1], window):
            for k, v in self.cache:
                k[row, :, :end] = k[row - 1, :, :end]
                v[row, :, :end] = v[row - 1, :, :end]
        else:
            prefill(self.model, window[sequence.cached:], self.cache, row, self.runtime,
                    sequence.cached)
        sequence.cached = end

    def rows_to_decode(self):
        """Return the sequence of each row, up to the last one. A free row repeats a sequence; what
        is drawn there is not used."""
        taken = [row for row, sequence in enumerate(self.sequences) if sequence is not None]
        # A compiled step has the same shapes each time.
        count = len(self.sequences)
        if not self.compiled:
            count = taken[-1] + 1
        stand_in = self.sequences[taken[0]]
        return [sequence or stand_in for sequence in self.sequences[:count]]

    def cache_and_start(self, rows, length):
        """Return the part of the cache that decoding reads, and where the `length` newest tokens of
        each row begin."""
        # They come after all that is cached.
        positions = [sequence.cached for sequence in rows]
        start = torch.tensor(positions, device=self.runtime.device)  # (B,)
        if self.compiled:
            return self.cache, start
        # Uncompiled, nothing beyond the longest sequence is read.
        B, end = len(rows), length + max(positions)
        part = [(k[:B, :, :end], v[:B, :, :end]) for k, v in self.cache]
        # An int needs no mask.
        if min(positions) == max(positions):
            return part, positions[0]
        return part, start


def begins_with(sequence, window):
    """Return whether the keys and values that are cached for a sequence, or None, begin with those
    of a window, a list of ids."""
    if sequence is None or sequence.cached < len(window):
        return False
    start = sequence.window_start
    return sequence.ids[start:start + len(window)] == window


def draw_uniforms(generator):
    """Yield random numbers in [0, 1) without end."""
    while True:
        yield torch.rand((), dtype=torch.float64, generator=generator).item()


def prefill(model, ids, cache, row, runtime, start=0):
    """Read ids, a list, in one pass: write their keys and values into a row of the cache, at the
    positions from `start` on. cache: from model.make_cache; it holds what is before them."""
    # The row is a batch of one.
    tokens = torch.tensor([ids], device=runtime.device)  # (1, T)
    part = [(k[row:row + 1], v[row:row + 1]) for k, v in cache]
    with runtime.autocast():
        model.hidden(tokens, part, start)


def decode(model, tokens, cache, start, runtime):
    """Read the newest tokens of each sequence, (B, T), mostly T = 1, and return the logits of the
    next token, (B, V).

    start: the first tokens' positions, before which the cache holds all keys and values: (B,)
    int64; or an int, where all are the same (see model.hidden).
    """
    with runtime.autocast():
        x = model.hidden(tokens, cache, start)  # (B, T, C)
        return model.head(x[:, -1])  # (B, V)


def decode_and_sample(model, tokens, cache, start, uniforms, settings, seen, runtime):
    """`decode`, then `sample_ids`: all that happens on the device for a new token of each sequence.
    Return (ids (B,), are all logits finite (), logits (B, V))."""
    logits = decode(model, tokens, cache, start, runtime)  # (B, V)
    ids, is_finite = sample_ids(logits, uniforms, settings, seen)  # (B,), ()
    return ids, is_finite, logits


@lru_cache(maxsize=2)  # the usual batch of samples, and the last one, which may be smaller
def make_static_cache(model, rows, dtype):
    """Return a cache for compiled decoding: the same one for each Batch, as the addresses of its
    tensors are part of a CUDA graph. Torch is told that they stay, or it would copy the cache."""
    cache = model.make_cache(rows, dtype)
    for k, v in cache:
        torch._dynamo.mark_static_address(k)
        torch._dynamo.mark_static_address(v)
    return cache


def compile_decode_step():
    """Return decode_and_sample compiled; on CUDA into one graph, which costs a single launch."""
    return torch.compile(decode_and_sample, mode="reduce-overhead", fullgraph=True)


def fetch_ids(ids, is_finite, runtime):
    """Return ids (B,) as a list: the only time that generation waits for the device. Raises
    UserError where the logits were not finite."""
    *new_ids, is_finite = torch.cat((ids, is_finite[None])).tolist()
    if not is_finite:
        raise UserError("the logits are not finite: either training diverged, or "
                        f"{runtime.dtype} is too narrow for this model; try --dtype=float32")
    return new_ids


def prepare_model(model, runtime):
    """Make a GPT ready to be used and not trained: on its device, with its matrices in the number
    format of matrix products. Return it."""
    model.to(runtime.device).eval()
    # Its matrices, and what multiplies them.
    cast_weights(model, runtime.dtype)
    use_fast_products(model, runtime.device)
    return model


def cast_weights(model, dtype):
    """Convert the weight matrices to the number format of matrix products, once and not per token.

    The position embedding stays float32, and so does a token embedding that is not also the
    head's matrix: they are looked up, not multiplied, and the residual stream gets its number
    format from them, as under autocast.
    """
    # What is looked up; a tied token embedding is the head's matrix too, and is converted.
    looked_up = ["wpe.weight"]
    if not model.config.tied:
        looked_up.append("wte.weight")
    for name, weight in model.named_parameters():
        is_matrix = weight.dim() == 2
        if is_matrix and not name.endswith(tuple(looked_up)):
            weight.data = weight.data.to(dtype)
