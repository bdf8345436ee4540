"""Write a GPT of ours for transformers with its own code, and read it back: for the models that
none of transformers' classes can compute, those with the switches that came after GPT-2.

    save_with_code(model, vocab_size, eot, "FOLDER")
    model = load_with_code("FOLDER")

    config.json                {"model_type": "flatgpt", "gpt": GPTConfig, "auto_map", ...}
    model.safetensors          our tensors, each with the prefix "gpt."
    model.py                   a copy of ours
    modeling_flatgpt.py        the class around it that transformers needs, from assets/

Hugging Face calls this remote code: who loads the folder there says trust_remote_code=True. Here
only the weights and the settings are read.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from configurator import UserError
from exchange.huggingface import find_weights, read_tensors
from formats.files import read_json, write_json
from formats.weights import model_with_weights, save_weights
from model import GPTConfig

ROOT = Path(__file__).parent.parent
CODE = (ROOT / "model.py", ROOT / "assets" / "modeling_flatgpt.py")
MODEL_TYPE = "flatgpt"
PREFIX = "gpt."
TABLES = ("wte.weight", "lm_head.weight", "value_embed.weight")  # with a row for each token


def save_with_code(model, vocab_size, eot, folder):
    """Write a GPT into a folder, with the code that transformers needs to compute it.

    vocab_size: the tokenizer's; rows beyond it, which pad the tables, are left out. eot: the id at
    which transformers stops to generate, or None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # the weights
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(TABLES):
            tensor = tensor[:vocab_size]
        weights[PREFIX + name] = tensor
    save_weights(weights, folder)
    # the code
    for path in CODE:
        shutil.copyfile(path, folder / path.name)
    # the settings: ours, and under their names those that transformers asks for
    c = replace(model.config, vocab_size=vocab_size)
    write_json(folder / "config.json", {
        "architectures": ["FlatGPT"], "model_type": MODEL_TYPE, "gpt": asdict(c),
        "auto_map": {"AutoConfig": "modeling_flatgpt.FlatGPTConfig",
                     "AutoModelForCausalLM": "modeling_flatgpt.FlatGPT"},
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "hidden_size": c.n_embd,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.block_size,
        "tie_word_embeddings": False,  # a tied head has no tensor of its own here
        "dtype": "float32", "bos_token_id": eot, "eos_token_id": eot})
    write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})


def has_own_code(folder):
    """Return whether save_with_code wrote this folder, or transformers has saved such a model."""
    path = Path(folder, "config.json")
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def load_with_code(folder):
    """Return the GPT of a folder of which has_own_code is true. Its code is not run. Raises
    UserError where the folder is damaged."""
    path = Path(folder, "config.json")
    try:
        config = replace(GPTConfig(**read_json(path)["gpt"]), dropout=0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a model of ours, or damaged ({error!r})") from error
    weights, paths = {}, find_weights(Path(folder))
    for weights_path in paths:
        weights |= read_tensors(weights_path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    return model_with_weights(config, weights, paths[0])
