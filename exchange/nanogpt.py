"""Read what nanoGPT writes: its checkpoint ckpt.pt, and the characters in a dataset's meta.pkl.

    model, dataset = load_nanogpt("out/ckpt.pt")  # dataset: the name of the one it was trained on
    spec = read_characters("data/shakespeare_char/meta.pkl")

Both files are pickles, which could run code. Here they cannot: torch's weights_only reads tensors
and plain values alone, and PlainUnpickler imports nothing. Tensors have our names, but for the
prefix that torch.compile adds, and those of exchange.huggingface.DERIVED.
"""

import pickle
from pathlib import Path

import torch

from configurator import UserError
from exchange.huggingface import DERIVED, READ_ERRORS
from formats.weights import model_with_weights
from model import GPTConfig

COMPILED = "_orig_mod."
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


def find_nanogpt(source):
    """Return the path of the ckpt.pt that `source` is or holds; None where there is none."""
    path = Path(source)
    if path.is_dir():
        path = path / "ckpt.pt"
    if path.suffix == ".pt" and path.is_file():
        return path
    return None


def load_nanogpt(path, mlp="gelu_exact"):
    """Return (the GPT of a ckpt.pt, the name of its dataset or ''). mlp: its activation, which the
    file does not say. Raises UserError where it is not nanoGPT's."""
    # Read the file, which maps the optimizer's state into memory but does not read it.
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        sizes, tensors = contents["model_args"], contents["model"]
        tensors = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
        embedding = tensors["transformer.wte.weight"]
        # Before nanoGPT had the setting bias, there always were biases.
        config = GPTConfig(**{key: sizes[key] for key in SIZES}, bias=sizes.get("bias", True),
                           tied=is_same(tensors.get("lm_head.weight"), embedding), mlp=mlp)
        dataset = str(contents.get("config", {}).get("dataset", ""))
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: not a checkpoint of nanoGPT's that can be read without running "
                        f"code ({type(error).__name__}: {reason})") from error

    # Leave out what is no weight of its own.
    weights = {}
    for name, tensor in tensors.items():
        is_head = name == "lm_head.weight" and not config.tied
        if is_head or not name.endswith(DERIVED):
            weights[name] = tensor
    return model_with_weights(config, weights, path), dataset


def is_same(head, embedding):
    """Return whether the head's matrix is the token embedding; it may be left out then."""
    return head is None or torch.equal(head, embedding)


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists and dicts; it imports nothing, so that nothing can run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_characters(path):
    """Return the spec of a `chars` tokenizer (text/tokenizer_json.py) from a meta.pkl, without
    running it. Raises UserError where it holds anything but characters by id."""
    try:
        with open(path, "rb") as file:
            characters = PlainUnpickler(file).load()["itos"]
        alphabet = [characters[i] for i in range(len(characters))]
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: cannot be read without running code, or is damaged "
                        f"({type(error).__name__}: {error})") from error
    is_character = [isinstance(token, str) and len(token) == 1 for token in alphabet]
    if not all(is_character) or len(set(alphabet)) < len(alphabet):
        raise UserError(f"{path}: its itos are not characters, one for each id")
    return {"kind": "chars", "alphabet": "".join(alphabet), "documents": False}
