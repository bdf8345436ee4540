"""The neural rungs side by side: which model each is, and on which batches it is trained.

    model = make_neural("lstm", tokenizer, c)
    curve = train_neural("lstm", model, train_tokens, val_tokens, tokenizer, c)

c has climb.py's settings: order, width, layers, dropout, learning_rate, draws, seconds, max_iters
and seed.
The sizes below are those of a minute on two CPU cores; 0 in c stands for them.
"""

import numpy as np
import torch

from configurator import UserError
from ladder.masked import (
    MaskedGPT,
    blank_losses,
    choose_blanks,
    encode_blanks,
    fill_blanks,
    masked_batches,
    special_ids,
)
from ladder.mlp import MLP
from ladder.recurrent import Recurrent
from ladder.sampled import Sampler
from ladder.training import contiguous_chunks, random_windows, train
from runtime.seeds import seed_for

# {rung: (width, layers, peak learning rate)}; MLP has one layer whatever is asked for
SIZES = {"mlp": (200, 1, 1e-2), "rnn": (200, 1, 2e-3), "gru": (200, 2, 1e-2),
         "lstm": (200, 2, 1e-2), "masked": (128, 4, 2e-3)}
NEURAL = tuple(SIZES)
BATCH = (20, 35)  # sequences and their length; Zaremba's
MASKED_BATCH = (8, 128)
LARGE_VOCABULARY = 4000  # from so many tokens on, train on a part of the softmax, and with SGD
SGD = {"sgd": True, "learning_rate": 20.0, "grad_clip": 0.25}  # about as Zaremba et al. 2014
EVAL_TOKENS = 8000  # of the validation split, for a point of the curve


def make_neural(name, tokenizer, c):
    """Return the untrained model of a rung, the same for equal seeds."""
    # the sizes
    width, layers, _ = SIZES[name]
    width, layers, V = c.width or width, c.layers or layers, tokenizer.vocab_size
    torch.manual_seed(seed_for(c.seed, name))
    # the model
    if name == "mlp":
        if c.order < 2:
            raise UserError(f"order={c.order}: mlp predicts from the order - 1 tokens before; "
                            "give it at least 2")
        return MLP(V, c.order, width=width, channels=width // 2, dropout=c.dropout)
    if name == "masked":
        return MaskedGPT(V, block_size=MASKED_BATCH[1], n_layer=layers, n_head=4, n_embd=width,
                         dropout=c.dropout)
    return Recurrent(V, name, layers, width, c.dropout)


def train_neural(name, model, train_tokens, val_tokens, tokenizer, c):
    """Train the model of a rung; return its curve, [(seconds, validation loss)]. That of `masked`
    is the loss of blanks, and not of a text."""
    generator = torch.Generator().manual_seed(seed_for(c.seed, name, "data"))
    never, val_tokens = special_ids(tokenizer), val_tokens[:EVAL_TOKENS]
    blanks = choose_blanks(val_tokens, never, np.random.default_rng(c.seed))

    def measure():
        # a point of the curve
        if name == "masked":
            return blank_losses(model, val_tokens, blanks).mean()
        return model.losses(val_tokens).mean()

    # the batches of this rung
    if name == "mlp":
        batches = random_windows(train_tokens, *BATCH, generator)
    elif name == "masked":
        batches = random_windows(train_tokens, *MASKED_BATCH, generator)
        batches = masked_batches(batches, model.mask_id, never, generator)
    else:
        batches = contiguous_chunks(train_tokens, *BATCH)
    # how the model is trained
    settings = {"learning_rate": SIZES[name][2]}
    if name != "masked" and tokenizer.vocab_size >= LARGE_VOCABULARY:
        if name != "rnn":  # with SGD it learns slowly, or diverges
            settings = dict(SGD)
        if c.draws:
            model.sampler = Sampler(train_tokens, tokenizer.vocab_size, c.draws)
    if c.learning_rate:
        settings["learning_rate"] = c.learning_rate
    # train it
    history = train(model, batches, measure, seconds=c.seconds, max_iters=c.max_iters, label=name,
                    **settings)
    return [(row["seconds"], row["val_loss"]) for row in history]


def blanks_filled(model, tokenizer, val_tokens, prompt):
    """Return a text that shows how a masked model fills blanks: those of a prompt, or, where it is
    '', every sixth of the first validation tokens."""
    never = special_ids(tokenizer)
    if prompt:
        ids = encode_blanks(model, tokenizer, prompt)
    else:
        ids = np.array(val_tokens[:model.config.block_size // 2])
        ids[5::6] = model.mask_id
    filled, choices = fill_blanks(model, ids, never)
    # show them: the text, then a line for each blank
    lines = [tokenizer.decode(filled)]
    for number, found in enumerate(choices, start=1):
        shares = [f"{tokenizer.decode([i])!r} {share:.0%}" for i, share in found]
        lines.append(f"blank {number}: {', '.join(shares)}")
    return "\n".join(lines)
