"""runtime/quantized.py: int8 in place of a GPT's matrices, in memory and in a checkpoint."""

import copy
import json

import pytest
import torch
from test_convert import CHARACTERS, save_run
from test_own_code import MODERN
from torch.nn import functional as F

import convert
import sample
from configurator import UserError
from formats.checkpoint import load_model
from formats.files import read_json
from runtime.quantized import FEW_ROWS, LINEARS, TABLES, QuantizedLinear, quantize
from training.resume import checkpoint_settings

N, K = 37, 64  # the kernel needs a multiple of 64


def make_layer(columns=K):
    torch.manual_seed(1)
    layer = torch.nn.Linear(columns, N)
    with torch.no_grad():
        layer.weight[5] = 0
        layer.weight[7] *= 1000  # a row of another size has a scale of its own
    quantized = QuantizedLinear(layer)
    quantized.fill(layer.weight)
    return layer, quantized


def test_each_weight_is_within_half_a_step():
    layer, quantized = make_layer()
    steps = layer.weight.abs().amax(1, keepdim=True) / 127
    assert (quantized.weight - layer.weight).abs().le(0.501 * steps).all()
    assert quantized.integers.abs().amax(1).tolist() == [0 if n == 5 else 127 for n in range(N)]
    assert quantized.scales.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_is_that_of_the_dequantized_matrix(rows):
    """Of many rows exactly; the kernel for few rounds what it multiplies to bfloat16."""
    layer, quantized = make_layer()
    x = torch.randn(1, rows, K)
    expected = F.linear(x, quantized.weight, layer.bias)
    largest = x.norm(dim=-1, keepdim=True) * quantized.weight.norm(dim=1) + 1e-9  # (1, rows, N)
    assert ((quantized(x) - expected).abs() / largest).max() < 2**-8  # bfloat16's rounding
    assert torch.equal(quantized(x), expected) == (rows > FEW_ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == layer(x).dtype == torch.bfloat16


def test_sizes_that_the_kernel_cannot_have():
    """torch does not refuse them: the process would end."""
    layer, quantized = make_layer(columns=23)
    x = torch.randn(1, 23)
    assert torch.equal(quantized(x), F.linear(x, quantized.weight, layer.bias))


@pytest.mark.parametrize("changes", [{"n_embd": 192},
                                     {**MODERN, "n_embd": 192, "n_kv_head": 1, "mlp": "swiglu"}],
                         ids=["gpt2", "modern"])
def test_a_quantized_model_computes_nearly_the_same(tmp_path, changes):
    model, _ = save_run(tmp_path / "mine", CHARACTERS, **changes)
    quantized = copy.deepcopy(model)
    quantize(quantized)
    matrices = [name for name, p in quantized.named_parameters() if p.dim() == 2]
    assert all(name.endswith(("wpe.weight", "gate.weight")) for name in matrices)
    # the same as a model with the rounded weights: the head, its soft-cap, all tables
    rounded = copy.deepcopy(model)
    for name, layer in rounded.named_modules():
        if name.endswith(LINEARS + TABLES):
            layer.weight.data = quantized.get_submodule(name).weight
    tokens = torch.randint(11, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs, ours = rounded.logits(tokens), quantized.logits(tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # 22 rows: no kernel
        cache = quantized.make_cache(1)
        steps = [quantized.head(quantized.hidden(tokens[:1, t:t + 1], cache, t)[:, -1])
                 for t in range(11)]
    largest = ours[0].abs().max()
    assert (torch.stack(steps, 1)[0] - ours[0]).abs().max() < 0.05 * largest


def test_a_checkpoint_says_that_it_is_quantized(tmp_path, capsys):
    model, _ = save_run(tmp_path / "mine", CHARACTERS, **MODERN)
    convert.main(source=f"{tmp_path}/mine", to="int8", out_dir=f"{tmp_path}/small")
    assert f"small: {model.parameter_count():,} parameters;" in capsys.readouterr().out
    meta = read_json(tmp_path / "small" / "meta.json")
    assert (meta["quantized"], meta["source"]) == ("int8", f"{tmp_path}/mine")
    quantize(model)
    loaded = load_model(tmp_path / "small")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    sample.main(init_from=f"{tmp_path}/small", start="cat", num_samples=2, max_new_tokens=20,
                device="cpu", dtype="float32")
    assert capsys.readouterr().out.startswith("cat")


def test_what_a_quantized_checkpoint_cannot_be(tmp_path):
    save_run(tmp_path / "mine", CHARACTERS)
    small = tmp_path / "small"
    convert.main(source=f"{tmp_path}/mine", to="int8", out_dir=str(small))
    says = f"small: its weights are quantized to int8, so they cannot be .*; use .*{tmp_path}/mine"
    with pytest.raises(UserError, match=says.replace(".*;", "converted;")):
        convert.main(source=str(small), to="huggingface")
    with pytest.raises(UserError, match=says.replace(".*;", "trained;")):
        checkpoint_settings({"init_from": str(small)})
    # meta.json is believed, and nothing is guessed
    meta = read_json(small / "meta.json")
    (small / "meta.json").write_text(json.dumps({**meta, "quantized": "int3"}))
    with pytest.raises(UserError, match="quantized to 'int3'; this version knows int8"):
        load_model(small)
    del meta["quantized"]
    (small / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="the weights are another model's"):
        load_model(small)
