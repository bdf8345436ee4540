"""Read GPT-2's published weights, and any other GPT-2 that Hugging Face transformers has saved;
write a GPT-2 of ours for transformers.

    model = load_gpt2("gpt2")      # one of OpenAI's four, from Hugging Face's hub or its cache
    model = load_gpt2("FOLDER")    # with transformers' config.json and weights (find_weights)
    save_gpt2(model, vocab_size, eot, "FOLDER")

transformers itself is not needed. Its GPT-2 and ours name their tensors alike
("transformer.h.0.attn.c_attn.weight"), with three differences:

- OpenAI's published files lack the prefix "transformer.".
- Matrices in TRANSPOSED belong to OpenAI's Conv1D, (in, out); those of our nn.Linear are (out, in).
- Tensors in DERIVED are not weights of their own: the head is the token embedding, attn.bias and
  attn.masked_bias are the causal mask.
"""

import pickle
from pathlib import Path

import torch

from configurator import UserError
from formats.files import read_json, write_json
from formats.foreign import refuse_others
from formats.weights import model_with_weights, save_weights
from model import GPTConfig

VOCAB_SIZE = 50257  # of GPT-2's tokenizer
# OpenAI's four models (Radford et al. 2019, table 2; n_head: the hparams.json of their code).
SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# The map between their tensors and ours.
PREFIX = "transformer."
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DERIVED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")

# What config.json must say, or leave out, because our GPT-2 computes nothing else.
REQUIRED_SETTINGS = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "tie_word_embeddings": True}
# Their names of the activations, and ours.
ACTIVATIONS = {"gelu_new": "gelu", "gelu": "gelu_exact"}
# Switches of ours that change what the model computes, and that GPT-2 has as they are by default.
SWITCHES = ("rope", "rmsnorm", "qk_norm", "tied", "softcap", "value_embeds", "residual_scalars")

# What the libraries raise for a file that is damaged, or of another kind.
READ_ERRORS = (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError,
               AttributeError, ValueError)


def gpt2_sizes(name):
    """Return train.py's settings for one of OpenAI's four models."""
    if name not in SIZES:
        raise UserError(f"init_from={name!r}: choose {', '.join(SIZES)}, or the folder of a "
                        "checkpoint")
    return {**SIZES[name], "block_size": 1024, "bias": True}


def load_gpt2(source, dropout=0.0):
    """Return the GPT of one of OpenAI's four models, by name, or of a folder that transformers has
    saved. Raises UserError where there is none, or not a GPT-2."""
    # Find the files.
    if source in SIZES:
        config_path = download(source, "config.json")
        weight_paths = [download(source, "model.safetensors")]
    elif Path(source).is_dir():
        config_path = Path(source, "config.json")
        weight_paths = find_weights(Path(source))
    else:
        refuse_others(Path(source))
        raise UserError(f"{source}: neither a folder nor one of {', '.join(SIZES)}")

    # Read them. The weights may be in several.
    config, weights = read_config(config_path, dropout), {}
    for path in weight_paths:
        weights |= from_transformers(read_tensors(path))
    return model_with_weights(config, weights, weight_paths[0])


def download(name, filename):
    """Return the path of a published file, from Hugging Face's hub or its cache."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    repository = f"openai-community/{name}"
    cached = try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Ask once before: offline, a download is tried again for half a minute.
        HfApi().model_info(repository, timeout=10)
        return Path(hf_hub_download(repository, filename))
    except Exception as error:  # the hub's libraries have many
        raise UserError(
            f"{name} cannot be downloaded ({type(error).__name__}); go online once, or save it "
            "elsewhere and give its folder: python convert.py --source=FOLDER") from error


def find_weights(folder):
    """Return the paths of the weights that transformers has saved into a folder: one file,
    model.safetensors or pytorch_model.bin, or the several that its index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return [path]
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise UserError(f"{index}: damaged, it lists no files; save the model again")
            return [folder / Path(file).name for file in sorted(set(map(str, files.values())))]
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin here, nor an index of "
                    "several files; let transformers save the model there: save_pretrained")


def read_tensors(path):
    """Return {name: tensor} of a file of weights, without running anything that is in it. Raises
    UserError where it is missing, damaged or something else."""
    # Imported here, because only those who read safetensors wait for it.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".bin":
            contents = torch.load(path, map_location="cpu", weights_only=True)
        else:
            contents = load_file(path)
        return {name: tensor.detach() for name, tensor in contents.items()}
    except (*READ_ERRORS, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not weights that transformers saved ({type(error).__name__}: "
                        f"{reason}); save the model again") from error


def read_config(path, dropout):
    """Return the GPTConfig of transformers' config.json. Raises UserError where it describes
    anything but a GPT-2."""
    # Compare what our model cannot vary. Only model_type may not be left out.
    settings = read_json(path)
    settings.setdefault("model_type", None)
    for key, required in {"model_type": "gpt2", **REQUIRED_SETTINGS}.items():
        if key in settings and settings[key] != required:
            raise UserError(f"{path}: {key}={settings[key]!r}, GPT-2 has {required!r}; choose "
                            "another model")

    activation = settings.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function={activation!r}, this version knows "
                        f"{', '.join(ACTIVATIONS)}; choose another model")

    # Take over the sizes. GPTConfig refuses those that do not fit together.
    try:
        return GPTConfig(
            block_size=settings["n_positions"], vocab_size=settings["vocab_size"],
            n_layer=settings["n_layer"], n_head=settings["n_head"], n_embd=settings["n_embd"],
            dropout=dropout, bias=True, mlp=ACTIVATIONS[activation])
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing; save the model again") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def from_transformers(tensors):
    """Return our {name: tensor} for transformers' or OpenAI's."""
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(DERIVED):
            our_name = PREFIX + name.removeprefix(PREFIX)
            weights[our_name] = transpose_conv1d(name, tensor)
    return weights


def transpose_conv1d(name, tensor):
    """Return a tensor in the other program's layout; the same function serves both directions."""
    if name.endswith(TRANSPOSED):
        return tensor.transpose(0, -1).contiguous()
    return tensor


# ---------------------------------------------------------------------- for transformers


def save_gpt2(model, vocab_size, eot, folder):
    """Write a GPT without beyond_gpt2 into a folder, as transformers' GPT2LMHeadModel reads it.

    vocab_size: the tokenizer's; rows of the embedding beyond it, which pad it, are left out. eot:
    the id at which transformers stops to generate, end-of-text or <|end|>, or None.
    """
    folder, config = Path(folder), transformers_config(model.config, vocab_size, eot)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(to_transformers(model, vocab_size), folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})


def beyond_gpt2(config):
    """Return the settings of a GPTConfig that GPT-2 cannot have, as text; '' for a GPT-2."""
    plain = GPTConfig()
    others = [key for key in SWITCHES if getattr(config, key) != getattr(plain, key)]
    if config.mlp not in ACTIVATIONS.values():
        others.append("mlp")
    if config.kv_heads != config.n_head:
        others.append("n_kv_head")
    return ", ".join(f"{key}={getattr(config, key)}" for key in others)


def transformers_config(config, vocab_size, eot):
    """Return the contents of config.json for the GPTConfig of a GPT-2."""
    their_activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **REQUIRED_SETTINGS,
            "activation_function": their_activations[config.mlp],
            "n_positions": config.block_size, "vocab_size": vocab_size,
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
            "bos_token_id": eot, "eos_token_id": eot}


def to_transformers(model, vocab_size):
    """Return transformers' {name: tensor} for a GPT's."""
    weights = with_biases(model, vocab_size)
    return {name: transpose_conv1d(name, tensor) for name, tensor in weights.items()}


def with_biases(model, vocab_size):
    """Return a GPT-2's {name: tensor} without the rows that pad its vocabulary. Where it has no
    biases they are zeros: with these a Linear and a LayerNorm compute the same."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor
        has_bias = not name.endswith(("wte.weight", "wpe.weight"))
        if has_bias and not model.config.bias:
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    embedding = PREFIX + "wte.weight"
    weights[embedding] = weights[embedding][:vocab_size]
    return weights
