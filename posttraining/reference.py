"""The frozen model that an objective compares with: distillation's teacher, or where DPO and IPO
began."""

from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from formats.checkpoint import load_model, open_checkpoint
from formats.files import hash_file
from posttraining.lora import off
from posttraining.objectives import WITH_REFERENCE
from posttraining.vocabulary import grow_vocabulary


class Reference(NamedTuple):
    """The checkpoint that --reference= names."""

    folder: Path
    # Of its weights.
    sha256: str
    # How many ids its tokenizer has. The model's may have more, special tokens that were added.
    vocab_size: int = 0


def open_reference(c, resumed):
    """Return the Reference that the settings name, or None.

    resumed: the Checkpoint of the run that goes on, or None. Raises UserError where the objective
    needs one or has no use for it, and where it is not the one of the resumed run.
    """
    if c.lora_rank and not c.reference and c.objective in ("dpo", "ipo"):
        return None  # what LoRA has not changed, see losses_of_base
    if bool(c.reference) != (c.objective in WITH_REFERENCE):
        raise UserError(f"objective={c.objective!r} with reference={c.reference!r}: "
                        f"{', '.join(WITH_REFERENCE)} need --reference=FOLDER, a run or one of its "
                        "checkpoints, and the other objectives none")
    if not c.reference:
        return None

    # A resumed run goes on with the same weights, wherever they are.
    folder = open_checkpoint(c.reference, "best").folder
    sha256 = hash_file(folder / "model.safetensors")
    if resumed and resumed.meta.get("reference", sha256) != sha256:
        raise UserError(f"reference={c.reference}: its weights are not those that the run was "
                        f"trained with; name that model, or start a new run with these weights: "
                        f"--init_from={resumed.folder}")
    return Reference(folder, sha256)


def load_reference(reference, model, vocab_size, runtime):
    """Return the GPT of a Reference, frozen, on the device, to compare a model of vocab_size ids
    with. New ids get the rows that the model itself began with. Raises UserError where the model's
    sequences are too long for it."""
    folder = reference.folder
    frozen = load_model(folder)
    grow_vocabulary(frozen, reference.vocab_size, vocab_size)
    frozen.requires_grad_(False).eval()
    # Its positions must reach as far.
    longest, wanted = frozen.config.block_size, model.config.block_size
    if longest < wanted:
        raise UserError(f"block_size={wanted}, but the reference {folder} has block_size="
                        f"{longest}; use at most that")
    # Its attention looks into earlier documents where the model's does, or not.
    frozen.document_start = model.document_start
    return frozen.to(runtime.device)


def losses_of_base(model, tokens, targets):
    """Return the losses of the base of a model that LoRA changes, without dropout."""
    was_training = model.training
    model.eval()
    with off(model):
        losses = model(tokens, targets)  # (B, T)
    model.train(was_training)
    return losses
