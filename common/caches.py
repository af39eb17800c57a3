"""Where this repo and its libraries cache what they fetch and compute, even if this process has no home folder."""

import os
import sys
import tempfile
from pathlib import Path

from common.errors import UserError
from common.files import can_write


def cache_folder(cache_dir=None) -> Path:
    """The folder that caches what this repo fetches and computes: inside the cache of `datasets`, or in `cache_dir`."""
    import datasets

    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "image_captioning"


def use_writable_cache(beside: str | None) -> None:
    """Moves the caches of Hugging Face, matplotlib and this repo into the folder `beside` (default: a temporary folder) if
    the usual place, ~/.cache, cannot be written to. Must be called before these libraries are imported."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")
    if os.environ.get("HF_HOME") or (usual.is_absolute() and can_write(usual)):
        return
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}. Set TMPDIR to a folder that can be written to (Docker: --tmpfs /tmp)."
        ) from None
    place = Path(beside) / ".cache" if beside else temporary / f"image-captioning-cache-{_user()}"
    print(f"{usual} cannot be written to: caches go to {place}. Set HF_HOME to keep them elsewhere.", file=sys.stderr)
    os.environ["XDG_CACHE_HOME"] = str(place.absolute())
    os.environ.setdefault("MPLCONFIGDIR", str(place.absolute() / "matplotlib"))
    for name in ("USER", "LOGNAME"):  # libraries ask for the name of a user that the system does not know
        os.environ.setdefault(name, _user())


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
