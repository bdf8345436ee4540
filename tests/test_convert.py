"""convert.py: models that transformers has saved, and what is not one."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import sample
from configurator import UserError
from documents.conversations import Message
from exchange import huggingface
from formats.checkpoint import find_checkpoint, load_model
from formats.files import read_json
from model import GPT, GPTConfig
from text.bpe import train_bpe
from text.chat import SPECIAL, render
from text.tokenizer import Tokenizer, add_special, gpt2_spec
from text.tokenizer_json import EOT, GPT2_PATTERN
from training.resume import checkpoint_settings

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
V, BLOCK = 11, 13


def save_with_transformers(folder, vocab_size=V, **changes):
    """Save a tiny GPT-2 whose every parameter is random, as transformers does; return it."""
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{
        "vocab_size": vocab_size, "n_positions": BLOCK, "n_embd": 21, "n_layer": 2, "n_head": 3,
        "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    theirs.save_pretrained(folder)
    return theirs


def read_saved(folder, **settings):
    return huggingface.load_gpt2(str(folder), **settings)


def change_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}))


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    try:
        return Tokenizer(gpt2_spec())
    except ValueError as error:
        pytest.skip(f"needs tiktoken's gpt2 files ({error})")


@pytest.fixture
def tokens():
    return torch.randint(V, (2, BLOCK), generator=torch.Generator().manual_seed(3))


def test_a_saved_model_has_the_same_logits(tmp_path, tokens):
    theirs = save_with_transformers(tmp_path)
    ours = read_saved(tmp_path).eval()
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert ours.config.bias and ours.config.dropout == 0.0
    assert read_saved(tmp_path, dropout=0.5).transformer.h[1].attn.dropout == 0.5


def test_the_published_files_keys_are_accepted(tmp_path, tokens):
    """OpenAI's four lack the prefix and carry the causal mask; some files carry the head too."""
    theirs = save_with_transformers(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {key.removeprefix("transformer."): p for key, p in load_file(path).items()}
    assert "h.1.mlp.c_fc.weight" in weights
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, BLOCK, BLOCK))
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, path)
    ours = read_saved(tmp_path).eval().logits(tokens)
    assert torch.equal(ours, read_saved(tmp_path).logits(tokens))
    torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_half_precision_becomes_float32(tmp_path):
    theirs = save_with_transformers(tmp_path).bfloat16()
    theirs.save_pretrained(tmp_path)
    model = read_saved(tmp_path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight.float())


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "llama"}, "config.json: model_type='llama', GPT-2 has 'gpt2'"),
    ({"activation_function": "relu"}, "activation_function='relu', this version knows gelu_new, g"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, GPT-2 has 1e-05"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False, GPT-2 has True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False, GPT-2 has True"),
    ({"n_embd": 42}, r"model.safetensors: the weights are another model's .*\[11, 42\]"),
    ({"n_layer": 3}, "another model's .*Missing key.*h.2"),
    ({"n_head": 4}, "config.json: n_embd=21 is not divisible by n_head=4"),
    ({"n_layer": 0}, "config.json: n_layer=0: must be"),
])
def test_settings_of_another_model_are_refused(change, message, tmp_path):
    save_with_transformers(tmp_path)
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        read_saved(tmp_path)


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("config.json", Path.unlink, "config.json: No such file"),
    ("config.json", lambda path: path.write_text("{"), "config.json: damaged, it is not"),
    ("config.json", lambda path: path.write_text("[1]"), "config.json: damaged, it is not"),
    ("config.json", lambda path: path.write_text("{}"), "config.json: model_type=None"),
    ("config.json", lambda path: path.write_text('{"model_type": "gpt2"}'),
     "'n_positions' is missing"),
    ("model.safetensors", Path.unlink, "saved: no model.safetensors or pytorch_model.bin here, "),
    ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]),
     "saved/model.safetensors: not weights that transformers saved .SafetensorError"),
    ("model.safetensors", lambda path: save_file({}, path), "another model's .*Missing key"),
    ("model.safetensors", lambda path: save_file({"h.0.mlp.c_fc.weight": torch.ones(2, 3, 5)},
                                                 path), "another model's"),
])
def test_damaged_files_are_refused_by_name(file, damage, message, tmp_path):
    save_with_transformers(tmp_path / "saved")
    damage(tmp_path / "saved" / file)
    with pytest.raises(ValueError, match=message):
        read_saved(tmp_path / "saved")


def test_a_name_that_is_neither_published_nor_a_folder(tmp_path):
    with pytest.raises(ValueError, match="gpt3: neither a folder nor one of gpt2, gpt2-medium, g"):
        huggingface.load_gpt2("gpt3")
    with pytest.raises(ValueError, match="init_from='gpt3': choose gpt2, gpt2-medium"):
        huggingface.gpt2_sizes("gpt3")


def split_weights(folder, name, save):
    """Divide a folder's model.safetensors into two files, by save(tensors, path), and an index."""
    weights, files = load_file(folder / "model.safetensors"), {}
    for i in (0, 1):
        path = folder / f"{Path(name).stem}-0000{i + 1}-of-00002{Path(name).suffix}"
        part = {key: weights[key] for key in sorted(weights)[i::2]}
        save(part, path)
        files |= dict.fromkeys(part, path.name)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_weights_in_other_files(tmp_path, name, in_parts):
    """Sharded, or pickled by torch.save, which also keeps the head beside the embedding."""
    save_with_transformers(tmp_path, vocab_size=263)
    save_tokenizer(tmp_path, 262)
    expected = read_saved(tmp_path).state_dict()
    save = save_file if name == "model.safetensors" else torch.save
    if in_parts:
        split_weights(tmp_path, name, save)
    elif save is torch.save:
        weights = load_file(tmp_path / "model.safetensors")
        torch.save({**weights, "lm_head.weight": weights["transformer.wte.weight"]},
                   tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    convert.main(source=str(tmp_path), out_dir=f"{tmp_path}/mine")
    found = load_model(tmp_path / "mine").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


class Malicious:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("contents", [
    {"wte.weight": Malicious()}, {"wte.weight": 5}, [torch.zeros(2)], {"model": {}}, b"damaged"],
    ids=["code", "number", "list", "nested", "damaged"])
def test_what_is_not_weights_is_refused_without_running_it(tmp_path, capsys, contents):
    save_with_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if isinstance(contents, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(contents)
    else:
        torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not weights that transformers saved"):
        read_saved(tmp_path)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("index", "says"), [
    ("{}", "index.json: damaged, it lists no files"),
    ('{"weight_map": {"wte.weight": 5}}', "/5: not weights .*No such file"),
    ('{"weight_map": {"wte.weight": "gone"}}', "/gone: not weights .*No such file")])
def test_a_damaged_index_is_refused(tmp_path, index, says):
    save_with_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=says):
        read_saved(tmp_path)


def test_other_commands_say_how_to_convert(tmp_path):
    save_with_transformers(tmp_path)
    says = f"transformers has saved; convert it: python convert.py --source={tmp_path}"
    with pytest.raises(UserError, match=says):
        sample.main(init_from=str(tmp_path))
    with pytest.raises(UserError, match=says):
        checkpoint_settings({"init_from": str(tmp_path)})


def save_tokenizer(folder, vocab_size, lowercase=False):
    """Save a tokenizer of this many tokens, as transformers does; return it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat that sat there"], trainer)
    if lowercase:
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save(f"{folder}/tokenizer.json")
    return tokenizer


def test_the_folder_s_own_tokenizer_is_used(tmp_path):
    save_with_transformers(tmp_path / "theirs", vocab_size=263)
    theirs = save_tokenizer(tmp_path / "theirs", 262)
    convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/mine")
    ours = Tokenizer.load(tmp_path / "mine")
    assert ours.vocab_size == 262
    assert ours.encode("that cat").tolist() == theirs.encode("that cat").ids


def test_gpt_2_s_tokenizer_json_is_gpt_2_s(tmp_path, gpt2_tokenizer, monkeypatch):
    """So that a dataset which was prepared with --tokenizer=gpt2 has the checkpoint's."""
    spec = {**gpt2_tokenizer.spec, "kind": "bpe", "pattern": GPT2_PATTERN}
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(convert, "read_spec", lambda path: spec)
    assert convert.folder_tokenizer(str(tmp_path), 50257).spec == gpt2_tokenizer.spec


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, gpt2_tokenizer):
    save_with_transformers(tmp_path)
    with pytest.raises(UserError, match="GPT-2's tokenizer: 50,257 tokens, and the model .* has 1"):
        convert.main(source=str(tmp_path), out_dir=f"{tmp_path}/mine")
    save_tokenizer(tmp_path, 262)
    with pytest.raises(UserError, match="tokenizer.json: 262 tokens, and the model in .* has 11"):
        convert.main(source=str(tmp_path), out_dir=f"{tmp_path}/mine")
    save_tokenizer(tmp_path, 262, lowercase=True)
    with pytest.raises(UserError, match=r"tokenizer.json: its normalizer \(Lowercase\) changes"):
        convert.main(source=str(tmp_path), out_dir=f"{tmp_path}/mine")
    assert not (tmp_path / "mine").exists()


def test_the_source_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_with_transformers(tmp_path / "out" / "mine")
    before = (tmp_path / "out/mine/model.safetensors").read_bytes()
    for settings in ({"source": "out/mine"}, {"source": "out/mine", "out_dir": "out/../out/mine"}):
        with pytest.raises(ValueError, match="is the source, which would be overwritten"):
            convert.main(**settings)
    assert (tmp_path / "out/mine/model.safetensors").read_bytes() == before


def script(name, *flags, cwd, **environment):
    return subprocess.run([sys.executable, ROOT / name, *flags], cwd=cwd, timeout=120,
                          capture_output=True, text=True, env={**os.environ, **environment})


def test_a_saved_model_becomes_a_checkpoint_to_sample_from(tmp_path, gpt2_tokenizer, capsys):
    theirs = save_with_transformers(tmp_path / "theirs", vocab_size=50257)
    done = script("convert.py", "--source=theirs", "--out_dir=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine: ")
    assert done.stdout.endswith("sample from it with python sample.py --init_from=mine\n")
    model = load_model(tmp_path / "mine").eval()
    ids = gpt2_tokenizer.encode_prompt("Hello there")
    with torch.no_grad():
        torch.testing.assert_close(model.logits(torch.tensor([ids])),
                                   theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5)
        for _ in range(BLOCK + 1 - len(ids)):  # beyond, their context slides and ours does not
            ids.append(int(theirs(torch.tensor([ids[-BLOCK:]])).logits[0, -1].argmax()))
    sample.main(init_from=str(tmp_path / "mine"), start="Hello there", num_samples=1, device="cpu",
                max_new_tokens=BLOCK, temperature=0.0, dtype="float32")
    assert capsys.readouterr().out.startswith(gpt2_tokenizer.decode(ids))


def test_a_saved_model_is_finetuned(tmp_path, gpt2_tokenizer):
    """The whole way: convert, prepare, train from the converted folder."""
    save_with_transformers(tmp_path / "theirs", vocab_size=50257)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 50)
    convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/mine")
    for command in ("prepare.py --input=text.txt --dataset=./plays --tokenizer=gpt2",
                    "train.py --init_from=mine --dataset=./plays --out_dir=tuned --max_iters=5 "
                    "--batch_size=2 --learning_rate=1e-2 --warmup_iters=0 --device=cpu "
                    "--gradient_accumulation_steps=1 --eval_tokens=13 --eval_interval=5 "
                    "--log_interval=1 --dtype=float32"):
        done = script(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert load_model(find_checkpoint(tmp_path / "tuned")).config.block_size == BLOCK


def test_offline_gpt2_ends_in_one_line_and_exit_code_2(tmp_path):
    done = script("convert.py", "--source=gpt2", cwd=tmp_path, HF_HUB_OFFLINE="1",
                  HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: gpt2 cannot be downloaded (")
    assert done.stderr.endswith("give its folder: python convert.py --source=FOLDER\n")
    assert not list(tmp_path.glob("out/*"))


def test_offline_the_hub_is_asked_once_and_cached_files_are_used(tmp_path, monkeypatch):
    """Its own function would try for half a minute, for files in its cache too."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def offline(*args, **settings):
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfApi, "model_info", offline)
    monkeypatch.setattr(hub, "hf_hub_download", None)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(UserError, match=r"gpt2 cannot be downloaded \(ConnectionError\)"):
        huggingface.load_gpt2("gpt2")
    assert len(asked) == 1
    save_with_transformers(tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"{tmp_path}/{file}")
    assert huggingface.load_gpt2("gpt2").config.n_embd == 21
    assert len(asked) == 1


def test_a_folder_that_cannot_be_written_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    save_with_transformers(tmp_path / "theirs", vocab_size=263)
    save_tokenizer(tmp_path / "theirs", 262)
    with pytest.raises(UserError, match=r"file/mine: cannot be written \(Not a directory\)"):
        convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/file/mine")


# ---------------------------------------------------------------------- for transformers


CHARACTERS = {"kind": "chars", "alphabet": "\n acehrst\u00e9\U0001f600", "documents": True}
TEXT = "that cat sat there\n\n at the reh\u00e9arse  \U0001f600"


def save_run(folder, spec, **changes):
    """Save a tiny model of ours with every parameter random, as a checkpoint; return both."""
    tokenizer = Tokenizer(spec)
    config = GPTConfig(**{"block_size": BLOCK, "vocab_size": tokenizer.vocab_size, "n_layer": 2,
                          "n_head": 3, "n_embd": 21, **changes})
    model = GPT(config, torch.Generator().manual_seed(1)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    convert.write_checkpoint(model, tokenizer, {}, folder)
    return model, tokenizer


def to_transformers(folder):
    convert.main(source=f"{folder}/mine", to="huggingface", out_dir=f"{folder}/theirs")
    return (transformers.GPT2LMHeadModel.from_pretrained(folder / "theirs").eval(),
            transformers.AutoTokenizer.from_pretrained(folder / "theirs"))


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"mlp": "gelu_exact"}, {"vocab_size": 17},
                                     {"n_kv_head": 3, "zero_init": True}], ids=str)
def test_transformers_computes_the_same_logits(tmp_path, changes):
    ours, _ = save_run(tmp_path / "mine", CHARACTERS, **changes)
    theirs, _ = to_transformers(tmp_path)
    tokens = torch.randint(11, (2, BLOCK), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.logits(tokens)[..., :12],
                                   rtol=1e-5, atol=1e-5)
    assert theirs.config.resid_pdrop == 0.0  # as a checkpoint is loaded; theirs is 0.1 by default
    assert theirs.lm_head.weight.shape == (12, 21)  # without rows that pad


@pytest.mark.parametrize("changes", [{}, {"bias": False, "mlp": "gelu_exact", "vocab_size": 17}],
                         ids=str)
def test_what_transformers_gets_comes_back(tmp_path, changes):
    ours, tokenizer = save_run(tmp_path / "mine", CHARACTERS, **changes)
    to_transformers(tmp_path)
    convert.main(source=f"{tmp_path}/theirs", out_dir=f"{tmp_path}/again")
    again = load_model(tmp_path / "again")
    weights = again.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weights.pop(name), weight[:12] if "wte" in name else weight)
    assert all(name.endswith("bias") and not weight.any() for name, weight in weights.items())
    assert again.config.mlp == ours.config.mlp and again.config.block_size == BLOCK
    assert Tokenizer.load(tmp_path / "again").spec == tokenizer.spec


def trained(pattern):
    return train_bpe(["the cat that sat there, at 12345 o'clock. " * 3], 280, pattern)


@pytest.mark.parametrize("kind", ["bytes", "chars", "one text's chars", "bpe", "bpe of gpt4",
                                  "gpt2", "whole pieces"])
def test_transformers_has_the_same_tokens(tmp_path, kind, request):
    specs = {"bytes": {"kind": "bytes"}, "chars": CHARACTERS,
             "one text's chars": {**CHARACTERS, "documents": False}}
    text = TEXT
    if kind in specs:
        spec = specs[kind]
    elif kind == "gpt2":
        spec = request.getfixturevalue("gpt2").spec
    else:
        spec = trained("gpt4" if kind == "bpe of gpt4" else "gpt2")
    if kind == "whole pieces":  # with a token that no merge makes
        tokens = [*spec["tokens"], base64.b64encode(b"xyz").decode()]
        spec = {**spec, "tokens": tokens, "special_tokens": {EOT: len(tokens)}}
    if "chars" not in kind:
        text = f"{TEXT} xyz It's 12345 o'clock,\t\u65e5\u672c \x00"
    _, tokenizer = save_run(tmp_path / "mine", spec)
    _, theirs = to_transformers(tmp_path)
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text).tolist()
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eot, tokenizer.vocab_size)
    written = (tmp_path / "theirs/tokenizer.json").read_text()
    library = tokenizers.Tokenizer.from_str(written)
    assert json.loads(library.to_str()) == json.loads(written)  # as transformers would save it
    back = convert.folder_tokenizer(f"{tmp_path}/theirs", tokenizer.vocab_size).spec
    assert back == spec


def test_transformers_stops_at_end_of_text(tmp_path):
    model, tokenizer = save_run(tmp_path / "mine", CHARACTERS)
    with torch.no_grad():  # end-of-text comes after anything
        model.transformer.ln_f.bias.copy_(10 * model.transformer.wte.weight[tokenizer.eot])
    convert.write_checkpoint(model, tokenizer, {}, tmp_path / "mine")
    theirs, their_tokenizer = to_transformers(tmp_path)
    out = theirs.generate(**their_tokenizer("cat", return_tensors="pt"), max_new_tokens=5,
                          do_sample=False, pad_token_id=tokenizer.eot)
    assert out[0, 3:].tolist() == [tokenizer.eot]


def test_a_run_s_best_checkpoint_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours, _ = save_run(tmp_path / "out/mine/iter_000005", CHARACTERS)
    save_run(tmp_path / "out/mine/iter_000007", CHARACTERS, n_embd=42)
    (tmp_path / "out/mine/best").write_text("iter_000005\n")
    convert.main(source="out/mine", to="huggingface")
    assert "load it with AutoModelForCausalLM.from_pretrained('out/mine-huggingface')" in (
        capsys.readouterr().out)
    assert read_json("out/mine-huggingface/config.json")["n_embd"] == ours.config.n_embd


def test_an_unknown_program_is_refused(tmp_path):
    with pytest.raises(UserError, match="to='onnx': choose 'flatgpt', 'int8'"):
        convert.main(source=f"{tmp_path}/mine", to="onnx")


@pytest.mark.parametrize("spec", [{"kind": "bytes"}, CHARACTERS, trained("gpt2")],
                         ids=lambda spec: spec["kind"])
def test_transformers_has_the_tokens_of_conversations_and_their_template(tmp_path, spec):
    _, tokenizer = save_run(tmp_path / "mine", add_special(spec, SPECIAL))
    theirs, their_tokenizer = to_transformers(tmp_path)
    messages = [Message("user", "that cat"), Message("assistant", "at the te")]
    expected = their_tokenizer.apply_chat_template([message._asdict() for message in messages])
    assert render(messages, tokenizer)[0] == expected["input_ids"]
    end = tokenizer.special["<|end|>"]
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == end

    # And back: the ids of the special tokens are the same.
    back = convert.folder_tokenizer(f"{tmp_path}/theirs", tokenizer.vocab_size)
    assert (back.special, back.eot) == (tokenizer.special, tokenizer.eot)
    if spec["kind"] != "bpe":
        assert back.spec == tokenizer.spec
