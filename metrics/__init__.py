from metrics.cider import CiderD
from metrics.coco import MismatchedImages, ends_badly, repeated_bigrams, score
from metrics.io import CaptionFileError, load_predictions, load_references
from metrics.java import preflight
from metrics.tokenizer import tokenize

__all__ = [
    "CaptionFileError",
    "CiderD",
    "MismatchedImages",
    "ends_badly",
    "load_predictions",
    "load_references",
    "preflight",
    "repeated_bigrams",
    "score",
    "tokenize",
]
