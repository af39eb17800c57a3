"""Files that this repo keeps of data: what it fetched or computed, whole or not at all."""

import os
import threading
from pathlib import Path

import datasets


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_folder(cache_dir=None) -> Path:
    """Where this repo keeps what it fetched or computed from data: a folder inside the datasets cache."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "image_captioning"
