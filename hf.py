"""GPT-2's published weights, and any other GPT-2 that Hugging Face transformers has saved.

    python train.py config/eval_gpt2.py                      # uses it: init_from='gpt2'
    python hf.py --source=gpt2 --out_dir=out/gpt2            # a checkpoint to sample or finetune
    python hf.py --source=path/to/folder --out_dir=out/mine  # config.json and model.safetensors

Reads the safetensors file itself; transformers is not needed. The tokenizer is always GPT-2's.
"""

import json
from dataclasses import asdict
from pathlib import Path

from configurator import run
from model import GPTConfig, from_weights, save_weights
from tokenizer import Tokenizer, gpt2_spec
from tokens import load_json, write_aside

SIZES = {  # (n_layer, n_head, n_embd) of OpenAI's four
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600)}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MATHS = {  # what config.json must say, or leave out: our model has no other
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True}


def main(
    source="gpt2",  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the folder of a saved GPT-2
    out_dir="",  # the checkpoint's folder ('': out/<source>)
):
    folder = Path(out_dir or Path("out", Path(source).resolve().name))
    if source not in SIZES and folder.resolve() == Path(source).resolve():
        raise ValueError(f"out_dir={out_dir!r} is the source, which would be lost; name another")
    model, tokenizer = load_gpt2(source)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    tokenizer.save(folder)
    write_aside(folder / "meta.json", json.dumps({"model": asdict(model.config), "source": source},
                                                 indent=1) + "\n")
    print(f"{folder}: {model.parameter_count():,} parameters; "
          f"sample from it with python sample.py --init_from={folder}")


def gpt2_sizes(name):
    """Return train.py's settings for one of OpenAI's four models."""
    if name not in SIZES:
        raise ValueError(f"init_from={name!r}: choose {', '.join(SIZES)}")
    n_layer, n_head, n_embd = SIZES[name]
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024,
            "bias": True}


def load_gpt2(source, dropout=0.0):
    """Return (GPT, Tokenizer) of one of OpenAI's four models, by name, or of a local folder with
    transformers' config.json and model.safetensors. Raises ValueError where it cannot be had."""
    if source not in SIZES and not Path(source).is_dir():
        raise ValueError(f"{source}: neither a folder nor one of {', '.join(SIZES)}")
    config_path, weights_path = (
        fetch(source, name) if source in SIZES else Path(source, name)
        for name in ("config.json", "model.safetensors"))
    model, tokenizer = read_gpt2(config_path, weights_path, dropout), Tokenizer(gpt2_spec())
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"{source}: a vocabulary of {model.config.vocab_size:,} tokens is not "
                         f"GPT-2's {tokenizer.vocab_size:,}, whose tokenizer is the one we have")
    return model, tokenizer


def read_gpt2(config_path, weights_path, dropout=0.0):
    """Return the GPT of transformers' two files. Raises ValueError where it is not a GPT-2."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = {"model_type": None, **load_json(config_path)}
        for key, wanted in MATHS.items():
            if facts.get(key, wanted) != wanted:
                raise ValueError(f"{config_path}: {key}={facts[key]!r}, GPT-2 has {wanted!r}")
        config = GPTConfig(
            block_size=facts["n_positions"], vocab_size=facts["vocab_size"], dropout=dropout,
            n_layer=facts["n_layer"], n_head=facts["n_head"], n_embd=facts["n_embd"], bias=True)
        tensors = load_file(weights_path)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{Path(weights_path).parent}: not a GPT-2 that transformers saved as "
                         f"safetensors ({type(error).__name__}: {error})") from error
    weights = dict(translate(key, tensor) for key, tensor in tensors.items())
    weights.pop(None, None)
    return from_weights(config, weights, weights_path)


def translate(key, tensor):
    """Return our (key, tensor) for one of transformers' GPT-2; key None for what we have no use of.

    OpenAI's Conv1D keeps its matrices as (in, out), Linear as (out, in). The published files lack
    the prefix "transformer."; the head is the embedding; attn.bias is the causal mask.
    """
    if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
        return None, tensor
    key = key if key.startswith("transformer.") else f"transformer.{key}"
    return key, tensor.transpose(0, -1).contiguous() if key.endswith(TRANSPOSED) else tensor


def fetch(name, filename):
    """Return the path of a published file, from Hugging Face's hub or its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(f"openai-community/{name}", filename))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{name} cannot be downloaded ({type(error).__name__}); go online once, or save it "
            "elsewhere and give its folder: python hf.py --source=FOLDER") from error


if __name__ == "__main__":
    run(main)
