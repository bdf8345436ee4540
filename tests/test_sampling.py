"""inference/sampling.py: min_p, the repetition penalty, rows with settings of their own."""

import math

import torch
from test_generate import CPU, V, random_model

from inference.generate import Batch
from inference.sampling import Sampling, sample_ids, stack_settings

SHARES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def kept(sampling, logits=None, seen=None):
    """Return which ids may be drawn, by 200 uniform numbers."""
    if logits is None:
        logits = SHARES.log()
    uniforms = torch.arange(200, dtype=torch.float64) / 200
    ids, _ = sample_ids(logits.expand(200, -1), uniforms, stack_settings([sampling] * 200, "cpu"),
                        seen)
    return set(ids.tolist())


def test_min_p_is_a_share_of_the_largest_probability():
    for min_p, expected in ((0.24, {0, 1, 2, 3}), (0.26, {1, 2, 3}), (0.51, {1, 3}), (1.0, {1})):
        assert kept(Sampling(1.0, 0, 1.0, 4, min_p)) == expected
    assert kept(Sampling(2.0, 0, 1.0, 4, 0.49)) == {0, 1, 2, 3}  # after temperature: 1/2
    assert kept(Sampling(2.0, 0, 1.0, 4, 0.51)) == {1, 2, 3}
    assert kept(Sampling(1.0, 3, 0.8, 4, 0.6)) == {1, 3}  # each setting leaves out what it does


def test_the_penalty_moves_seen_tokens_away_from_the_others():
    seen = torch.tensor([[True, True, False, False]])
    for logits, greedy in (([3.0, 2.9, 2.0, 0.0], 2), ([-1.0, -2.0, -1.5, -9.0], 2)):
        sampling = Sampling(0.0, 0, 1.0, 4, repetition_penalty=1.6)
        settings = stack_settings([sampling], "cpu")
        found, _ = sample_ids(torch.tensor([logits]), torch.zeros(1), settings, seen)
        assert found.tolist() == [greedy]
    unseen, _ = sample_ids(torch.tensor([[3.0, 2.9, 2.0, 0.0]]), torch.zeros(1), settings, ~seen)
    assert unseen.tolist() == [0]


def test_the_penalty_counts_the_prompt_and_what_was_drawn():
    batch, changed = Batch(random_model(), 2, CPU), 0
    for prompt in ([3, 1, 4], [2]):  # the second sequence of a row does not see the first
        text = list(prompt)
        row = batch.add(prompt, Sampling(0.0, 0, 1.0, V, repetition_penalty=3.0), torch.Generator())
        for _ in range(9):
            new_id = batch.step()[row]
            logits = batch.logits[row, :V].tolist()
            penalized = [x if i not in text else x / 3 if x > 0 else 3 * x
                         for i, x in enumerate(logits)]
            assert new_id == penalized.index(max(penalized))
            changed += new_id != logits.index(max(logits))
            text.append(new_id)
        batch.remove(row)
    assert changed > 3


def test_a_row_draws_the_same_whatever_the_others_settings_are():
    samplings = [Sampling(1.0, 0, 1.0, 101), Sampling(0.7, 5, 1.0, 101),
                 Sampling(0.0, 0, 1.0, 101), Sampling(1.3, 0, 0.7, 101),
                 Sampling(1.0, 50, 0.5, 101, 0.1), Sampling(9.0, 1, 1.0, 101)]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(7, (len(samplings), 101), generator=generator).float()  # with equals
    for _ in range(50):
        uniforms = torch.rand(len(samplings), dtype=torch.float64, generator=generator)
        together, _ = sample_ids(logits, uniforms, stack_settings(samplings, "cpu"))
        for i, sampling in enumerate(samplings):
            alone, _ = sample_ids(logits[i:i + 1], uniforms[i:i + 1],
                                  stack_settings([sampling], "cpu"))
            assert alone == together[i]


def test_the_last_uniform_number_draws_a_candidate():
    uniforms = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for tail in (1, 50):
        logits = torch.tensor([[0.0] * 3 + [-math.inf] * tail])
        settings = stack_settings([Sampling(1.0, 0, 1.0, 3 + tail)], "cpu")
        ids, _ = sample_ids(logits, uniforms, settings)
        assert ids.tolist() == [2]
