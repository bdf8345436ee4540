"""Texts that a model writes on: for tasks whose answer is not chosen but written."""

import torch

from evaluation.scoring import evaluating
from inference.generate import Sampling, generate


def write_on(scorer, prompt, max_new_tokens, stops=(), temperature=0.0):
    """Return what the model writes after a prompt, up to the first of the stops, a text each.

    Of a long prompt the model sees the end: as much as leaves room for max_new_tokens, which is
    how the harness cuts it, or half of its block size where they fill all of it.
    """
    # The end of the prompt.
    block_size, tokenizer = scorer.model.config.block_size, scorer.tokenizer
    kept = block_size - max_new_tokens
    if kept < 1:
        kept = (block_size + 1) // 2
    prompt_ids = tokenizer.encode(prompt).tolist()[-kept:]
    if not prompt_ids:
        prompt_ids = [scorer.end_of_text()]

    # Add tokens until a stop shows up in the text.
    sampling = Sampling(temperature, top_k=0, top_p=1.0, vocab_size=tokenizer.vocab_size)
    new_ids, text = [], ""
    with evaluating(scorer.model):
        for new_id, in generate(scorer.model, [prompt_ids], [torch.Generator()],
                                max_new_tokens, sampling, tokenizer.eot, scorer.runtime):
            new_ids.append(new_id)
            # a stop may consist of several tokens
            text = tokenizer.decode(new_ids)
            if any(stop in text for stop in stops):
                break
    # Leave out the stop, and what its last token has after it.
    for stop in stops:
        text = text.split(stop)[0]
    return text


def share_texts(texts, runtime):
    """Return the texts of all processes; each has written some of the list and left the others ''.
    """
    if runtime.world_size == 1:
        return texts
    # as rows of bytes, where a sum puts each row in its place
    encoded = [text.encode() for text in texts]
    longest, = runtime.all_max(max(map(len, encoded)))
    padded = [list(data.ljust(int(longest), b"\0")) for data in encoded]
    rows = torch.tensor(padded, dtype=torch.uint8)
    rows = runtime.sum(rows.to(runtime.device)).cpu().numpy()
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]
