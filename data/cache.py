"""Where this repo keeps what it fetched or computed from data."""

from pathlib import Path

import datasets


def cache_folder(cache_dir=None) -> Path:
    """Where this repo keeps what it fetched or computed from data: a folder inside the datasets cache."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "image_captioning"
