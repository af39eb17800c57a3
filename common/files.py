"""Files that appear whole or not at all, and output folders."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from common.errors import UserError

# The permissions of a file that open() makes. Asked once: for that moment others are stricter, in every thread.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
NEW_FILE = 0o666 & ~_UMASK


@contextlib.contextmanager
def whole(path):
    """A temporary path next to `path` that replaces it when the block succeeds: the file appears whole or not at all,
    even if several processes write the same one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, NEW_FILE)  # mkstemp's are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def version_of(path) -> str:
    """What changes when a file does: its size and time. OSError if there is none."""
    about = os.stat(path)
    return f"{about.st_size}-{about.st_mtime_ns}"


def write_text(path, text: str) -> None:
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def share_weights(folder) -> None:
    """Gives safetensors files the permissions of any new file: since 0.8.0 the library lets only their owner read them."""
    for file in Path(folder).glob("*.safetensors"):
        with contextlib.suppress(PermissionError):  # another user's
            file.chmod(NEW_FILE)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def can_write(folder: Path) -> bool:
    """Whether a file can be made in the folder, or where it will be."""
    place = nearest_existing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def output_folder(path: str) -> Path:
    """The folder, created if needed; ValueError if it is a file or cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"output_dir: {path} is a file, or lies under one. Name a folder.") from None
    except OSError as error:
        raise UserError(f"output_dir: {path} cannot be written to: {error.strerror}.") from None
    return folder
