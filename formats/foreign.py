"""Checkpoints of other programs: which command converts them (convert.py)."""

from configurator import UserError


def refuse_others(path):
    """Raise UserError, with the command that converts it, where `path` is, or is the folder of, a
    checkpoint of nanoGPT's or of transformers'."""
    convert = f"convert it: python convert.py --source={path}"
    is_file = path.suffix == ".pt" and path.is_file()
    if is_file or (path / "ckpt.pt").is_file():
        raise UserError(f"{path}: this is nanoGPT's checkpoint; {convert} --dataset=NAME (the "
                        "dataset that it was trained on)")
    if (path / "config.json").is_file() and not (path / "meta.json").is_file():
        raise UserError(f"{path}: this is a model that transformers has saved; {convert}")
