"""How probable each token of a sample was, and which others the model thought of.

The probabilities are the model's own: before temperature, top_k and the other settings.
"""

import json
import sys

import torch

from inference.generate import Batch
from inference.text_stream import TextStream
from runtime.terminal import say, use_colour

# The background of a token, by 256 colours of a terminal: (from this probability on, colour).
COLOURS = ((0.8, 22), (0.5, 64), (0.2, 136), (0.05, 166), (0.0, 124))


def most_probable(logits, vocab_size, new_id, count):
    """Return (the probability of new_id, [(id, probability) of the `count` most probable ids]).

    logits: (V,) of one row, as the model gives them.
    """
    probabilities = torch.softmax(logits[:vocab_size].float(), -1)  # (V,)
    values, ids = probabilities.topk(min(count, vocab_size))  # each (count,)
    return probabilities[new_id].item(), list(zip(ids.tolist(), values.tolist(), strict=True))


def show_probabilities(writing, prompt_ids, number):
    """Print a line for each token of a sample: its probability, itself, the runners-up; then the
    text, each token on the colour of its probability. Return the number of tokens."""
    batch, tokenizer = Batch(writing.model, 1, writing.runtime), writing.tokenizer
    batch.add(prompt_ids, writing.sampling, writing.generator(number))
    stream = TextStream(tokenizer, writing.stops)
    has_colours, parts = use_colour(sys.stdout), []
    for _ in range(writing.max_new_tokens):
        new_id, = batch.step()
        probability, best = most_probable(batch.logits[0], tokenizer.vocab_size, new_id, 5)
        # The line of this token.
        others = [f"{quote(tokenizer, other)} {share:.1%}" for other, share in best
                  if other != new_id]
        token = quote(tokenizer, new_id)
        if has_colours:
            token = colour(token, probability)
        say(f"{probability:7.1%}  {token}   " + "  ".join(others))
        if new_id == tokenizer.eot:
            break
        parts.append((new_id, probability))
        # A stop may consist of several tokens.
        stream.add(new_id)
        if stream.has_stopped:
            break

    # The whole text.
    if has_colours:
        text = "".join(colour(tokenizer.decode([i]), probability) for i, probability in parts)
    else:
        text = tokenizer.decode([i for i, _ in parts])
    say(tokenizer.decode(prompt_ids) + text)
    say("---------------")
    return len(parts)


def quote(tokenizer, token_id):
    """Return a token in quotes, with its line breaks as \\n; bytes that are no text as they are."""
    return json.dumps(tokenizer.decode([token_id]), ensure_ascii=False)


def colour(text, probability):
    """Return text on the colour of a probability. A line break ends the colour and begins it anew,
    or the terminal would colour the rest of the line."""
    code = next(code for limit, code in COLOURS if probability >= limit)
    lines = [f"\033[48;5;{code}m{line}\033[0m" for line in text.split("\n")]
    return "\n".join(lines)
