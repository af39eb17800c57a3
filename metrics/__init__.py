from metrics.coco_caption.cider import CiderD
from metrics.coco_caption.coco import (
    InvalidCaptions,
    MismatchedImages,
    ends_badly,
    preflight,
    repeated_bigrams,
    score,
)
from metrics.coco_caption.tokenizer import tokenize

__all__ = [
    "CiderD",
    "InvalidCaptions",
    "MismatchedImages",
    "ends_badly",
    "preflight",
    "repeated_bigrams",
    "score",
    "tokenize",
]
