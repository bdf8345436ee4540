"""Files on the disk: written whole or not at all, JSON, hashes, and a lock on a folder."""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError
from runtime.failures import FULL_DISK


def read_json(path):
    """Return the dict that a JSON file holds. Raises UserError where it cannot be read."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, it is not a JSON object ({error})") from error


def write_json(path, contents):
    """Write a dict as a JSON file that is whole or not there."""
    write_atomically(path, json.dumps(contents, indent=1) + "\n")


def write_atomically(path, text):
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


@contextmanager
def lock_folder(folder, busy):
    """Keep other processes out of a folder, which is made where it is missing, while entered.

    The operating system frees the lock when a process ends, however it ends. Raises UserError where
    the folder cannot be written, or another process is in it; `busy` says what that one does there
    and what to do about it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: {busy}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose a folder that "
                        "can") from error
    try:
        yield
    finally:
        lock.release()


def read_at(file, offset, size):
    """Return `size` bytes from `offset`. The file's own position, which forked processes share and
    move under each other, is left alone; Windows, which cannot do that, cannot fork either."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


@contextmanager
def naming_write_errors(path, remedy="go on with --init_from=resume"):
    """Name what could not be written, and what to do before the remedy: the system's error does not
    say it, and safetensors and torch.save have errors of their own. A bug is not caught."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]

        # safetensors writes the system's number into its text; torch.save hides it.
        number = getattr(error, "errno", None)
        in_text = re.search(r"os error (\d+)", reason)
        if in_text:
            number = int(in_text[1])

        # What is the cause?
        if not path.parent.is_dir():
            reason, advice = "its folder has vanished", "put it back"
        elif number in FULL_DISK:
            advice = "make room"
        elif re.search("inline_container|iostream", reason):
            reason, advice = "torch.save failed", "make room, if the disk is full"
        elif number is None:  # a bug
            raise
        else:
            advice = "remove the cause"
        raise UserError(f"{path}: cannot be written ({reason}); {advice}, then {remedy}") from error


def flush_to_disk(path):
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes no folders
        return
    # A folder can only be opened for reading.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path):
    # A piece at a time: files may be larger than the memory.
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
    return sha256.hexdigest()
