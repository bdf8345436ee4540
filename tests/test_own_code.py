"""exchange/own_code.py: models that no class of transformers computes, loaded there by their own
code; and the text that transformers continues with, of these and of GPT-2s."""

import pytest
import torch
from test_convert import BLOCK, CHARACTERS, change_json, save_run

import convert
from configurator import UserError
from exchange.own_code import has_own_code
from formats.checkpoint import load_model
from inference.generate import Sampling, generate
from runtime.processes import setup
from text.chat import SPECIAL
from text.tokenizer import Tokenizer, add_special

transformers = pytest.importorskip("transformers")

MODERN = {"n_embd": 12, "bias": False, "rope": True, "rmsnorm": True, "qk_norm": True,
          "mlp": "relu2", "tied": False, "zero_init": True, "softcap": 15.0, "value_embeds": True,
          "residual_scalars": True}
BYTES = {"kind": "bytes"}


@pytest.fixture(autouse=True)
def code_folder(tmp_path, monkeypatch):
    """Where transformers copies the code to before it imports it; else in the user's cache."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def export(folder):
    convert.main(source=f"{folder}/mine", to="huggingface", out_dir=f"{folder}/theirs")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "theirs", trust_remote_code=True).eval()


@pytest.mark.parametrize("changes", [
    MODERN, {**MODERN, "n_kv_head": 1, "vocab_size": 17}, {"mlp": "swiglu", "vocab_size": 17}],
    ids=["modern", "padded", "swiglu"])
def test_transformers_computes_the_same_logits_with_our_code(tmp_path, changes):
    ours, _ = save_run(tmp_path / "mine", CHARACTERS, **changes)
    theirs = export(tmp_path)
    tokens = torch.randint(11, (2, BLOCK), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = ours.logits(tokens)[..., :12]
        out = theirs(tokens, attention_mask=torch.ones(2, BLOCK), labels=tokens)
        torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
        # Their labels are not shifted.
        loss = torch.nn.functional.cross_entropy(expected[:, :-1].mT, tokens[:, 1:])
        torch.testing.assert_close(out.loss, loss)


def our_greedy_text(model, tokenizer, prompt, count):
    runtime = setup("cpu", "float32")
    ids = tokenizer.encode_prompt(prompt)
    steps = generate(model, [ids], [torch.Generator()], count,
                     Sampling(0.0, 0, 1.0, tokenizer.vocab_size), tokenizer.eot, runtime)
    return tokenizer.decode([new_id for new_id, in steps])


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_pipeline_of_transformers_writes_the_same_text(tmp_path, changes):
    ours, tokenizer = save_run(tmp_path / "mine", BYTES, block_size=37, **changes)
    export(tmp_path)
    pipeline = transformers.pipeline("text-generation", model=f"{tmp_path}/theirs",
                                     trust_remote_code=True)
    prompts = [f"{'The cat sat'[:3 + i % 7]} {i}" for i in range(20)]
    theirs = pipeline(prompts, max_new_tokens=11, do_sample=False, return_full_text=False)
    texts = [our_greedy_text(ours, tokenizer, prompt, 11) for prompt in prompts]
    assert [answer["generated_text"] for answer, in theirs] == texts
    assert len(set(texts)) > 5


def test_the_cache_of_transformers_changes_nothing(tmp_path):
    """Also in a beam search, which reorders it; T > 1, so that a wrong rotation would show."""
    save_run(tmp_path / "mine", CHARACTERS, n_kv_head=1, **MODERN)
    theirs = export(tmp_path)
    prompt = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(3))
    for beams in (1, 3):
        settings = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        with_cache = theirs.generate(prompt, use_cache=True, **settings)
        assert torch.equal(with_cache, theirs.generate(prompt, use_cache=False, **settings))
    mask = torch.ones(2, 5)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="padded on the left, which this model cannot read"):
        theirs(prompt, attention_mask=mask)


def test_a_model_with_our_code_comes_back_without_running_it(tmp_path):
    spec = add_special(BYTES, SPECIAL)
    ours, tokenizer = save_run(tmp_path / "mine", spec, **MODERN, vocab_size=269)
    theirs = export(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # as after a finetuning
    (tmp_path / "theirs" / "model.safetensors").unlink()
    for path in (tmp_path / "theirs").glob("*.py"):
        path.write_text("raise SystemExit('this ran')")
    assert has_own_code(tmp_path / "theirs") and not has_own_code(tmp_path / "mine")
    convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/again")
    again = load_model(tmp_path / "again")
    weights = again.state_dict()
    for name, weight in ours.state_dict().items():
        is_table = weight.shape[0] == 269
        assert torch.equal(weights.pop(name), weight[:263] if is_table else weight)
    assert not weights and again.config.vocab_size == 263
    assert Tokenizer.load(tmp_path / "again").spec == tokenizer.spec

    # Damaged settings are the user's mistake.
    change_json(tmp_path / "theirs" / "config.json", gpt={"n_head": 0})
    with pytest.raises(UserError, match="config.json: not a model of ours, or damaged .*n_head=0"):
        convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/once_more")
