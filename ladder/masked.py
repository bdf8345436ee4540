"""Masked prediction as in BERT (Devlin et al. 2019, arXiv:1810.04805, section 3.1): fill blanks.

    model = MaskedGPT(vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128)
    ids = encode_blanks(model, tokenizer, "for i in [MASK]range(10):")
    filled, choices = fill_blanks(model, ids, special_ids(tokenizer))

The encoder is model.py's GPT with one thing changed: attention looks at both sides. Then the next
token is no longer a secret, so the task is another one: some tokens are hidden, and the model names
them from what stands around them. It fills a blank in the middle better than a causal model, which
sees only the left side. But it learns from 15% of the tokens it reads, where a causal model learns
from all, and it gives no probability to a whole text: no loss per token to compare, no sampling
from left to right.
Sizes: B batch, T time, V vocabulary.
"""

import numpy as np
import torch
from torch.nn import functional as F

from configurator import UserError
from model import GPT, IGNORE, GPTConfig

MASK = "[MASK]"
SELECTED = 0.15  # the share of tokens that are to be predicted; of those
MASKED = 0.8  # this share is hidden behind the mask's id,
REPLACED = 0.1  # this share is replaced by a random token, and the rest stays


class MaskedGPT(GPT):
    """A bidirectional encoder. Its last id, `mask_id`, is the mask's, and is never predicted."""

    def __init__(self, vocab_size, generator=None, **sizes):
        super().__init__(GPTConfig(vocab_size=vocab_size + 1, bias=False, **sizes), generator)
        self.mask_id = vocab_size

    def attention_mask(self, tokens, positions, cache, start, end):
        """Return a mask that lets every position look at every other."""
        return torch.ones(end, end, dtype=torch.bool, device=tokens.device)  # (T, T)

    def advance(self, tokens, targets, state=None):
        """Return (losses (B, T), None), as training.py asks for it."""
        return self(tokens, targets), None

    @torch.no_grad()
    def log_probabilities(self, tokens):
        """Return the log-probabilities of the token at each place, (B, T, V) float64, of (B, T)."""
        # the mask itself is no answer
        logits = self.logits(tokens)[..., :self.mask_id].double()  # (B, T, V)
        return F.log_softmax(logits, -1)

    def size(self):
        return sum(p.numel() for p in self.parameters()), "parameters"


# ---------------------------------------------------------------------- the objective


def masked_batches(batches, mask_id, never, generator):
    """Yield (tokens with blanks, targets), each (B, T), of batches of (tokens, next tokens)."""
    # the targets of the causal models are of no use here
    for tokens, _ in batches:
        yield hide_tokens(tokens, mask_id, never, generator)


def hide_tokens(tokens, mask_id, never, generator):
    """Return (tokens with blanks, targets), each (B, T): IGNORE where nothing is to be predicted.

    The model has to predict the selected tokens alone. Of these 80% are hidden, 10% are replaced
    and 10% stay: without the last two the model would be good at blanks only, and a text to be
    filled has few. never: special ids, which are neither selected nor put in another's place.
    """
    special = torch.isin(tokens, torch.tensor(never, dtype=torch.int64))  # (B, T)
    ordinary = torch.tensor([i for i in range(mask_id) if i not in never])
    # three draws for each token: whether it is selected, what then happens, and a random token
    selected = torch.rand(tokens.shape, generator=generator) < SELECTED  # (B, T)
    selected &= ~special
    draw = torch.rand(tokens.shape, generator=generator)  # (B, T)
    random = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]  # (B, T)
    # what becomes of them
    hidden = torch.where(selected & (draw < MASKED), mask_id, tokens)  # (B, T)
    replaced = selected & (draw >= MASKED) & (draw < MASKED + REPLACED)
    hidden = torch.where(replaced, random, hidden)  # (B, T)
    return hidden, torch.where(selected, tokens, IGNORE)  # each (B, T)


# ---------------------------------------------------------------------- using it


def choose_blanks(tokens, never, rng):
    """Return 15% of the places of a text (N,), (K,) in their order; neither the first token, which
    a causal model does not predict, nor those of `never` are among them."""
    selected = (rng.random(len(tokens)) < SELECTED) & ~np.isin(tokens, never)  # (N,)
    selected[0] = False
    return np.flatnonzero(selected)


@torch.no_grad()
def blank_losses(model, tokens, places):
    """Return the nats (K,), float64, of the tokens of a text (N,) at these places, all hidden, from
    the rest of their blocks of block_size tokens. Beside them are a causal model's
    losses(tokens)[places - 1], which are from the left side alone, but without holes."""
    # hide them, and cut the text into blocks; the last is filled up, without targets
    T, device = model.config.block_size, model.head_weight.device
    hidden, targets = np.array(tokens, np.int64), np.full(len(tokens), IGNORE, np.int64)  # (N,)
    hidden[places], targets[places] = model.mask_id, tokens[places]
    rest = -len(tokens) % T
    hidden = torch.as_tensor(np.pad(hidden, (0, rest))).view(-1, T)  # (N/T, T)
    targets = np.pad(targets, (0, rest), constant_values=IGNORE)
    targets = torch.as_tensor(targets).view(-1, T)  # (N/T, T)
    # the model's losses, a few blocks at a time
    model.eval()
    losses = []
    for first in range(0, len(hidden), 16):
        blocks = slice(first, first + 16)
        found = model(hidden[blocks].to(device), targets[blocks].to(device))  # (16, T)
        losses.append(found.double().cpu().flatten())
    return torch.cat(losses).numpy()[places]


def encode_blanks(model, tokenizer, prompt):
    """Return the ids of a prompt, a list, with the mask's id for each [MASK], which stands for one
    token. Raises UserError for a prompt without a blank, and for one that is too long."""
    if MASK not in prompt:
        raise UserError(f"{prompt!r:.60} has no blank to fill: write {MASK} in place of a token")
    # put the mask's id between the parts that [MASK] separates
    first, *others = prompt.split(MASK)
    ids = tokenizer.encode(first).tolist()
    for part in others:
        ids += [model.mask_id, *tokenizer.encode(part).tolist()]
    if len(ids) > model.config.block_size:
        raise UserError(f"{prompt!r:.60} has {len(ids)} tokens, the model reads at most "
                        f"{model.config.block_size}: shorten it")
    return ids


def fill_blanks(model, ids, never, count=5):
    """Return (ids without blanks, choices): for each blank, from left to right, the `count` most
    probable tokens, [(id, probability)]. `never` fills none.

    The blank of which the model is most certain is filled first, and then helps with the others.
    """
    ids, choices = list(ids), {}
    model.eval()
    while model.mask_id in ids:
        # the probabilities at each blank
        blanks = [place for place, token in enumerate(ids) if token == model.mask_id]
        tokens = torch.tensor([ids], device=model.head_weight.device)  # (1, T)
        probabilities = model.log_probabilities(tokens)[0, blanks].exp()  # (blanks, V)
        probabilities[:, never] = 0
        # fill the one that is most certain
        surest = int(probabilities.amax(1).argmax())
        values, found = probabilities[surest].sort(descending=True)
        choices[blanks[surest]] = list(zip(found[:count].tolist(), values[:count].tolist(),
                                           strict=True))
        ids[blanks[surest]] = int(found[0])
    return ids, [choices[place] for place in sorted(choices)]


def special_ids(tokenizer):
    """Return the ids that no text has: end-of-text and the special tokens."""
    ids = list(tokenizer.special.values())
    if tokenizer.eot is not None:
        ids.append(tokenizer.eot)
    return ids
