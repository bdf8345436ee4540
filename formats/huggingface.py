"""GPT-2's published weights, and any other GPT-2 that Hugging Face transformers has saved.

    python train.py config/eval_gpt2.py           # uses it: init_from='gpt2'
    python convert.py --source=gpt2

Reads the safetensors file itself; transformers is not needed. The tokenizer is always GPT-2's.
"""

from pathlib import Path

from configurator import UserError
from formats.checkpoint import from_weights
from formats.files import read_json
from model import GPTConfig

VOCAB_SIZE = 50257  # of GPT-2's tokenizer
SIZES = {  # (n_layer, n_head, n_embd) of OpenAI's four
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600)}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MATHS = {  # what config.json must say, or leave out: our model has no other
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True}


def gpt2_sizes(name):
    """Return train.py's settings for one of OpenAI's four models."""
    if name not in SIZES:
        raise UserError(f"init_from={name!r}: choose {', '.join(SIZES)}")
    n_layer, n_head, n_embd = SIZES[name]
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024,
            "bias": True}


def load_gpt2(source, dropout=0.0):
    """Return the GPT of one of OpenAI's four models, by name, or of a local folder with
    transformers' config.json and model.safetensors. Raises UserError where it cannot be had."""
    if source not in SIZES and not Path(source).is_dir():
        raise UserError(f"{source}: neither a folder nor one of {', '.join(SIZES)}")
    config_path, weights_path = (
        fetch(source, name) if source in SIZES else Path(source, name)
        for name in ("config.json", "model.safetensors"))
    model = read_gpt2(config_path, weights_path, dropout)
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(f"{source}: a vocabulary of {model.config.vocab_size:,} tokens is not "
                         f"GPT-2's {VOCAB_SIZE:,}, whose tokenizer is the one we have")
    return model


def read_gpt2(config_path, weights_path, dropout=0.0):
    """Return the GPT of transformers' two files. Raises UserError where it is not a GPT-2."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = {"model_type": None, **read_json(config_path)}
        for key, wanted in MATHS.items():
            if facts.get(key, wanted) != wanted:
                raise UserError(f"{config_path}: {key}={facts[key]!r}, GPT-2 has {wanted!r}")
        config = GPTConfig(
            block_size=facts["n_positions"], vocab_size=facts["vocab_size"], dropout=dropout,
            n_layer=facts["n_layer"], n_head=facts["n_head"], n_embd=facts["n_embd"], bias=True)
        tensors = load_file(weights_path)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{Path(weights_path).parent}: not a GPT-2 that transformers saved as "
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
        raise UserError(
            f"{name} cannot be downloaded ({type(error).__name__}); go online once, or save it "
            "elsewhere and give its folder: python convert.py --source=FOLDER") from error

