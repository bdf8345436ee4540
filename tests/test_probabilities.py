"""inference/probabilities.py: the probabilities are the model's own."""

import re

import pytest
import torch
from conftest import in_float32
from test_sample import LETTERS, write_checkpoint

import sample
from formats.checkpoint import load_model
from inference.probabilities import colour


@in_float32
@torch.no_grad()
def test_each_token_has_its_probability_and_the_runners_up(tmp_path, capsys, number_format):
    folder = write_checkpoint(tmp_path / "model", LETTERS, rows=16, seed=3)
    sample.main(init_from=str(folder), start="ab", show_probs=True, num_samples=1, temperature=0.0,
                max_new_tokens=4, device="cpu")
    *lines, text, rule = capsys.readouterr().out.rstrip("\n").split("\n")
    assert rule == "---------------" and text.startswith("ab") and len(lines) == 4
    ids = LETTERS.encode_prompt(text)
    model = load_model(folder).eval()
    for i, line in enumerate(lines, start=2):
        shares = model.logits(torch.tensor([ids[:i]]))[0, -1, :LETTERS.vocab_size].softmax(-1)
        found = re.findall(r'"([^"]*)"', line)
        assert found[0] == text[i]
        assert float(line.split("%")[0]) == pytest.approx(100 * shares[ids[i]].item(), abs=0.06)
        best = [LETTERS.decode([j]) for j in shares.topk(5).indices.tolist()]
        assert found[1:] == [other for other in best if other != text[i]]


def test_a_line_break_ends_the_colour():
    assert colour("a\nb", 0.9) == "\033[48;5;22ma\033[0m\n\033[48;5;22mb\033[0m"
    assert len({colour("a", p) for p in (1.0, 0.6, 0.3, 0.1, 0.0)}) == 5
