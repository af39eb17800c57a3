"""Captioning data: sources (one module per format, in data/formats), records and their checks, images, augmentation.

dataset = data.load("ariG23498/flickr8k")        # DatasetDict: train / validation / test, one record per image
picture = data.open_image(record["image"])       # RGB; opened late, in the worker
"""

from common.errors import DataError
from data.augmentation import Augmentation, corruption
from data.checks import check_images
from data.images import MAX_PIXELS, ImageError, open_image
from data.records import fingerprint
from data.sources import load
from data.text_augmentation import TextAugmentation
from data.training import (
    CaptionPairs,
    CaptionStream,
    EncodedRecords,
    in_memory,
    require_training_split,
)

__all__ = [
    "MAX_PIXELS",
    "Augmentation",
    "CaptionPairs",
    "CaptionStream",
    "DataError",
    "EncodedRecords",
    "ImageError",
    "TextAugmentation",
    "check_images",
    "corruption",
    "fingerprint",
    "in_memory",
    "load",
    "open_image",
    "require_training_split",
]
