"""Files that are whole or not there, JSON, hashes."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


def load_json(path):
    """Return the dict that a JSON file holds. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged, it is not a JSON object ({error})") from error


def write_aside(path, text):
    """Write a small text file so that it is whole or not there: aside, flushed, renamed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_at(file, offset, size):
    """Return `size` bytes from `offset`. The file's own position, which forked processes share and
    move under each other, is left alone; Windows, which cannot do that, cannot fork either."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


@contextmanager
def writing(path, remedy="make room, then go on with --init_from=resume"):
    """Name what could not be written: the error of a full disk does not say it itself."""
    try:
        yield
    except Exception as error:  # safetensors and torch.save have errors of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be written ({reason}); {remedy}") from error


def flush(path):
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
    return sha256.hexdigest()
