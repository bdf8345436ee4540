"""model.py: against two other implementations, its shape comments, its properties, its files."""

import ast
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tokenize
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import model as model_file
from exchange import huggingface
from formats.checkpoint import find_checkpoint
from formats.weights import load_model, model_with_weights, save_weights
from model import GPT, IGNORE, GPTConfig
from runtime.memory import checkpoint_activations
from runtime.speed import flops_per_token
from training.setup import crop_block_size

B, T, H, D, V = 2, 5, 3, 7, 11
C, LAYERS, BLOCK = H * D, 2, 13
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C)
SWITCHES = {
    "rope": dict(rope=True, n_embd=24), "rmsnorm": dict(rmsnorm=True),
    "qk_norm": dict(qk_norm=True), "relu2": dict(mlp="relu2"),
    "swiglu": dict(mlp="swiglu"), "untied": dict(tied=False),
    "zero_init": dict(zero_init=True), "softcap": dict(softcap=1.5),
    "n_kv_head": dict(n_kv_head=1), "value_embeds": dict(value_embeds=True),
    "residual_scalars": dict(residual_scalars=True)}
ALL = dict(bias=False, n_embd=24, n_head=6, n_kv_head=3, rope=True, rmsnorm=True, qk_norm=True,
           mlp="swiglu", tied=False, zero_init=True, softcap=1.5, value_embeds=True,
           residual_scalars=True)
each_switch = pytest.mark.parametrize("changes", [*SWITCHES.values(), ALL],
                                      ids=[*SWITCHES, "all of them"])


def make(seed=1, spread=0.3, **changes):
    """A tiny GPT whose every parameter, biases and LayerNorms too, is random and matters."""
    model = GPT(replace(CONFIG, **changes), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator))
    return model


def batch(length=T, vocab_size=V, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (B, length + 1), generator=generator)
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


# ---------------------------------------------------------------------- other implementations


@pytest.mark.parametrize("length", [T, BLOCK])
def test_logits_and_gradients_are_those_of_transformers_gpt2(length, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=BLOCK, n_embd=C, n_layer=LAYERS, n_head=H, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = huggingface.load_gpt2(str(tmp_path)).eval()
    tokens, targets = batch(length)

    their_logits = theirs(tokens).logits
    torch.testing.assert_close(ours.logits(tokens), their_logits, rtol=1e-5, atol=1e-5)
    F.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    (ours(tokens, targets).sum() / targets.numel()).backward()
    expected = huggingface.from_transformers(
        {key: p.grad for key, p in theirs.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 12 * LAYERS + 4
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-5, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def reference_logits(weights, tokens):
    """GPT-2 without biases for one row of tokens, a head and a position at a time."""
    def norm(x, gain):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True)
                                                 + 1e-5).sqrt() * gain

    w = {name.removeprefix("transformer."): p for name, p in weights.items()}
    x = torch.stack([w["wte.weight"][token] + w["wpe.weight"][t]
                     for t, token in enumerate(tokens.tolist())])
    for i in range(LAYERS):
        h = norm(x, w[f"h.{i}.ln_1.weight"]) @ w[f"h.{i}.attn.c_attn.weight"].T
        heads = torch.zeros(len(tokens), C, dtype=x.dtype)
        for n in range(H):
            q, k, v = (h[:, part * C + n * D:part * C + (n + 1) * D] for part in range(3))
            for t in range(len(tokens)):
                weight = torch.exp(torch.stack([q[t] @ k[s] / math.sqrt(D) for s in range(t + 1)]))
                heads[t, n * D:(n + 1) * D] = (weight / weight.sum()) @ v[:t + 1]
        x = x + heads @ w[f"h.{i}.attn.c_proj.weight"].T
        h = norm(x, w[f"h.{i}.ln_2.weight"]) @ w[f"h.{i}.mlp.c_fc.weight"].T
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w[f"h.{i}.mlp.c_proj.weight"].T
    return norm(x, w["ln_f.weight"]) @ w["wte.weight"].T


def test_without_biases_the_logits_are_those_of_a_reference_in_plain_loops():
    model = make(bias=False).double()
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    tokens, _ = batch(BLOCK)
    with torch.no_grad():
        logits = model.logits(tokens)
        for row in range(B):
            expected = reference_logits(model.state_dict(), tokens[row])
            torch.testing.assert_close(logits[row], expected, rtol=1e-10, atol=1e-10)


def reference_of_the_switches(w, tokens):
    """The logits of ALL's model for one row of tokens, in plain loops, from the papers."""
    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, t):  # as complex numbers, channel i and i + 2 of 4
        pair = torch.complex(x[:2], x[2:])
        pair = pair * torch.exp(1j * t * torch.tensor([1.0, 1 / 100], dtype=torch.float64))
        return torch.cat((pair.real, pair.imag))

    w = {name.removeprefix("transformer."): p for name, p in w.items()}
    x = x0 = norm(w["wte.weight"][tokens])
    for i in range(LAYERS):
        x = w[f"h.{i}.resid_lambda"] * x + w[f"h.{i}.x0_lambda"] * x0
        h = norm(x)
        q, k, v = (h @ w[f"h.{i}.attn.c_attn.weight"].T).split((24, 12, 12), -1)
        heads = torch.zeros_like(q)
        if i == 1:  # the last layer has a table, the one before it none
            gate = 2 * torch.sigmoid(h[:, :12] @ w[f"h.{i}.attn.gate.weight"].T)
            v = v + gate.repeat_interleave(4, -1) * w[f"h.{i}.attn.value_embed.weight"][tokens]
        for n in range(6):
            m = n // 2  # two heads share one of keys and values
            for t in range(len(tokens)):
                a = turned(norm(q[t, 4 * n:4 * n + 4]), t)
                score = torch.stack([a @ turned(norm(k[s, 4 * m:4 * m + 4]), s)
                                     for s in range(t + 1)]) * 1.44 / 2
                heads[t, 4 * n:4 * n + 4] = score.softmax(0) @ v[:t + 1, 4 * m:4 * m + 4]
        x = x + heads @ w[f"h.{i}.attn.c_proj.weight"].T
        gate, h = (norm(x) @ w[f"h.{i}.mlp.c_fc.weight"].T).split(64, -1)
        x = x + (gate * torch.sigmoid(gate) * h) @ w[f"h.{i}.mlp.c_proj.weight"].T
    return 1.5 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 1.5)


def test_with_all_switches_the_logits_are_those_of_a_reference_in_plain_loops():
    model = make(**ALL).double()
    tokens, _ = batch(BLOCK)
    with torch.no_grad():
        logits = model.logits(tokens)
        for row in range(B):
            expected = reference_of_the_switches(model.state_dict(), tokens[row])
            torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


def test_relu2_is_the_square_of_relu():
    mlp = make(mlp="relu2").transformer.h[0].mlp
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.c_fc(x).clamp(min=0) ** 2))


# ---------------------------------------------------------------------- the switches


@each_switch
def test_a_switch_changes_the_model_and_its_parameters_learn(changes):
    model, plain = make(**changes), make(**{k: v for k, v in changes.items() if k == "n_embd"})
    tokens, targets = batch()
    if changes != SWITCHES["zero_init"]:
        assert not torch.equal(model.logits(tokens), plain.logits(tokens))
    model(tokens, targets).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-6, name


@each_switch
def test_a_switch_keeps_the_first_loss_near_ln_v(changes):
    model = GPT(replace(CONFIG, vocab_size=101, **changes), torch.Generator().manual_seed(1))
    assert abs(model(*batch(BLOCK, 101)).mean().item() - math.log(101)) < 0.1


@each_switch
def test_with_a_switch_a_token_changes_no_earlier_logit(changes):
    model = make(**changes)
    tokens, _ = batch(BLOCK)
    before = model.logits(tokens)
    tokens[:, T] = (tokens[:, T] + 1) % V
    after = model.logits(tokens)
    assert torch.equal(after[:, :T], before[:, :T])
    assert not torch.isclose(after[:, T], before[:, T]).all(-1).any()


@each_switch
@torch.no_grad()
def test_with_a_switch_cached_is_uncached(changes):
    model = make(**changes).double().eval()
    tokens, _ = batch(BLOCK)
    expected, cache = model.logits(tokens), model.make_cache(B)
    for part in (part for layer in cache for part in layer):
        part[..., 3:, :] = 1e3
    for a, b in ((0, 3), (3, 8), (8, 9)):
        x = model.hidden(tokens[:, a:b], cache, a)
        torch.testing.assert_close(model.head(x), expected[:, a:b])
    for t in range(9, BLOCK):
        x = model.hidden(tokens[:, t:t + 1], cache, torch.tensor(t))
        torch.testing.assert_close(model.head(x), expected[:, t:t + 1])


@each_switch
@torch.no_grad()
def test_with_a_switch_each_row_may_be_at_a_position_of_its_own(changes):
    """One row is five tokens ahead of the other; both read one token at a time, then three."""
    model = make(**changes).double().eval()
    tokens, _ = batch(BLOCK)
    expected, cache = model.logits(tokens), model.make_cache(B)
    for part in (part for layer in cache for part in layer):
        part.fill_(1e3)
    for row, length in ((0, 6), (1, 1)):
        model.hidden(tokens[row:row + 1, :length], [(k[row:row + 1], v[row:row + 1])
                                                    for k, v in cache])
    for start, count in ((0, 1), (1, 1), (2, 3), (5, 1)):
        positions = torch.tensor([6, 1]) + start
        columns = positions[:, None] + torch.arange(count)
        x = model.hidden(tokens.gather(1, columns), cache, positions)
        found = expected.gather(1, columns[..., None].expand(-1, -1, V))
        torch.testing.assert_close(model.head(x), found)


@each_switch
@torch.no_grad()
def test_with_a_switch_bfloat16_is_close_to_float32(changes):
    model = make(spread=0.1, **changes).eval()
    tokens, targets = batch(BLOCK)
    expected, logits = model(tokens, targets), model.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        losses, cache = model(tokens, targets), model.make_cache(B, torch.bfloat16)
        model.hidden(tokens[:, :T], cache)
        last = model.head(model.hidden(tokens[:, T:], cache, T))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(last.float(), logits[:, T:], rtol=0.05, atol=0.1)


@each_switch
def test_with_a_switch_weights_are_read_back_and_cropped(changes, tmp_path):
    model = make(**changes)
    crop_block_size(model, T)
    loaded = load_model(write_checkpoint(tmp_path, model))
    tokens, _ = batch()
    assert loaded.config == model.config and loaded.config.block_size == T
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    with pytest.raises(ValueError, match=f"block_size={T}"):
        loaded.logits(batch(T + 1)[0])


@each_switch
def test_with_a_switch_the_model_is_one_graph(changes):
    torch._dynamo.reset()  # it compiles one function only so many times
    model = make(**changes)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*batch()), model(*batch()))


def test_a_checkpoint_from_before_the_switches_is_gpt2(tmp_path):
    folder = write_checkpoint(tmp_path, make())
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    (folder / "meta.json").write_text(json.dumps({"model": {k: getattr(CONFIG, k) for k in sizes}}))
    assert load_model(folder).config == CONFIG


def test_first_weights_of_zero_init():
    model = GPT(replace(CONFIG, **{**ALL, "vocab_size": 211}), torch.Generator().manual_seed(1))
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight", "gate.weight", "x0_lambda")):
            assert (p == 0).all(), name
        elif name.endswith("resid_lambda"):
            assert (p == 1).all(), name
        else:
            expected = 1.0 if "wte" in name else 1 / math.sqrt(3 * 24)
            assert p.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * p.numel())), name


# ---------------------------------------------------------------------- documents


DOCUMENTS = torch.tensor([[1, 2, 0, 5, 4, 0, 0, 6, 8, 9, 9, 1, 2],  # begins in one; one is empty
                          [0, 3, 4, 5, 6, 7, 8, 9, 10, 1, 0, 2, 2]])
CUTS = ((0, 0, 2), (0, 2, 5), (0, 5, 6), (0, 6, 13), (1, 0, 10), (1, 10, 13))  # row, first, end


def keeps_to_documents(model):
    model.document_start = 0
    return model


def test_a_token_changes_its_document_alone():
    model = keeps_to_documents(make())
    before = model.logits(DOCUMENTS)
    for b, first, end in CUTS:
        t = first + (DOCUMENTS[b, first] == 0).item()
        if t == end:
            continue
        changed = DOCUMENTS.clone()
        changed[b, t] = 11 - DOCUMENTS[b, t]
        same = torch.isclose(model.logits(changed), before, rtol=1e-6, atol=1e-6).all(-1)
        assert not same[b, t:end].any()
        same[b, t:end] = True
        assert same.all()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_document_has_the_losses_and_gradients_that_it_has_alone(recompute):
    """With rotary positions, of which only differences matter, and all other switches."""
    targets = DOCUMENTS.roll(-1, 1)
    targets[1, 4] = IGNORE
    model, alone = keeps_to_documents(make(**ALL)), make(**ALL)
    if recompute:
        checkpoint_activations(model)
    losses = model(DOCUMENTS, targets)
    losses.sum().backward()
    for b, first, end in CUTS:
        its = alone(DOCUMENTS[b:b + 1, first:end], targets[b:b + 1, first:end])
        torch.testing.assert_close(losses[b:b + 1, first:end], its, rtol=1e-4, atol=1e-5)
        its.sum().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    assert losses[1, 4] == 0
    free = make(**ALL)(DOCUMENTS, targets)
    assert not torch.isclose(free, losses).all()


# ---------------------------------------------------------------------- the shape comments

TRACED = ("forward", "hidden", "head", "logits", "rotation_angles", "rotate", "swiglu",
          "attention_mask", "token_losses")


def check_shape_comments(path, module):
    """Trace a forward pass; return (numbers of the lines whose comment was right, complaints)."""
    source = path.read_text(encoding="utf-8")
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(
        io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    statements = {}  # first line: the assignment or return
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name in TRACED:
            for node in ast.walk(function):
                if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)):
                    for line in range(node.lineno, node.end_lineno + 1):
                        statements[line] = node
    sizes = {"B": B, "T": T, "V": V, "N": B * T, "R": 1}
    reached, right, complaints = set(), set(), {}  # complaints: a set in order

    def check(node, values):
        reached.add(node.lineno)
        values = [v for value in values for v in (value if type(value) is tuple else (value,))]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if not tensors:
            return
        found = re.search(r"# (?:each )?(\([^()]+\)(, \([^()]+\))*)",
                          comments.get(node.end_lineno, ""))
        if not found:
            complaints[f"line {node.lineno} makes a tensor and has no shape comment"] = True
            return
        shapes = re.findall(r"\(([^()]+)\)", found[1])  # of each tensor, or one of all
        for i, tensor in enumerate(tensors):
            wanted = [part.strip() for part in shapes[i % len(shapes)].split(",") if part.strip()]
            shape = list(tensor.shape)
            if wanted[0] == "...":
                shape = ["...", *shape[len(shape) - len(wanted) + 1:]]
            if shape != [part if part == "..." else eval(part, {}, sizes) for part in wanted]:
                complaints[f"line {node.lineno}: {found[0]} is {tuple(tensor.shape)}"] = True
                return
        right.add(node.lineno)

    def trace_call(frame, event, arg):
        if frame.f_code.co_filename != str(path) or frame.f_code.co_name not in TRACED:
            return None
        running = None

        def trace_line(frame, event, arg):
            nonlocal running
            node = statements.get(frame.f_lineno) if event == "line" else None
            if running is not None and node is not running:
                if isinstance(running, ast.Return):
                    values = [arg]
                else:
                    targets = getattr(running, "targets", None) or [running.target]
                    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                    values = [frame.f_locals[name] for name in names]
                check(running, values)
            if event == "line":
                running = node
            return trace_line

        return trace_line

    tokens, targets = batch()
    before = sys.gettrace()
    for config in (CONFIG, replace(CONFIG, **ALL)):
        sizes.update(H=config.n_head, K=config.kv_heads, D=config.head_dim, C=config.n_embd,
                     M=64 if config.mlp == "swiglu" else 4 * config.n_embd)
        gpt = module.GPT(module.GPTConfig(**asdict(config)))
        sys.settrace(trace_call)
        try:
            gpt(tokens, targets)
            gpt.logits(tokens)
            cache = gpt.make_cache(B)
            for start in (0, 3, torch.tensor(3), torch.tensor([1, 3])):
                sizes["S"] = BLOCK if isinstance(start, torch.Tensor) else start + T
                sizes["R"] = B if isinstance(start, torch.Tensor) and start.dim() else 1
                gpt.hidden(tokens, cache, start)
            sizes["R"] = 1
            gpt.document_start = 3
            gpt.logits(tokens)
        finally:
            sys.settrace(before)
    for node in set(statements.values()):  # those that the forward pass did not come by
        if node.lineno not in reached:
            complaints[f"line {node.lineno} was not reached"] = True
    return right, list(complaints)


def test_every_shape_comment_of_the_forward_pass_is_right():
    assert len({B, T, H, D, C, V, 3 * C, 4 * C, B * T}) == 9  # or a wrong one could pass
    right, complaints = check_shape_comments(Path(model_file.__file__), model_file)
    assert not complaints
    assert len(right) >= 35


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("# (B, H + 2*K, T, D)", "# (B, H, T, D)", "(B, H, T, D) is (2, 9, 5, 7)"),
    ("qk.split((H, K), 1)  # (B, H, T, D), (", "qk.split((H, K), 1)  # (B, T, H, D), (",
     "is (2, 3, 5, 7)"),
    ("(B, H, T, D), (B, K, T, D)", "(B, H, T, D), (B, T, K, D)", "is (2, 3, 5, 7)"),
    ("# (B, K, T)", "# (B, T, K)", "(B, T, K) is (2, 3, 5)"),
    ("# each (..., T, D/2)", "# each (..., T, D)", "is (2, 9, 5, 2)"),
    ("D/2)\n    return angles.cos(), angles.sin()  # each (R, 1, T, D/2)",
     "D/2)\n    return angles.cos(), angles.sin()  # each (R, 1, D/2, T)", "is (1, 1, 5, 2)"),
    ("# (B*T, C)", "# (B, T, C)", "(B, T, C) is (10, 21)"),
    ("# (..., V)", "# (..., C)", "(..., C) is (10, 11)"),
    ("+ start  # (R, T)", "+ start  # positions", "no shape comment"),
    ("+ start  # (R, T)", "+ start  # (B, T)", "(B, T) is (1, 5)"),
    ("k, v = cache  # each (B, K, S, D)", "k, v = cache  # each (B, K, T, D)", "(2, 3, 8, 7)"),
    ("# (R, T, S)", "# (R, S, T)", "(R, S, T) is (1, 5, 8)"),
    ("# (B, 1, T, T)", "# (B, H, T, T)", "(B, H, T, T) is (2, 1, 5, 5)"),
    ("return self.head(self.hidden(tokens))  # (B, T, V)",
     "return self.head(self.hidden(tokens))", "no shape comment"),
])
def test_a_wrong_or_missing_shape_comment_is_found(old, new, complaint, tmp_path, monkeypatch):
    source = Path(model_file.__file__).read_text(encoding="utf-8")
    assert old in source
    path = tmp_path / "model_with_an_error.py"
    path.write_text(source.replace(old, new, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    _, complaints = check_shape_comments(path, module)
    assert len({text.partition(":")[0] for text in complaints}) == 1  # one line
    assert complaint in complaints[0]


# ---------------------------------------------------------------------- the first weights


def test_the_first_loss_is_near_the_logarithm_of_the_vocabulary():
    model = GPT(replace(CONFIG, vocab_size=101), torch.Generator().manual_seed(1))
    assert abs(model(*batch(BLOCK, 101)).mean().item() - math.log(101)) < 0.05


def test_first_weights_have_gpt2s_deviations():
    config = replace(CONFIG, n_embd=105, n_head=5, n_layer=3, block_size=53, vocab_size=211)
    model = GPT(config, torch.Generator().manual_seed(1))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            expected = 0.02 / math.sqrt(2 * 3)
        elif p.dim() == 2:
            expected = 0.02
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        assert p.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name


def test_a_model_empty_model_imports_no_compiler():
    code = ("import sys; from formats.weights import *\n"
            "model = empty_model(GPTConfig(n_layer=2))\n"
            "assert all(p.is_meta for p in model.parameters())\n"
            "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True,
                   cwd=Path(model_file.__file__).parent)


def test_a_seed_fixes_the_first_weights():
    a, b, c = (GPT(CONFIG, torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


# ---------------------------------------------------------------------- properties


def test_a_token_changes_no_earlier_logit():
    model = make()
    tokens, _ = batch(BLOCK)
    before = model.logits(tokens)
    for t in range(BLOCK):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model.logits(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t], before[:, t]).all(-1).any()


def test_losses_are_per_token_and_ignored_targets_have_none():
    model = make()
    tokens, targets = batch()
    targets[0, 1] = targets[1, 4] = IGNORE
    losses = model(tokens, targets)
    assert losses.shape == (B, T) and losses.dtype == torch.float32
    assert losses[0, 1] == losses[1, 4] == 0
    assert (losses != 0).sum() == B * T - 2
    logits = model.logits(tokens)
    for b, t in ((0, 0), (1, 3)):
        expected = -torch.log_softmax(logits[b, t], 0)[targets[b, t]]
        torch.testing.assert_close(losses[b, t], expected)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(losses.sum() / (targets != IGNORE).sum(), expected)


def losses_and_gradients(model):
    """Return the losses of B x BLOCK tokens, and all gradients of their sum."""
    model.zero_grad()
    losses = model(*batch(BLOCK))
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("changes", [{}, ALL], ids=["gpt2", "all switches"])
def test_recomputed_blocks_change_nothing_and_keep_less(changes):
    """Dropout too is the same the second time."""
    kept = []
    for recompute in (False, True):
        model, tensors = make(dropout=0.3, **changes), {}
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, tensors=tensors: tensors.update({x.data_ptr(): x.numel()}) or x,
                lambda x: x):
            found = losses_and_gradients(model)
        kept.append((found, sum(tensors.values())))
    assert all(map(torch.equal, *(found for found, _ in kept)))
    assert kept[1][1] < kept[0][1] / 2
    assert set(model.state_dict()) == set(make(**changes).state_dict())


def test_the_embedding_is_the_head_and_learns_from_both_uses():
    model = make()
    assert [p.shape for p in model.parameters()].count((V, C)) == 1
    tokens, targets = batch()
    wte = model.transformer.wte.weight

    def gradient(hidden, matrix):
        logits = F.linear(hidden, matrix).flatten(0, 1)
        return torch.autograd.grad(F.cross_entropy(logits, targets.flatten()), wte)[0]

    hidden = model.hidden(tokens)
    whole, = torch.autograd.grad(model(tokens, targets).mean(), wte)
    as_head, as_embedding = gradient(hidden.detach(), wte), gradient(hidden, wte.detach())
    assert as_head.abs().max() > 1e-3 and as_embedding.abs().max() > 1e-3
    torch.testing.assert_close(whole, as_head + as_embedding)


@pytest.mark.parametrize("path", ["losses", "logits", "hidden"])
def test_dropout_acts_in_training_and_never_in_evaluation(path):
    with_dropout, without = make(dropout=0.5), make()
    tokens, targets = batch()
    run = {"losses": lambda m: m(tokens, targets), "logits": lambda m: m.logits(tokens),
           "hidden": lambda m: m.hidden(tokens)}[path]
    first, second = run(with_dropout), run(with_dropout)
    assert not torch.equal(first, second)
    with_dropout.eval()
    first, second = run(with_dropout), run(with_dropout)
    assert torch.equal(first, second)
    assert torch.equal(first, run(without.eval()))


def test_dropout_is_in_gpt2s_places(monkeypatch):
    """The embedding, attention's weights, and both outputs of each block."""
    calls = []
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    monkeypatch.setattr(model_file.CausalSelfAttention, "attend", staticmethod(
        lambda *a, dropout_p, **k: (
            calls.append(("attention", dropout_p)), attention(*a, dropout_p=dropout_p, **k))[1]))
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: (
        calls.append(("dropout", p if training else 0.0)), dropout(x, p, training))[1])
    model = make(dropout=0.5)
    for mode, p in (("train", 0.5), ("eval", 0.0)):
        calls.clear()
        getattr(model, mode)()
        model.logits(batch()[0])
        block = [("attention", p), ("dropout", p), ("dropout", p)]
        assert calls == [("dropout", p), *block * LAYERS]


def test_bfloat16_autocast_is_close_to_float32():
    model = make(spread=0.1)
    tokens, targets = batch(BLOCK)
    expected = model(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        logits, losses = model.logits(tokens), model(tokens, targets)
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.05)
    losses = model.bfloat16()(tokens, targets)  # without autocast: all but the loss in bfloat16
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.1)


# ---------------------------------------------------------------------- the cache


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prompt", [1, T])
@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_with_the_cache_the_hidden_states_are_those_of_the_whole_sequence(bias, prompt, fixed):
    model = make(bias=bias).double().eval()
    tokens, _ = batch(BLOCK)
    expected = model.hidden(tokens)
    cache = model.make_cache(B)
    assert len(cache) == LAYERS
    for part in (part for layer in cache for part in layer):
        assert part.shape == (B, H, BLOCK, D) and part.dtype == torch.float64
        part[..., prompt:, :] = 1e3  # what lies beyond the end must not matter
    torch.testing.assert_close(model.hidden(tokens[:, :prompt], cache), expected[:, :prompt])
    for t in range(prompt, BLOCK):
        start = torch.tensor(t) if fixed else t
        x = model.hidden(tokens[:, t:t + 1], cache, start)
        torch.testing.assert_close(x, expected[:, t:t + 1])


@torch.no_grad()
def test_several_tokens_may_follow_those_in_the_cache():
    model = make().eval()
    tokens, _ = batch(BLOCK)
    cache = model.make_cache(B)
    parts = [model.hidden(tokens[:, a:b], cache, a) for a, b in ((0, 3), (3, 8), (8, BLOCK))]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(tokens))
    for start, length in ((BLOCK, 1), (BLOCK - 4, T)):
        with pytest.raises(ValueError, match=f"{BLOCK + 1} tokens.*block_size={BLOCK}"):
            model.hidden(tokens[:, :length], cache, start)


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_a_bfloat16_cache_is_close(autocast):
    model = make(spread=0.1).eval()
    tokens, _ = batch(BLOCK)
    expected = model.logits(tokens)
    model = model if autocast else model.bfloat16()
    cache = model.make_cache(B, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = [model.head(model.hidden(tokens[:, :T], cache))]
        parts += [model.head(model.hidden(tokens[:, t:t + 1], cache, t)) for t in range(T, BLOCK)]
    logits = torch.cat(parts, 1)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.1)


# ---------------------------------------------------------------------- sizes


def test_a_sequence_beyond_block_size_is_refused_with_both_numbers():
    model = make()
    assert model.logits(batch(BLOCK)[0]).shape == (B, BLOCK, V)
    for run in (model.logits, model.hidden, lambda tokens: model(tokens, tokens)):
        with pytest.raises(ValueError, match=f"{BLOCK + 1} tokens.*block_size={BLOCK}"):
            run(batch(BLOCK + 1)[0])


def test_crop_block_size():
    config = replace(CONFIG)
    model, other = GPT(config, torch.Generator().manual_seed(1)), GPT(config)
    tokens, targets = batch(T)
    before = model.logits(tokens)
    crop_block_size(model, T)
    assert torch.equal(model.logits(tokens), before)
    assert model.transformer.wpe.weight.shape == (T, C)
    assert model.config.block_size == T
    assert other.config.block_size == config.block_size == BLOCK  # one config, two models
    model(tokens, targets).sum().backward()
    assert model.transformer.wpe.weight.grad.abs().min() > 0
    with pytest.raises(ValueError, match=f"6 tokens.*block_size={T}"):
        model.logits(batch(T + 1)[0])


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_head": 4}, "n_embd=21 is not divisible by n_head=4.* is 3$"),
    ({"n_head": 17}, "n_embd=21 is not divisible by n_head=17.* is 21$"),
    ({"block_size": 0}, "block_size=0: must be"),
    ({"vocab_size": 0}, "vocab_size=0: must be"),
    ({"n_layer": -1}, "n_layer=-1: must be"),
    ({"n_head": 0}, "n_head=0: must be"),
    ({"n_embd": 0}, "n_embd=0: must be"),
    ({"n_layer": 2.5}, "n_layer=2.5: must be a whole number and at least 1"),
    ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout=-0.1: must be at least 0 and below 1"),
    ({"dropout": math.nan}, "dropout=nan"),
    ({"softcap": -1.0}, "softcap=-1.0: must be at least 0"),
    ({"softcap": math.inf}, "softcap=inf: must be at least 0, and finite"),
    ({"mlp": "relu"}, "mlp='relu': choose gelu, gelu_exact, relu2, swiglu"),
    ({"n_kv_head": 2}, "n_kv_head=2 does not divide n_head=3"),
    ({"n_kv_head": -1}, "n_kv_head=-1: must be a whole number and at least 0"),
    ({"rope": True}, "rope=True rotates pairs.* 7 must be even"),
])
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(("name", "total"), [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts_are_the_published_ones(name, total):
    sizes = huggingface.gpt2_sizes(name)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, **sizes))
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.parameter_count() == total - 1024 * sizes["n_embd"]


def test_flops_per_token_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert flops_per_token(model) == 6 * 123_653_376 + 12 * 12 * 768 * 1024


def test_flops_leave_out_what_is_only_looked_up():
    model = make(**ALL)
    matrices = 24 * (24 + 24) + 24 * 24 + 24 * 128 + 64 * 24  # c_attn, c_proj, c_fc, c_proj
    others = 12 * 3 + 2 * LAYERS + V * 24  # a gate, scalars, the head
    assert flops_per_token(model) == (6 * (LAYERS * matrices + others)
                                       + 12 * LAYERS * 24 * BLOCK)
    tables = V * 24 + V * 12
    assert model.parameter_count() == LAYERS * matrices + others + tables


# ---------------------------------------------------------------------- files


def write_checkpoint(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    (folder / "meta.json").write_text(json.dumps({"model": asdict(model.config), "iter_num": 7}))
    return folder


@pytest.mark.parametrize("bias", [True, False])
def test_written_weights_are_read_back(bias, tmp_path):
    model = make(bias=bias, dropout=0.1)
    folder = write_checkpoint(tmp_path / "iter_000007", model)
    for loaded, dropout in ((load_model(folder), 0.0), (load_model(str(folder), 0.3), 0.3)):
        assert loaded.config == replace(model.config, dropout=dropout)
        assert loaded.transformer.h[0].mlp.dropout.p == dropout
        state, expected = loaded.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_a_cropped_model_is_read_back(tmp_path):
    model = make()
    crop_block_size(model, T)
    assert load_model(write_checkpoint(tmp_path, model)).config.block_size == T


def test_a_models_weights_do_not_follow_the_file(tmp_path):
    """safetensors maps the file: without a copy the model would change when the file does."""
    folder = write_checkpoint(tmp_path, make(n_embd=210, vocab_size=101))
    path = folder / "model.safetensors"
    model = load_model(folder)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert model.transformer.wte.weight.abs().min() > 0


def test_half_precision_files_become_float32(tmp_path):
    model = make()
    folder = write_checkpoint(tmp_path, model)
    save_file({name: p.bfloat16() for name, p in model.state_dict().items()},
              folder / "model.safetensors")
    loaded = load_model(folder)
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, model.get_parameter(name).bfloat16().float())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_weights_are_as_readable_as_their_folder(tmp_path):
    for mode in (0o755, 0o700):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        save_weights(make(), folder)
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("file", "damage", "reason"), [
    ("model.safetensors", Path.unlink, "No such file"),
    ("model.safetensors", cut_short, "SafetensorError"),
    ("model.safetensors", lambda path: path.write_bytes(b""), "SafetensorError"),
    ("model.safetensors", lambda path: path.write_bytes(b"\x80\x02}q\x00."), "SafetensorError"),
    ("meta.json", Path.unlink, "No such file"),
    ("meta.json", lambda path: path.write_text(path.read_text()[:40]), "damaged, it is not a JSON"),
    ("meta.json", lambda path: path.write_bytes(b"\xff\xff"), "damaged, it is not a JSON"),
    ("meta.json", lambda path: path.write_text("[]"), "KeyError"),
    ("meta.json", lambda path: path.write_text("{}"), "KeyError: 'model'"),
    ("meta.json", lambda path: path.write_text('{"model": {"n_layers": 2}}'), "n_layers"),
    ("meta.json", lambda path: path.write_text('{"model": {"n_layer": "2"}}'), "n_layer=2"),
])
def test_damaged_checkpoints_are_refused_by_name(file, damage, reason, tmp_path):
    folder = write_checkpoint(tmp_path / "iter_000007", make())
    damage(folder / file)
    with pytest.raises(ValueError, match=f"iter_000007: not a checkpoint.*{reason}"):
        load_model(folder)


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "iter_000007", make())
    save_weights(make(vocab_size=V + 2), folder)
    with pytest.raises(ValueError, match=r"iter_000007.*another model's.*wte.*\[13, 21\]"):
        load_model(folder)
    save_weights(make(bias=False), folder)
    with pytest.raises(ValueError, match="iter_000007.*another model's.*Missing key.*bias"):
        load_model(folder)
    weights = {**make().state_dict(), "extra": torch.ones(2)}
    with pytest.raises(ValueError, match="some place.*Unexpected key.*extra"):
        model_with_weights(CONFIG, weights, "some place")


def test_a_bad_dropout_is_not_blamed_on_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="^dropout=1.0: must be"):
        load_model(write_checkpoint(tmp_path, make()), dropout=1.0)


def test_find_checkpoint(tmp_path):
    run = tmp_path / "run"
    newest, best = (write_checkpoint(run / name, make()) for name in ("iter_000009", "iter_000007"))
    with pytest.raises(ValueError, match="run: no checkpoint here.*latest is missing.*--out_dir="):
        find_checkpoint(run)
    (run / "latest").write_text("iter_000009\n")
    (run / "best").write_text("iter_000007\n")
    assert find_checkpoint(run) == find_checkpoint(str(run), "latest") == newest
    assert find_checkpoint(run, "best") == best
    assert find_checkpoint(newest, "best") == newest  # a checkpoint's own folder
    with pytest.raises(ValueError, match="nowhere: no checkpoint here"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_run_that_is_not_there_gets_a_list_of_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint here .*; runs: none"):
        find_checkpoint("out")
    for name in ("shakespeare_char", "mine"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "latest").write_text("iter_000001\n")
    for path in ("out-shakespeare-char", "out"):
        with pytest.raises(ValueError, match=f"^{path}: .*; runs: out/mine, out/shakes"):
            find_checkpoint(path)


@pytest.mark.parametrize("pointer", ["iter_000011\n", "", "\n", "..", "../..", "../y", "\xff"])
def test_a_pointer_to_nothing_or_outside_is_refused(pointer, tmp_path):
    run = tmp_path / "run"
    write_checkpoint(run / "iter_000007", make())
    write_checkpoint(tmp_path / "y", make())
    write_checkpoint(tmp_path, make())
    (run / "latest").write_text(pointer, encoding="latin-1")
    with pytest.raises(ValueError, match="latest names '.*', which is not there"):
        find_checkpoint(run)


def test_a_pointer_with_a_path_stays_in_the_folder(tmp_path):
    run = tmp_path / "run"
    inside = write_checkpoint(run / "x", make())
    write_checkpoint(tmp_path / "x", make())
    (run / "latest").write_text("../x")
    assert find_checkpoint(run) == inside


def test_the_weights_file(tmp_path):
    """The weights are a plain safetensors file with nanoGPT's names."""
    save_weights(make(), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"transformer.wte.weight", "transformer.h.1.attn.c_attn.bias"} <= names
    assert "lm_head.weight" not in names
