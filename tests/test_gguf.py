"""exchange/gguf.py: what llama.cpp reads, read back with its package gguf, and by llama.cpp."""

import base64
import sys

import pytest
import torch
from test_convert import CHARACTERS, save_run, trained
from test_experiments import load_script

import convert
from configurator import UserError
from documents.conversations import read_messages
from text.chat import SPECIAL, TEMPLATE, render
from text.tokenizer import add_special
from text.tokenizer_json import EOT, hugging_face_from_spec


def read_gguf(path):
    """Return ({key: value}, {name: tensor (out, in)}) of a file."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        tensors[tensor.name] = torch.tensor(tensor.data)
    return values, tensors


@pytest.mark.parametrize(("to", "dtype"), [("gguf", torch.float32), ("gguf-f16", torch.float16)])
@pytest.mark.parametrize("changes", [{"vocab_size": 293}, {"bias": False}], ids=["bias", "none"])
def test_the_file_has_our_tensors_bit_for_bit(tmp_path, to, dtype, changes):
    pytest.importorskip("gguf")
    model, tokenizer = save_run(tmp_path / "mine", add_special(trained("gpt2"), SPECIAL), **changes)
    convert.main(source=f"{tmp_path}/mine", to=to, out_dir=f"{tmp_path}/theirs")
    values, tensors = read_gguf(tmp_path / "theirs/model.gguf")

    # The tensors: one of each kind by its name, then that none is left.
    ours = model.state_dict()
    expected = {"token_embd.weight": ours["transformer.wte.weight"][:tokenizer.vocab_size],
                "blk.1.attn_qkv.weight": ours["transformer.h.1.attn.c_attn.weight"],
                "blk.0.attn_output.weight": ours["transformer.h.0.attn.c_proj.weight"],
                "blk.0.ffn_up.weight": ours["transformer.h.0.mlp.c_fc.weight"],
                "blk.1.ffn_down.weight": ours["transformer.h.1.mlp.c_proj.weight"]}
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor.to(dtype)), name
    for name, our_name in (("position_embd.weight", "wpe.weight"), ("output_norm.weight", "ln_f.w"),
                           ("blk.1.attn_norm.weight", "h.1.ln_1.weight"),
                           ("blk.0.ffn_norm.weight", "h.0.ln_2.weight")):
        found, = [ours[key] for key in ours if key.startswith(f"transformer.{our_name}")]
        assert torch.equal(tensors[name], found), name
    bias = torch.zeros(63)
    if model.config.bias:
        bias = ours["transformer.h.1.attn.c_attn.bias"]
    assert torch.equal(tensors["blk.1.attn_qkv.bias"], bias)
    assert len(tensors) == 2 + 2 + 2 * 12

    # The sizes and the tokenizer.
    prefix = "tokenizer.ggml."
    contents = hugging_face_from_spec(tokenizer.spec)
    assert values["gpt2.attention.head_count"] == 3 and values["gpt2.context_length"] == 13
    assert (values[prefix + "model"], values[prefix + "pre"]) == ("gpt2", "gpt-2")
    tokens = values[prefix + "tokens"]
    assert {token: i for i, token in enumerate(tokens)} == contents["model"]["vocab"]
    assert [pair.split(" ") for pair in values[prefix + "merges"]] == contents["model"]["merges"]
    assert [tokens[i] for i, kind in enumerate(values[prefix + "token_type"]) if kind == 3] == [
        EOT, *SPECIAL]
    assert values[prefix + "eos_token_id"] == tokenizer.special["<|end|>"]
    assert values["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize("to", ["gguf", "gguf-f16"])
def test_llama_cpp_reads_the_file_as_we_mean_it(tmp_path, to):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, which holds llama.cpp")
    script = load_script("llama_cpp")
    model, tokenizer = save_run(tmp_path / "mine", add_special(trained("gpt2"), SPECIAL))
    convert.main(source=f"{tmp_path}/mine", to=to, out_dir=f"{tmp_path}/theirs")
    theirs = script.LlamaCpp(tmp_path / "theirs/model.gguf", 13)

    # Texts, and a conversation.
    for text in ("the  cat\n\n\tsat 12345", "it'll, I'LL é 中文 \u3000👩\u200d👧",
                 "a<|end|><|endoftext|>"):
        assert theirs.encode(text) == tokenizer.encode(text).tolist(), text
    messages = [{"role": "system", "content": "Sit."}, {"role": "user", "content": " the cat\n"}]
    ids, _ = render(read_messages(messages, "here"), tokenizer)
    assert theirs.conversation(messages) == [*ids, tokenizer.special["<|assistant|>"]]

    # Continuations of a prompt, to the end of the context.
    prompt = tokenizer.encode_prompt("that")
    drawn, best = theirs.greedy(prompt, 13 - len(prompt))
    ours, difference = script.read_along(model, tokenizer.vocab_size, prompt, drawn, best)
    assert drawn == ours and len(drawn) > 7 and difference < 0.02


def whole_piece():
    spec = trained("gpt2")
    tokens = [*spec["tokens"], base64.b64encode(b"xyz").decode()]
    return {**spec, "tokens": tokens, "special_tokens": {EOT: len(tokens)}}


@pytest.mark.parametrize(("spec", "changes", "says"), [
    (trained("gpt2"), {"rope": True, "n_embd": 12, "softcap": 9.0}, "rope=True, softcap=9.0;"),
    (trained("gpt2"), {"mlp": "gelu_exact"}, "a model with mlp=gelu_exact;"),
    ({"kind": "bytes"}, {}, "cannot encode as the tokenizer bytes; only models with a byte-pair"),
    (CHARACTERS, {}, "the tokenizer chars"),
    (trained("gpt4"), {}, "it is not cut by GPT-2's pattern"),
    (whole_piece(), {}, "or has tokens that no merge makes")])
def test_what_llama_cpp_has_not_is_refused_by_name(tmp_path, spec, changes, says):
    save_run(tmp_path / "mine", spec, **changes)
    with pytest.raises(UserError, match=says):
        convert.main(source=f"{tmp_path}/mine", to="gguf", out_dir=f"{tmp_path}/theirs")
    assert not (tmp_path / "theirs").exists()


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    save_run(tmp_path / "mine", trained("gpt2"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf==0.19.0"):
        convert.main(source=f"{tmp_path}/mine", to="gguf", out_dir=f"{tmp_path}/theirs")
