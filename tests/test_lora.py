# ruff: noqa: F811 (fixtures that are imported)
"""posttraining/: LoRA against the base, its merged weights and PEFT; runs; wrong input."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_float32, in_processes
from safetensors.torch import load_file, save_file
from test_experiments import load_script
from test_train import (  # noqa: F401
    TINY,
    as_flags,
    command_line,
    dataset,
    do_run,
    losses_of,
    quick,
    rows_of,
    weights_of,
)

import configurator
import convert
import train
from configurator import UserError
from formats.weights import empty_model, load_model
from model import GPT, GPTConfig
from posttraining.adapter import adapter_parameters, adapter_state, hash_weights, load_adapter
from posttraining.lora import add_lora, changes, describe_lora, merge, merged_weights, off
from runtime.kernels import use_fp8
from runtime.processes import full_tensor, setup
from training import setup as training_setup
from training.resume import checkpoint_settings

FIXTURE = ROOT / "tests/fixtures/lora"
golden = load_script("lora_peft")  # its model, its batches and its 20 updates
LORA = dict(lora_rank=5, lora_alpha=7.0, lora_targets="c_attn c_proj", weight_decay=0.3)
SWITCHES = {  # models whose matrices are used in other ways
    "gpt2": {}, "untied": dict(tied=False, bias=False, value_embeds=True),
    "modern": dict(rope=True, rmsnorm=True, qk_norm=True, mlp="swiglu", tied=False, zero_init=True,
                   n_head=3, n_embd=42, n_kv_head=1, value_embeds=True, residual_scalars=True)}


def make(name="gpt2"):
    config = GPTConfig(block_size=13, vocab_size=29, n_layer=2,
                       **{"n_head": 3, "n_embd": 21, **SWITCHES[name]})
    return GPT(config, torch.Generator().manual_seed(5))


def make_lora(name="gpt2", trained=True, targets="c_attn c_proj c_fc", **settings):
    """Return a model with LoRA, of which the changes are random where it is said to be trained."""
    model, generator = make(name), torch.Generator().manual_seed(7)
    add_lora(model, 3, 5.0, targets, generator, **settings)
    for p in model.parameters():
        if trained and p.requires_grad:
            p.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def tokens():
    return torch.randint(29, (2, 13), generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- the maths


@pytest.mark.parametrize("name", SWITCHES)
@in_float32
def test_at_first_and_when_off_it_is_the_base_to_the_last_bit(tokens, name):
    expected = make(name).logits(tokens)
    new = dict(new_rows=range(23, 29))
    assert torch.equal(make_lora(name, trained=False, **new).logits(tokens), expected)
    model = make_lora(name, **new)
    with off(model):
        assert torch.equal(model.logits(tokens), expected)
    assert (model.logits(tokens) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", SWITCHES)
@in_float32
def test_merged_is_unmerged(tokens, name):
    """Also in bfloat16, in which both round the same sum."""
    model = make_lora(name, new_rows=range(23, 29))
    saved = make(name)
    saved.load_state_dict(merged_weights(model))
    logits, bfloat16 = model.logits(tokens), torch.autocast("cpu", torch.bfloat16)
    with bfloat16:
        rounded = model.logits(tokens)
    for _ in range(2):  # merging what is merged changes nothing
        merge(model)
        assert model.state_dict().keys() == make(name).state_dict().keys()
        assert all(p.requires_grad for p in model.parameters()) and not changes(model)
        for other in (model, saved):
            torch.testing.assert_close(other.logits(tokens), logits, atol=1e-6, rtol=0)
            with bfloat16:
                assert torch.equal(other.logits(tokens), rounded)


@in_float32
def test_the_first_gradient_moves_b_alone(tokens):
    model = make_lora(trained=False)
    model(tokens, tokens).sum().backward()
    for name, p in adapter_parameters(model).items():
        assert (p.grad.abs().max() > 0) == ("lora_B" in name), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@in_float32
def test_the_change_is_scaled_by_alpha_over_rank():
    """The same A and B, padded with zeros to twice the rank: half the change. alpha 0: 2 * rank."""
    deltas = {}
    for rank, alpha in ((3, 5.0), (6, 5.0), (3, 6.0), (3, 0.0)):
        model, base = make(), make()
        add_lora(model, rank, alpha, "c_attn")
        change = changes(model)[0]
        A, B = torch.arange(3 * 21).view(3, 21) / 63, torch.arange(63 * 3).view(63, 3) / 189
        change.A.data = torch.cat((A, torch.zeros(rank - 3, 21)))
        change.B.data = torch.cat((B, torch.zeros(63, rank - 3)), 1)
        merge(model)
        deltas[rank, alpha] = (model.transformer.h[0].attn.c_attn.weight
                               - base.transformer.h[0].attn.c_attn.weight)
    torch.testing.assert_close(2 * deltas[6, 5.0], deltas[3, 5.0])
    torch.testing.assert_close(deltas[3, 5.0], 5 / 3 * B @ A)
    assert torch.equal(deltas[3, 0.0], deltas[3, 6.0])


@in_float32
def test_only_the_rows_of_new_tokens_change(tokens):
    model = make_lora("untied", targets="c_fc", new_rows=range(23, 29))
    weights, base = merged_weights(model), make("untied").state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight",
                 "transformer.h.1.attn.value_embed.weight"):
        different = (weights[name] != base[name]).any(1).nonzero().flatten().tolist()
        assert different == [23, 24, 25, 26, 27, 28]
    model(tokens, tokens).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model).values())


def test_gpt2_has_the_trained_parameters_that_peft_counts():
    """PEFT 0.21: trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364."""
    model = empty_model(GPTConfig(vocab_size=50257))
    assert describe_lora(model) == ""
    add_lora(model, 8, 16, "c_attn")
    expected = "LoRA: 294,912 of 124,734,720 parameters are trained (0.24%)"
    assert describe_lora(model).startswith(expected)


@pytest.mark.parametrize("targets, names", [
    ("c_proj", {"attn.c_proj", "mlp.c_proj"}), ("attn.c_proj c_fc", {"attn.c_proj", "mlp.c_fc"}),
    ("h.1.attn.c_attn", {"attn.c_attn"})])
def test_targets_are_whole_parts_of_names(targets, names):
    model = make_lora(targets=targets)
    found = [name.removeprefix("base_model.model.transformer.h.").removesuffix(".lora_A.weight")
             for name in adapter_parameters(model) if "lora_A" in name]
    layers = {"1"} if "h.1" in targets else {"0", "1"}
    assert set(found) == {f"{i}.{name}" for i in layers for name in names}


# ---------------------------------------------------------------------- PEFT


@in_float32
def test_twenty_losses_are_those_of_peft():
    expected = json.loads((FIXTURE / "expected.json").read_text())["losses"]
    model = golden.base_model()
    assert golden.train_here(model) == pytest.approx(expected, abs=1e-4)
    # and so is what was trained
    for name, weight in load_file(FIXTURE / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapter_parameters(model)[name], weight, atol=1e-4, rtol=0)
        assert weight.abs().max() > 0.05  # B began at 0


@in_float32
def test_an_adapter_of_peft_gives_its_logits():
    expected = json.loads((FIXTURE / "expected.json").read_text())["logits"]
    model, tokens = golden.base_model(), golden.batch(20)[0][:2]
    load_adapter(model, FIXTURE)
    torch.testing.assert_close(model.logits(tokens), torch.tensor(expected), atol=1e-5, rtol=0)
    assert (golden.base_model().logits(tokens) - torch.tensor(expected)).abs().max() > 0.1


@in_float32
def test_the_adapter_s_config_says_what_peft_s_says():
    model = golden.base_model()
    golden.start_lora(model)
    ours = adapter_state(model, golden.C)["config"]
    pefts = json.loads((FIXTURE / "adapter_config.json").read_text())
    assert ours.keys() <= pefts.keys()
    different = {key for key in ours if ours[key] != pefts[key]}
    assert different == {"base_model_name_or_path", "target_modules", "trainable_token_indices"}
    assert set(ours["target_modules"]) == set(pefts["target_modules"])
    assert ours["trainable_token_indices"] == {
        "transformer.wte": pefts["trainable_token_indices"]} == {"transformer.wte": [26, 27, 28]}
    assert golden.adapter_parameters(model).keys() == load_file(
        FIXTURE / "adapter_model.safetensors").keys()


@in_float32
def test_peft_reads_a_run_s_adapter_and_merges_the_same(tmp_path, dataset, base):
    """Where PEFT is installed; the golden numbers above are from there."""
    pytest.importorskip("peft")
    lora_run(tmp_path / "run", dataset, base)
    folder = newest(tmp_path / "run")
    model, tokens = load_model(folder), golden.batch(20)[0].clamp(max=9)
    in_peft = golden.in_peft(load_model(newest(base)), folder / "adapter")
    torch.testing.assert_close(in_peft(tokens).logits, model.logits(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change, says", [
    (dict(use_dora=True), "use_dora=True, here only False is computed; merge it with PEFT"),
    (dict(r="many"), "adapter_config.json: damaged"), (dict(r=4), "of other matrices, first "),
    (dict(trainable_token_indices=None), "of other matrices, first ")], ids=str)
@in_float32
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, says):
    shutil.copytree(FIXTURE, tmp_path / "adapter")
    config = json.loads((FIXTURE / "adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=says):
        load_adapter(golden.base_model(), tmp_path / "adapter")


@in_float32
def test_convert_merges_an_adapter(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    golden.as_transformers(golden.base_model()).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(convert, "folder_tokenizer", lambda source, size: SimpleNamespace(
        save=lambda folder: None))
    convert.main(source=str(tmp_path / "gpt2"), adapter=str(FIXTURE), out_dir=str(tmp_path / "out"))
    expected = json.loads((FIXTURE / "expected.json").read_text())["logits"]
    logits = load_model(tmp_path / "out").logits(golden.batch(20)[0][:2])
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- runs and checkpoints


@pytest.fixture
def base(tmp_path, dataset):
    do_run(tmp_path / "base", dataset, max_iters=4, bias=True)
    return tmp_path / "base"


def newest(run):
    return run / (run / "latest").read_text().strip()


def lora_run(out_dir, dataset, base, **settings):
    """Train with LoRA on top of a base; the settings win over LORA."""
    return do_run(out_dir, dataset, **{**LORA, "bias": True, "init_from": str(base), **settings})


def adapter_of(out_dir):
    return load_file(newest(out_dir) / "adapter/adapter_model.safetensors")


def test_a_checkpoint_holds_the_merged_weights_and_the_adapter(tmp_path, dataset, base):
    rows = lora_run(tmp_path / "run", dataset, base)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    folder, before = newest(tmp_path / "run"), weights_of(base)
    weights = weights_of(tmp_path / "run")
    # the same names as without LoRA; frozen is what the targets do not name
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {f"transformer.h.{i}.{name}.weight" for i in (0, 1)
                       for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    # the adapter on the base is the merged model; its files are checked by hash
    model = load_model(newest(base))
    load_adapter(model, folder / "adapter")
    merge(model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-7, rtol=0)
    assert all(weight.dtype == torch.float32 for weight in adapter_of(tmp_path / "run").values())
    assert "  adapter/adapter_model.safetensors\n" in (folder / "SHA256SUMS").read_text()
    # the base is named
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["base"] == {"init_from": str(newest(base)),
                            "sha256": hash_weights(load_model(newest(base)))}


@pytest.mark.parametrize("settings", [
    dict(dropout=0.2, max_iters=9), dict(dtype="float16"), dict(async_checkpoint="True"),
    dict(activation_checkpointing=True)], ids=str)
def test_resumed_is_uninterrupted(tmp_path, dataset, base, monkeypatch, settings):
    settings = dict(settings)
    whole = lora_run(tmp_path / "whole", dataset, base, **settings)
    step, left = train.train_step, [6]

    def stops(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        lora_run(tmp_path / "parts", dataset, base, **settings)
    monkeypatch.setattr(train, "train_step", step)
    settings["init_from"] = "resume"
    assert lora_run(tmp_path / "parts", dataset, base, **settings) == whole
    for read in (weights_of, adapter_of):
        a, b = read(tmp_path / "whole"), read(tmp_path / "parts")
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    one, other = (torch.load(newest(tmp_path / run) / "trainer.pt", weights_only=True)["optimizer"]
                  for run in ("whole", "parts"))
    assert len(one["state"]) == len(adapter_of(tmp_path / "whole")) == 12
    for key, state in one["state"].items():
        assert all(torch.equal(state[name], other["state"][key][name]) for name in state)


@pytest.mark.parametrize("settings", [
    {}, dict(fsdp=True), dict(fsdp=True, activation_checkpointing=True), dict(compile="True")],
    ids=str)
@in_float32
def test_two_processes_and_accumulation_are_one(tmp_path, dataset, base, monkeypatch, settings):
    if "compile" in settings:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one = lora_run(tmp_path / "one", dataset, base, gradient_accumulation_steps=1, batch_size=8,
                   eval_iters=1)
    codes, said = in_processes(2, lambda rank: lora_run(
        tmp_path / "two", dataset, base, gradient_accumulation_steps=4, eval_iters=4, **settings))
    assert codes == [0, 0], said
    runs = ["two"]
    if "fsdp" not in settings:
        lora_run(tmp_path / "accumulated", dataset, base, gradient_accumulation_steps=4,
                 eval_iters=4, **settings)
        runs.append("accumulated")
    for name in runs:
        rows = rows_of(tmp_path / name)
        for key in ("loss", "val_loss", "grad_norm"):
            found = [row[key] for row in rows if key in row]
            assert found == pytest.approx([row[key] for row in one if key in row], abs=1e-4)
        for read in (weights_of, adapter_of):
            a, b = read(tmp_path / "one"), read(tmp_path / name)
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], atol=2e-3, rtol=0)


def test_sharded_rows_are_gathered_into_the_checkpoint():
    """FSDP2 shards A, B and the new rows too."""
    model = make_lora(new_rows=range(23, 29))
    expected = {**merged_weights(model), **adapter_parameters(model)}

    def compare(rank):
        with setup("cpu", "float32") as runtime:
            sharded = make_lora(new_rows=range(23, 29))
            runtime.wrap(sharded, fsdp=True)
            for name, p in {**merged_weights(sharded), **adapter_parameters(sharded)}.items():
                torch.testing.assert_close(full_tensor(p), expected[name])

    codes, said = in_processes(2, compare)
    assert codes == [0, 0], said


@in_float32
def test_with_fp8(tmp_path, dataset, monkeypatch):
    pytest.importorskip("torchao.float8")
    monkeypatch.setattr(training_setup, "use_fp8", partial(use_fp8, emulate=True))
    sizes, base = dict(n_head=2, n_embd=32, block_size=16, bias=False), tmp_path / "base"
    do_run(base, dataset, max_iters=4, **sizes)
    plain, low = (lora_run(tmp_path / name, dataset, base, fp8=fp8, **sizes)
                  for name, fp8 in (("plain", False), ("fp8", True)))
    assert losses_of(low) == pytest.approx(losses_of(plain), abs=0.02)
    assert losses_of(low) != losses_of(plain)
    assert weights_of(tmp_path / "fp8").keys() == weights_of(tmp_path / "plain").keys()


def test_the_shipped_config_trains_on_a_small_base(tmp_path, dataset, base, capsys):
    """Only what config/lora.py does not set is given."""
    given = ("device", "dtype", "compile", "eval_iters", "batch_size", "block_size")
    flags = as_flags(dataset=dataset, out_dir=tmp_path / "run", init_from=base, max_iters=2,
                     **{key: TINY[key] for key in given})
    configurator.run(train.main, more_defaults=checkpoint_settings,
                     argv=[str(ROOT / "config/lora.py"), *flags])
    assert "LoRA: " in capsys.readouterr().out
    assert len(adapter_of(tmp_path / "run")) > 3


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("settings, says", [
    (dict(lora_targets="c_attn wq"), "no matrix named 'wq'; choose among c_attn, c_fc, c_proj"),
    (dict(lora_targets=""), "no matrix named ''; choose among c_attn, c_fc, c_proj"),
    (dict(lora_targets="attn"), "no matrix named 'attn'; choose"),
    (dict(lora_rank=22), "lora_rank=22, but transformer.h.0.attn.c_attn is a matrix (63, 21), "),
    (dict(lora_rank=-1), "lora_rank=-1: must be at least 0"),
    (dict(optimizer="muon"), "lora_rank=5 with optimizer='muon': "),
    (dict(init_from="scratch"), "lora_rank=5 with init_from='scratch': ")], ids=str)
@in_float32
def test_a_user_s_mistake_is_one_line(tmp_path, dataset, base, capsys, settings, says):
    settings = {**TINY, **LORA, "out_dir": tmp_path / "run", "dataset": dataset, "bias": True,
                "init_from": base, **settings}
    assert command_line(*as_flags(**settings)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error


@in_float32
def test_resume_refuses_another_base_and_other_settings(tmp_path, dataset, base, capsys):
    lora_run(tmp_path / "run", dataset, base, max_iters=4)
    resume = ["--init_from=resume", f"--out_dir={tmp_path / 'run'}", f"--dataset={dataset}"]

    def refused(*flags):
        assert command_line(*resume, *flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    # other settings
    for key, old, new in (("lora_rank", 5, 4), ("lora_rank", 5, 0), ("lora_alpha", 7.0, 9.0),
                          ("lora_targets", "'c_attn c_proj'", "'c_attn'")):
        value = str(new).strip("'")
        message = refused(f"--{key}={value}")
        assert f"{key}={new}, but the run has {key}={old}, whose state" in message
        assert f"leave {key} out" in message
    # a run without LoRA
    code = command_line("--init_from=resume", f"--out_dir={base}", f"--dataset={dataset}",
                        "--lora_rank=5")
    assert code == 2 and "lora_rank=5, but the run has lora_rank=0" in capsys.readouterr().err
    # a base that is gone, or changed: only its hash would tell
    folder = newest(base)
    folder.rename(tmp_path / "aside")
    assert f"was trained on {folder}, which is gone; put the base back, or start" in refused()
    shutil.copytree(tmp_path / "aside", folder)
    (folder / "SHA256SUMS").unlink()
    weights = weights_of(base)
    weights["transformer.ln_f.bias"] += 1e-6
    save_file(weights, folder / "model.safetensors")
    assert f"{folder} has changed since {newest(tmp_path / 'run')} was trained on it" in refused()


@in_float32
def test_a_damaged_adapter_is_refused(tmp_path, dataset, base, capsys):
    lora_run(tmp_path / "run", dataset, base, max_iters=4)
    path = newest(tmp_path / "run") / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert command_line("--init_from=resume", f"--out_dir={tmp_path / 'run'}") == 2
    assert "is damaged: adapter/adapter_model.safetensors is not the one" in capsys.readouterr().err
