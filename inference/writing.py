"""A model with all that sample.py needs to write texts with it."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError
from formats.checkpoint import load_model, read_named
from formats.files import read_json
from inference.generate import generate, prepare_model
from inference.sampling import Sampling
from inference.speculate import Draft, Lookup, generate_with_proposals
from model import GPT
from runtime.processes import Runtime
from runtime.seeds import seed_for


class Writing(NamedTuple):
    """A model, ready to sample from, its tokenizer and the settings of sample.py."""
    model: GPT
    tokenizer: object
    sampling: Sampling
    stops: list  # texts that end a sample
    max_new_tokens: int
    seed: int
    runtime: Runtime
    compiled: bool = False
    drafter: object = None  # speculative decoding: "lookup", or a smaller GPT

    def generator(self, number):
        """Return the random generator of a sample. Each sample has its own, so that it is the same
        whatever the batch size is."""
        return torch.Generator().manual_seed(seed_for(self.seed, "sample", number))

    def steps(self, prompt_ids, numbers):
        """Return what `generate` yields for the samples of these numbers; with a drafter one."""
        if self.drafter is None:
            return generate(self.model, [prompt_ids] * len(numbers),
                            [self.generator(number) for number in numbers], self.max_new_tokens,
                            self.sampling, self.tokenizer.eot, self.runtime, self.compiled)
        # Speculative decoding draws one sample at a time.
        number, = numbers
        source = Lookup()
        if self.drafter != "lookup":
            source = Draft(self.drafter, self.sampling, self.runtime)
        return generate_with_proposals(self.model, source, prompt_ids, self.generator(number),
                                       self.max_new_tokens, self.sampling, self.tokenizer.eot,
                                       self.runtime)


def encode_prompt(text, tokenizer, model):
    """Return the ids of a prompt, of which a line on standard error says how much the model sees.
    An empty one becomes the token with which documents begin."""
    ids = tokenizer.encode_prompt(text)
    if not ids:
        if tokenizer.eot is None:
            raise UserError("the prompt is empty, and this model has no end-of-text token to begin "
                            "with; give it a prompt")
        ids = [tokenizer.eot]
    say_what_is_seen(ids, model)
    return ids


def say_what_is_seen(ids, model):
    """Print how much the model sees of a prompt beyond its block_size: the end."""
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f"the prompt has {len(ids):,} tokens, of which the model sees the last "
              f"{block_size:,} (its block_size)", file=sys.stderr)


def load_drafter(draft, checkpoint, tokenizer, runtime):
    """Return what the setting `draft` names: None, "lookup", or a run's model, ready to draw.
    Raises UserError for a model with another tokenizer."""
    if not draft:
        return None
    if draft == "lookup":
        return draft

    def load(folder):
        return load_model(folder), read_json(Path(folder) / "tokenizer.json")

    # A smaller model, which must have the same tokens.
    model, spec = read_named(draft, checkpoint, load)
    if spec != tokenizer.spec:
        raise UserError(f"draft={draft!r}: its tokenizer is not the model's; name a model that was "
                        "trained on the same dataset, or lookup")
    return prepare_model(model, runtime)
