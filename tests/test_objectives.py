"""posttraining/objectives.py and reference.py: what is computed, and that train.py trains
each objective the same on one process and two, in one go or resumed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_float32, in_processes
from safetensors.torch import load_file
from test_experiments import load_script
from token_files import write_rows
from torch import nn
from torch.nn import functional as F

import train
from formats import run_folder
from formats.checkpoint import load_model
from model import GPT, IGNORE, GPTConfig
from posttraining.objectives import DPO, IPO, Distillation, LanguageModel, Reward, end_targets
from posttraining.reference import Reference, load_reference
from posttraining.vocabulary import grow_vocabulary
from runtime.processes import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
GOLDEN = json.loads((ROOT / "tests/dpo_golden.json").read_text("utf-8"))
script = load_script("dpo_golden")
CONFIG = GPTConfig(block_size=13, vocab_size=11, n_layer=2, n_head=3, n_embd=21)


class Given(nn.Module):
    """A model that has these logits, whatever the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.given = logits

    def forward(self, tokens, targets):
        losses = F.cross_entropy(self.given.flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                                 reduction="none")
        return losses.view_as(targets)


def new_model(seed=5, **changes):
    return GPT(GPTConfig(**{**vars(CONFIG), **changes}), torch.Generator().manual_seed(seed))


def random_batch(rows=4, seed=3):
    """Return (tokens, targets), each (rows, 13); the first six targets of each row do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(11, (2, rows, 13), generator=generator)
    targets[:, :6] = IGNORE
    return tokens, targets


def gradients_of(objective, model, *batch):
    model.zero_grad()
    losses = objective(*batch)
    losses.sum().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


# ---------------------------------------------------------------------- pairs of answers


@pytest.mark.parametrize("name", script.CASES)
def test_losses_and_gradients_are_those_of_dpo_s_own_implementation(name):
    labels, logits, reference = script.draw_pairs()
    targets = torch.where(labels[:, 1:] == -100, IGNORE, labels[:, 1:])
    settings = dict(script.CASES[name])
    kind = IPO if settings.pop("ipo", False) else DPO
    objective = kind(Given(logits), Given(reference), **settings)
    losses = objective(targets, targets)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(GOLDEN[name]["losses"], abs=1e-12)
    assert logits.grad.flatten().tolist() == pytest.approx(GOLDEN[name]["gradient"], abs=1e-12)
    loss, count, margin, accuracy, chosen, rejected = objective.evaluate(targets, targets).tolist()
    assert (loss, count) == (pytest.approx(sum(GOLDEN[name]["losses"])), 3)
    assert margin == pytest.approx(sum(GOLDEN[name]["margins"]))
    assert accuracy == sum(margin > 0 for margin in GOLDEN[name]["margins"])
    token_losses = Given(logits)(targets, targets).sum(1)
    assert [chosen, rejected] == pytest.approx([-token_losses[0::2].sum().item(),
                                                -token_losses[1::2].sum().item()])


def test_a_model_that_is_the_reference_has_a_loss_of_ln_2():
    """Also where its dropout is on: the reference's is off."""
    model = new_model()
    tokens, targets = random_batch()
    losses = DPO(model, new_model(), 0.1)(tokens, targets)
    assert losses.tolist() == [pytest.approx(math.log(2), abs=1e-7)] * 2
    *_, margin, accuracy, chosen, rejected = DPO(model, new_model(), 0.1).evaluate(tokens, targets)
    assert (margin, accuracy) == (0, 1)  # of two pairs: neither answer is preferred
    assert chosen < 0 and rejected < 0


def test_what_the_loss_of_a_pair_counts():
    """The sum over an answer, so that its length counts; pairs, however many tokens they have; and
    no pair that is padding."""
    objective = DPO(new_model(), new_model(7), 0.1)
    tokens, targets = random_batch()
    loss, count, *_ = objective.evaluate(tokens, targets).tolist()
    twice = objective.evaluate(torch.cat([tokens, tokens]), torch.cat([targets, targets])).tolist()
    assert (count, twice[1]) == (2, 4) and twice[0] / 4 == pytest.approx(loss / 2, rel=1e-6)
    padding = torch.cat([targets, torch.full_like(targets[:2], IGNORE)])
    padded = objective.evaluate(torch.cat([tokens, tokens[:2]]), padding)
    assert padded.tolist() == pytest.approx(objective.evaluate(tokens, targets).tolist(), abs=1e-6)
    assert objective(tokens[:2], padding[4:]).tolist() == [0]
    assert (objective.count(targets), objective.count(padding[4:])) == (2, 0)
    shorter = targets.clone()
    shorter[0, 9:] = IGNORE
    assert objective.evaluate(tokens, shorter)[2] != objective.evaluate(tokens, targets)[2]


def test_a_reward_is_the_log_probability_of_end_of_text_after_the_answer():
    model, (tokens, targets) = new_model(), random_batch()
    tokens[:, 0] = 7
    targets[0, 8:] = targets[1, 12:] = targets[2, 9:] = targets[3, 7:] = IGNORE
    ends = [8, 12, 9, 7]
    found = end_targets(tokens, targets)
    assert (found != IGNORE).nonzero().tolist() == [[row, end] for row, end in enumerate(ends)]
    log_probs = model.logits(tokens).log_softmax(-1)
    scores = [log_probs[row, end, 7].item() for row, end in enumerate(ends)]
    objective = Reward(model)
    losses = objective(tokens, targets).tolist()
    for pair in range(2):
        margin = scores[2 * pair] - scores[2 * pair + 1]
        assert losses[pair] == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), rel=1e-5)
    # what pads a row changes nothing
    tokens[0, 9:] = 3
    assert objective(tokens, targets).tolist() == losses
    # a row without a target has no score, a full one is scored at its end
    targets[0], targets[1] = IGNORE, 5
    ends = (end_targets(tokens, targets)[:2] != IGNORE).nonzero().tolist()
    assert ends == [[1, 12]]


# ---------------------------------------------------------------------- another model


def distill(student, teacher, weight=0.7, temperature=2.0, vocab_size=11, logits_at_once=2**20):
    return Distillation(student, student, teacher, temperature, weight, vocab_size, logits_at_once)


@pytest.mark.parametrize("logits_at_once", [2**20, 3 * 16])
def test_distillation_is_cross_entropy_and_torch_s_kl(logits_at_once):
    """In chunks too, with a teacher of other sizes, whose vocabulary is padded."""
    student, teacher = new_model(softcap=3.0), new_model(7, vocab_size=16, n_embd=9)
    tokens, targets = random_batch()
    logits, wanted = student.logits(tokens), teacher.logits(tokens)[..., :11]
    kl = F.kl_div((logits / 2).log_softmax(-1), (wanted / 2).log_softmax(-1), reduction="none",
                  log_target=True).sum(-1)
    expected = (0.3 * student(tokens, targets) + 0.7 * 4 * kl) * (targets != IGNORE)
    expected_gradient = torch.autograd.grad(expected.sum(), student.parameters())
    objective = distill(student, teacher, logits_at_once=logits_at_once)
    losses, gradient = gradients_of(objective, student, tokens, targets)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, torch.cat([p.flatten() for p in expected_gradient]),
                               atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_is_evaluated_by_its_cross_entropy():
    student = new_model()
    tokens, targets = random_batch()
    expected = student(tokens, targets)
    objective = distill(student, new_model(7))
    assert not torch.equal(objective(tokens, targets), expected)
    assert torch.equal(objective.eval()(tokens, targets), expected)
    assert objective.evaluate(tokens, targets).tolist() == [expected.sum(), 28]


def test_a_student_that_is_its_teacher_and_one_that_has_none():
    """The divergence is 0, and so is its gradient; with a weight of 0 it is plain training."""
    tokens, targets = random_batch()
    plain, student = new_model(), new_model()
    losses, gradient = gradients_of(LanguageModel(plain), plain, tokens, targets)
    found, found_gradient = gradients_of(distill(student, new_model()), student, tokens, targets)
    torch.testing.assert_close(found, (1 - 0.7) * losses, atol=0, rtol=1e-6)
    torch.testing.assert_close(found_gradient, (1 - 0.7) * gradient, atol=1e-6, rtol=1e-5)
    found, found_gradient = gradients_of(distill(student, new_model(7), weight=0.0), student,
                                         tokens, targets)
    assert torch.equal(found, losses) and torch.equal(found_gradient, gradient)


def test_the_temperature_leaves_the_gradient_s_size():
    tokens, targets = random_batch()
    norms = []
    for temperature in (1.0, 4.0, 16.0):
        student = new_model(tied=False)
        objective = distill(student, new_model(7), weight=1.0, temperature=temperature)
        norms.append(gradients_of(objective, student, tokens, targets)[1].norm().item())
    assert max(norms) < 2 * min(norms)


# ---------------------------------------------------------------------- conversations


def test_packed_conversations_are_computed_as_one_by_one():
    """Losses and gradients of a row of two conversations and padding; 10 is end-of-text."""
    first, second = [10, 1, 2, 3, 4], [10, 5, 3, 8, 6, 7]
    row = torch.tensor([[*first, *second, 10, 10, 10]])
    marks = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]])
    model = new_model(rope=True, n_embd=18)
    model.document_start = 10
    objective = LanguageModel(model)
    targets = torch.where(marks == 1, row, IGNORE)
    losses, gradient = gradients_of(objective, model, row[:, :-1], targets[:, 1:])
    alone, total = [], 0
    for start, end in ((0, 5), (5, 11)):
        batch = row[:, start:end - 1], targets[:, start + 1:end]
        own_losses, own_gradient = gradients_of(objective, model, *batch)
        alone += own_losses[own_losses > 0].tolist()
        total = total + own_gradient
    assert losses[losses > 0].tolist() == pytest.approx(alone, abs=1e-5) and len(alone) == 4
    torch.testing.assert_close(gradient, total, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- runs


SETTINGS = dict(n_layer=2, n_head=3, n_embd=21, block_size=13, batch_size=4, max_iters=6,
                gradient_accumulation_steps=2, eval_interval=3, eval_iters=3, learning_rate=1e-3,
                warmup_iters=2, lr_decay_iters=6, min_lr=1e-4, device="cpu", compile="False")
OBJECTIVES = ["lm", "distill", "dpo", "ipo", "reward"]


@pytest.fixture
def data(datasets, monkeypatch, number_format):
    """The datasets, to train on in float32, then in bfloat16; nothing is drawn."""
    monkeypatch.setitem(SETTINGS, "dtype", number_format)
    monkeypatch.setattr(run_folder, "draw_loss", lambda run_dir: None)
    return datasets


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Datasets of single rows and of pairs, and a run whose model the objectives compare with."""
    folder = tmp_path_factory.mktemp("rows")
    found = SimpleNamespace(singles=write_rows(folder / "singles", {"train": 23, "val": 7}, 13),
                            pairs=write_rows(folder / "pairs", {"train": 46, "val": 14}, 13, 2),
                            base=f"{folder / 'base'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_loss", lambda run_dir: None)
        train.main(out_dir=found.base, dataset=found.singles,
                   **{**SETTINGS, "max_iters": 2, "dtype": "float32"})
    return found


def do_run(out_dir, data, objective, **settings):
    """Run train.py with an objective; return its rows of metrics.jsonl without the timings."""
    more = {"objective": objective, "dataset": data.pairs}
    if objective in ("lm", "distill"):
        more["dataset"] = data.singles
    if objective not in ("lm", "reward"):
        more["reference"] = data.base
    train.main(out_dir=str(out_dir), **{**SETTINGS, **more, **settings})
    return rows_of(out_dir)


def rows_of(out_dir):
    timings = ("ms", "tokens_per_s", "mfu")
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").open()]
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


def numbers_of(rows):
    """Return what must be the same of two runs."""
    return [value for row in rows for key, value in row.items()
            if key == "loss" or key.startswith("val_")]


def weights_of(out_dir):
    folder = Path(out_dir) / (Path(out_dir) / "latest").read_text().strip()
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
@in_float32
def test_one_run_however_it_is_divided(tmp_path, data, objective):
    """In micro-steps, over two processes, over two that share the weights, with activations
    computed twice: all in float32, up to rounding."""
    large = dict(batch_size=8, gradient_accumulation_steps=1, eval_iters=2)
    one = do_run(tmp_path / "one", data, objective, **large)
    expected = pytest.approx(numbers_of(one), abs=2e-5, rel=1e-5)
    small = dict(batch_size=2, gradient_accumulation_steps=4, eval_iters=8)
    assert numbers_of(do_run(tmp_path / "many", data, objective, **small)) == expected
    twice = do_run(tmp_path / "twice", data, objective, activation_checkpointing=True, **large)
    assert numbers_of(twice) == expected
    for fsdp in (False, True):
        name = tmp_path / f"fsdp {fsdp}"
        codes, said = in_processes(2, lambda rank, name=name, fsdp=fsdp: do_run(
            name, data, objective, fsdp=fsdp, **small))
        assert codes == [0, 0], said
        assert numbers_of(rows_of(name)) == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, data, objective):
    """With dropout, which the reference does not have, into the second epoch."""
    whole = do_run(tmp_path / "whole", data, objective, dropout=0.2)
    do_run(tmp_path / "parts", data, objective, dropout=0.2, max_iters=3)
    again = do_run(tmp_path / "parts", data, objective, dropout=0.2, init_from="resume")
    assert numbers_of(again) == numbers_of(whole)
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@in_float32
def test_a_compiled_run_is_the_same_and_compiled_once(tmp_path, data, objective, monkeypatch):
    plain = do_run(tmp_path / "plain", data, objective)
    torch._dynamo.reset()
    compile_function, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(
        function, backend=backend, **options))
    monkeypatch.setattr("training.setup.can_compile", lambda wanted, runtime: True)
    compiled = do_run(tmp_path / "compiled", data, objective)
    assert numbers_of(compiled) == pytest.approx(numbers_of(plain), abs=1e-5)
    assert 2 <= len(graphs) <= 3  # training, evaluation


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
@in_float32
def test_without_lora_s_change_a_model_is_its_own_reference(tmp_path, data, objective):
    """Which is the same as the reference that the run began with; resumed and in DDP and FSDP2."""
    settings = dict(lora_rank=3, init_from=data.base, dropout=0.0)
    apart = do_run(tmp_path / "apart", data, objective, **settings)
    settings["reference"] = ""
    one = do_run(tmp_path / "one", data, objective, **settings)
    assert numbers_of(one) == pytest.approx(numbers_of(apart), abs=1e-6)
    assert one[0]["val_margin"] == 0 and one[0]["val_accuracy"] == 0.5
    do_run(tmp_path / "parts", data, objective, **{**settings, "max_iters": 3})
    parts = do_run(tmp_path / "parts", data, objective, **{**settings, "init_from": "resume"})
    assert numbers_of(parts) == numbers_of(one)
    for fsdp in (False, True):
        name = tmp_path / f"fsdp {fsdp}"
        codes, said = in_processes(2, lambda rank, name=name, fsdp=fsdp: do_run(
            name, data, objective, fsdp=fsdp, gradient_accumulation_steps=4, batch_size=2,
            eval_iters=6, **settings))
        assert codes == [0, 0], said
        assert numbers_of(rows_of(name)) == pytest.approx(numbers_of(one), abs=2e-5, rel=1e-5)


@in_float32
def test_preferences_are_learned_and_logged(tmp_path, data):
    """By heart, which is more than chance."""
    for objective in ("dpo", "ipo", "reward"):
        rows = do_run(tmp_path / objective, data, objective, max_iters=40, eval_interval=40,
                      lr_decay_iters=40, beta=0.5, learning_rate=1e-2)
        evaluations = [row for row in rows if "val_loss" in row]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses[-1] < 0.5 * losses[0]
        assert {"val_margin", "val_accuracy"} <= evaluations[-1].keys()
        if objective != "reward":
            assert evaluations[0]["val_chosen_logp"] < 0
            assert evaluations[0]["val_rejected_logp"] < 0


@in_float32
def test_the_reference_is_frozen_and_known(tmp_path, data):
    before = weights_of(data.base)
    do_run(tmp_path / "run", data, "dpo")
    assert all(torch.equal(before[name], p) for name, p in weights_of(data.base).items())
    meta = json.loads((tmp_path / "run/iter_000006/meta.json").read_text())
    assert len(meta["reference"]) == 64
    model = new_model()
    model.document_start = 7
    folder = Path(data.base) / "iter_000002"
    frozen = load_reference(Reference(folder, "", 257), model, 257, CPU)
    assert not frozen.training and frozen.document_start == 7
    assert not any(p.requires_grad for p in frozen.parameters())


@in_float32
def test_a_base_model_without_special_tokens_can_be_the_reference(data):
    folder = Path(data.base) / "iter_000002"
    model = load_model(folder)
    grow_vocabulary(model, 257, 263)
    frozen = load_reference(Reference(folder, "", 257), model, 263, CPU)
    tokens = torch.tensor([[256, 257, 65, 262]])
    assert torch.equal(frozen.logits(tokens), model.logits(tokens))


# ---------------------------------------------------------------------- wrong input


@in_float32
def test_settings_that_do_not_fit(tmp_path, data):
    texts = {"dpo": dict(dataset=data.singles), "reward": dict(dataset=data.singles)}
    for objective, settings in texts.items():
        with pytest.raises(ValueError, match=f"objective='{objective}' needs pairs of answers, "
                                             "which .*singles has not; prepare .*=preference"):
            do_run(tmp_path / "run", data, objective, **settings)
    with pytest.raises(ValueError, match="objective='lm' would learn the rejected answers"):
        do_run(tmp_path / "run", data, "lm", dataset=data.pairs)
    with pytest.raises(ValueError, match="batch_size=3 would part pairs of answers; use an even"):
        do_run(tmp_path / "run", data, "dpo", batch_size=3)
    with pytest.raises(ValueError, match="objective='ipo' with reference='': .* need --reference="):
        do_run(tmp_path / "run", data, "ipo", reference="")
    with pytest.raises(ValueError, match="objective='lm' with reference='x': .* others* .*none"):
        do_run(tmp_path / "run", data, "lm", reference="x")
    with pytest.raises(ValueError, match="objective='ppo': choose 'lm', 'distill', 'dpo',"):
        do_run(tmp_path / "run", data, "ppo")
    with pytest.raises(ValueError, match="align_documents=True: .*pairs has rows, which"):
        do_run(tmp_path / "run", data, "dpo", align_documents=True)
    assert not (tmp_path / "run").exists()


@in_float32
def test_a_reference_that_does_not_fit(tmp_path, data):
    # its sizes, and its tokenizer
    with pytest.raises(ValueError, match="block_size=13, but the reference .*size=5; use"):
        short = new_model(block_size=5, vocab_size=257)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("posttraining.reference.load_model", lambda folder: short)
            do_run(tmp_path / "run", data, "dpo")
    other = Path(data.base) / "iter_000002" / "tokenizer.json"
    before = other.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text.tokenizer.Tokenizer.load", lambda folder: SimpleNamespace(
            spec={"kind": "bytes", "other": str(folder)}, kind="bytes", vocab_size=257, eot=256))
        with pytest.raises(ValueError, match="iter_000002 was trained with the tokenizer bytes"):
            do_run(tmp_path / "run", data, "dpo")
    assert other.read_text() == before
    # another one, or another objective, than before
    do_run(tmp_path / "run", data, "dpo", max_iters=3)
    do_run(tmp_path / "other", data, "lm", max_iters=3, seed=7)
    with pytest.raises(ValueError, match="other: its weights are not those that the run"):
        do_run(tmp_path / "run", data, "dpo", init_from="resume", reference=f"{tmp_path}/other")
    with pytest.raises(ValueError, match="objective='ipo', but the run has objective='dpo', wh"):
        do_run(tmp_path / "run", data, "ipo", init_from="resume")
