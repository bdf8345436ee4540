"""Speculative decoding: the text of plain sampling, in fewer passes of the model.

Something cheap proposes the next tokens: a Lookup, what followed the newest tokens where they
occurred before (Saxena 2023, "Prompt lookup decoding"); or a Draft, a smaller model (Leviathan et
al. 2023). The model reads the newest token and the whole proposal in one pass, and draws a token
after each of them, with the random numbers of plain sampling. While what it draws is what was
proposed, the next draw is one of plain sampling too. So the text is the same at any temperature,
but for rounding: a pass over several tokens adds in another order than one over one token.
"""

import torch

from inference.generate import Batch, fetch_ids
from inference.sampling import sample_ids, stack_settings

LONGEST_PROPOSAL = 16
NGRAMS = (8, 4, 2)  # how many of the newest tokens are looked up, the most first


def generate_with_proposals(model, source, prompt_ids, generator, max_new_tokens, sampling,
                            end_of_text, runtime, passes=None):
    """Yield [id] for each new token of one sample, as `generate` does.

    source: a Lookup or a Draft. passes: a list that gets the number of new tokens of each pass.
    """
    batch = Batch(model, 1, runtime)
    batch.add(prompt_ids, sampling, generator)
    sequence, = batch.sequences
    uniforms = []  # the random numbers of the next tokens
    count, written = 2, 0  # how many tokens to propose; how many there are
    while written < max_new_tokens:
        # Propose no more than the window has room for, and than may be written.
        with torch.inference_mode():
            batch.move_window(sequence)
            batch.read(0, sequence)
        room = min(model.config.block_size - sequence.cached, max_new_tokens - written) - 1
        count = min(count, room)
        while len(uniforms) <= count:
            uniforms.append(next(sequence.uniforms))
        proposal = source.propose(sequence.ids, uniforms[:count])
        ids = draw_after_each(batch, proposal, uniforms)

        # Pass on the ids up to the first that was not proposed. The cache beyond it is not used.
        accepted = 0
        while accepted < len(proposal) and ids[accepted] == proposal[accepted]:
            accepted += 1
        new_ids = ids[:accepted + 1]
        # A sample ends before end-of-text.
        if end_of_text in new_ids:
            new_ids = new_ids[:new_ids.index(end_of_text)]
        if passes is not None:
            passes.append(len(new_ids))
        for new_id in new_ids:
            yield [new_id]
        if len(new_ids) <= accepted:
            return

        # Next time propose twice as many as were right.
        sequence.cached += len(new_ids)
        batch.extend(0, new_ids)
        del uniforms[:len(new_ids)]
        written += len(new_ids)
        count = min(max(2, 2 * accepted), LONGEST_PROPOSAL)


@torch.inference_mode()
def draw_after_each(batch, proposal, uniforms):
    """Read the newest token of a Batch's one sequence and then a proposal; return the list of ids
    that are drawn after each of them."""
    sequence, = batch.sequences
    runtime = batch.runtime
    tokens = torch.tensor([[sequence.ids[-1], *proposal]], device=runtime.device)  # (1, T)
    with runtime.autocast():
        x = batch.model.hidden(tokens, batch.cache, sequence.cached)  # (1, T, C)
        logits = batch.model.head(x[0])  # (T, V)

    # Draw as if each were a row of its own; for the penalty it has seen the ids before it.
    T, device = len(logits), runtime.sampling_device
    seen = None
    if batch.seen is not None:
        seen = batch.seen.repeat(T, 1)  # (T, V)
        for i, proposed in enumerate(proposal, start=1):
            seen[i:, proposed] = True
    settings = stack_settings([sequence.sampling] * T, device)
    uniforms = torch.tensor(uniforms[:T], dtype=torch.float64, device=device)  # (T,)
    return fetch_ids(*sample_ids(logits, uniforms, settings, seen), runtime)


class Lookup:
    """Proposes what followed the newest tokens where they occurred last."""

    def __init__(self):
        self.follows = {}  # {some tokens: the index of what followed them last}
        self.length = 0  # of the ids that are entered

    def propose(self, ids, uniforms):
        """Return at most one id for each of the uniforms."""
        # Enter what precedes each id that is new since the last time.
        for end in range(self.length, len(ids)):
            for n in NGRAMS:
                if n <= end:
                    self.follows[tuple(ids[end - n:end])] = end
        self.length = len(ids)

        # Copy what followed, and where the copy reaches the end of the text, go on with the copy.
        for n in NGRAMS:
            start = self.follows.get(tuple(ids[-n:]))
            if start is not None:
                text = list(ids)
                for i in range(len(uniforms)):
                    text.append(text[start + i])
                return text[len(ids):]
        return []


class Draft:
    """Proposes what a smaller model draws with the same random numbers."""

    def __init__(self, model, sampling, runtime):
        self.batch = Batch(model, 1, runtime)
        # The penalty would need the tokens seen; without it fewer proposals are right, no more.
        self.sampling = sampling._replace(repetition_penalty=1.0)

    def propose(self, ids, uniforms):
        """Return an id for each of the uniforms."""
        # The first time: begin with the prompt.
        if self.batch.sequences[0] is None:
            self.batch.add(ids, self.sampling, None)
        sequence, = self.batch.sequences

        # Forget what it proposed in vain.
        kept = 0
        while kept < min(len(ids), len(sequence.ids)) and ids[kept] == sequence.ids[kept]:
            kept += 1
        sequence.cached = max(0, min(sequence.cached, kept - sequence.window_start))
        sequence.ids = list(ids)
        # Draw as many as there are numbers.
        sequence.uniforms = iter(uniforms)
        return [self.batch.step()[0] for _ in uniforms]
