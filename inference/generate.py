"""Draw tokens from a model."""

import torch

from configurator import UserError


def cast_weights(model, dtype):
    """Convert the matrices to the number format of the products once, not at each token. The
    position embedding stays float32, and so does the token embedding where it is only looked up,
    and with them the residual stream, as under autocast."""
    looked_up = ("wpe.weight",) if model.config.tied else ("wpe.weight", "wte.weight")
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.endswith(looked_up):
            p.data = p.data.to(dtype)


@torch.inference_mode()
def generate(model, step, ids, generators, max_new_tokens, eot, runtime, fixed_step=None):
    """Yield the next token of each sample, a list of B ids, until all have ended or max_new_tokens.
    A sample that has ended, at end of text, has None there.

    generators: B of them, one for each sample; ids: the prompt of all. step, fixed_step: see
    next_tokens; the second, if any, is given tensors of the same shapes at each token. The model
    sees the last block_size tokens of the prompt and what follows; when that is more than
    block_size, it forgets all but the newest half of a block, whose positions begin at 0 again.
    Forgetting one token at a time would shift all positions, and so cost a whole block each time.
    """
    B, size, device = len(generators), model.config.block_size, runtime.device
    rows, ended = [list(ids) for _ in generators], [False] * B
    cache = model.make_cache(B, runtime.dtype)  # (n_layer, 2, B, H, block_size, D)
    if fixed_step:
        torch._dynamo.mark_static_address(cache)  # or CUDA graphs would copy it
    position = torch.zeros((), dtype=torch.int64, device=device)
    begin, filled = max(0, len(ids) - size), 0  # the first token in view; tokens in the cache
    for number in range(max_new_tokens):
        if len(rows[0]) - begin > size:
            begin, filled = len(rows[0]) - (size + 1) // 2, 0
        chances = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
        different = B if number else 1  # rows: at first all have the prompt, which is read once
        seen = torch.tensor([row[begin + filled:] for row in rows[:different]], device=device)
        if filled and fixed_step:
            new, finite = fixed_step(seen, cache, position.fill_(filled), chances.to(device))
        else:
            new, finite = step(seen, cache[:, :, :different], filled, chances)  # (B,), ()
            if different < B:
                cache[:, :, 1:] = cache[:, :, :1]
        filled += seen.shape[1]
        *new, finite = torch.cat((new, finite[None])).tolist()  # the only wait for the device
        if not finite:
            raise UserError("the logits are not finite: either training diverged, or "
                             f"{runtime.dtype} is too narrow for this model; try --dtype=float32")
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        ended = [end or token == eot for end, token in zip(ended, new, strict=True)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, new, strict=True)]


def next_tokens(model, vocab_size, temperature, top_k, top_p, runtime, tokens, cache, start,
                chances):
    """Token ids (B, T) at positions from `start` on, of which the cache holds the earlier ones,
    to (ids (B,), int64: are all logits finite? ()). Where all B rows are the same, one will do.

    Ids beyond vocab_size, which only pad the embedding, are never drawn. The drawing is CUDA's or
    the CPU's, never another device's: MPS has no float64 and a history of wrong draws.
    """
    with runtime.autocast():
        logits = model.head(model.hidden(tokens, cache, start)[:, -1])  # (B, V)
    place = runtime.device if runtime.device.type == "cuda" else "cpu"
    logits, chances = logits[:, :vocab_size].float().to(place), chances.to(place)
    ids = draw(logits.expand(len(chances), -1), temperature, top_k, top_p, chances)
    return ids, logits.isfinite().all().long()


def draw(logits, temperature, top_k, top_p, chances):
    """Return one id for each row of logits (B, V), from softmax(logits / temperature) over the
    top_k, and of those over the nucleus of top_p (Holtzman et al. 2020, section 3.1).

    chances: (B,) float64 in [0, 1): each row's place in its cumulative distribution, so that a
    seed, which gives them, means the same on every device and for every batch size.
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or top_p < 1:
        logits, ids = logits.topk(k)  # each (B, k), the largest first
    else:
        ids = torch.arange(k, device=logits.device).expand_as(logits)
    logits = logits.double()
    # subtracting the largest first keeps a tiny temperature from overflowing
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    sums = torch.softmax(logits, -1).cumsum(-1)  # (B, k)
    whole = sums[:, -1:]  # (B, 1)
    if top_p < 1:
        last = torch.searchsorted(sums, top_p * whole).clamp(max=k - 1)  # of the nucleus
        whole = sums.gather(-1, last)
    place = torch.searchsorted(sums, chances[:, None] * whole, right=True).clamp(max=k - 1)
    return ids.gather(-1, place)[:, 0]  # (B,)
