from metrics.cider import CiderD
from metrics.coco import BAD_ENDINGS, MismatchedImages, score
from metrics.io import CaptionFileError, load_predictions, load_references
from metrics.java import preflight
from metrics.tokenizer import tokenize

__all__ = [
    "BAD_ENDINGS",
    "CaptionFileError",
    "CiderD",
    "MismatchedImages",
    "load_predictions",
    "load_references",
    "preflight",
    "score",
    "tokenize",
]
