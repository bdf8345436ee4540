"""GPT-2's published weights, and any other GPT-2 that Hugging Face transformers has saved.

    python train.py config/eval_gpt2.py                      # uses it: init_from='gpt2'
    python hf.py --source=gpt2 --out_dir=out/gpt2            # a checkpoint to sample or finetune
    python hf.py --source=path/to/folder --out_dir=out/mine  # config.json and model.safetensors

Reads the safetensors file itself; transformers is not needed.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import run
from model import GPT, GPTConfig, save_weights
from prepare import Tokenizer, gpt2_spec
from tokens import load_json, write_aside

SIZES = {  # (n_layer, n_head, n_embd) of OpenAI's four
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600)}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def main(
    source="gpt2",  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the folder of a saved GPT-2
    out_dir="",  # the checkpoint's folder ('': out/<source>)
):
    model, tokenizer = load_gpt2(source)
    folder = Path(out_dir or Path("out", Path(source).name))
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if source in SIZES:
        config_path, weights_path = (fetch(source, name)
                                     for name in ("config.json", "model.safetensors"))
    else:
        config_path, weights_path = Path(source, "config.json"), Path(source, "model.safetensors")
    c = load_json(config_path)
    if c.get("model_type") != "gpt2" or c.get("activation_function") != "gelu_new":
        raise ValueError(f"{config_path}: model_type={c.get('model_type')!r} with activation "
                         f"{c.get('activation_function')!r} is not GPT-2 with gelu_new")
    config = GPTConfig(block_size=c["n_positions"], vocab_size=c["vocab_size"],
                       n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"],
                       dropout=dropout, bias=True)
    with torch.device("meta"):
        model = GPT(config)
    try:
        weights = dict(map(translate, *zip(*load_file(weights_path).items(), strict=True)))
        weights.pop(None, None)
        model.load_state_dict(weights, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights_path}: not GPT-2's weights ({reason})") from error
    return model.requires_grad_(True), Tokenizer(gpt2_spec())


def translate(key, tensor):
    """Return our (key, tensor) for one of transformers' GPT-2; key None for what we have no use of.

    OpenAI's Conv1D keeps its matrices as (in, out), Linear as (out, in). The published files lack
    the prefix "transformer."; the head is the embedding; attn.bias is the causal mask.
    """
    if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
        return None, tensor
    key = key if key.startswith("transformer.") else f"transformer.{key}"
    return key, tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor


def fetch(name, filename):
    """Return the path of a published file, from Hugging Face's hub or its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(f"openai-community/{name}", filename))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name} cannot be downloaded ({type(error).__name__}); go online once, or "
                         "save it elsewhere and give its folder: python hf.py --source=FOLDER"
                         ) from error


if __name__ == "__main__":
    run(main)
