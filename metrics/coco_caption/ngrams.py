"""N-gram counts of many captions at once, as numpy arrays: what BLEU and CIDEr share."""

from collections.abc import Iterable, Iterator

import numpy as np


def words(captions: Iterable[list[str]]) -> list[list[str]]:
    """The words that BLEU and CIDEr count: pycocoevalcap splits there at any white space, also inside a token.

    It matters for the fractions and phone numbers that the tokenizer keeps whole: "5 1/2" with a no-break space is one
    token for ROUGE-L and two words for BLEU and CIDEr.
    """
    captions = list(captions)
    if len("".join([token for tokens in captions for token in tokens]).split()) <= 1:
        return captions  # no white space in any
    return [" ".join(tokens).split() for tokens in captions]


def encode(captions: list[list[str]], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Word ids of all captions one after the other, each caption's length, and the vocabulary of these ids: the given
    one, or a copy extended with new words, if there are any."""
    flat = [word for caption in captions for word in caption]
    try:
        ids = [vocabulary[word] for word in flat]
    except KeyError:
        vocabulary = dict(vocabulary)
        ids = [vocabulary.setdefault(word, len(vocabulary)) for word in flat]
    return np.array(ids, dtype=np.int64), np.array([len(caption) for caption in captions], dtype=np.int64), vocabulary


def ngram_counts(
    ids: np.ndarray, lengths: np.ndarray, vocabulary_size: int, orders: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For each order 1..`orders`, the distinct n-grams of each caption.

    Yields four aligned arrays, sorted by caption and then n-gram: the caption's index, a number that identifies the
    n-gram (equal numbers, equal n-grams, within one order), how often the caption has it, and where it first begins
    (an index into `ids`).
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    end = np.repeat(np.cumsum(lengths), lengths)
    start = np.arange(len(ids))
    gram = ids
    for order in range(1, orders + 1):
        if order > 1:  # an n-gram is an (n-1)-gram and one word more
            longer = start + order <= end[start]
            start, gram = start[longer], gram[longer]
            _, gram = np.unique(gram * vocabulary_size + ids[start + order - 1], return_inverse=True)
        grams = int(gram.max()) + 1 if len(gram) else 1
        key, first, count = np.unique(owner[start] * grams + gram, return_index=True, return_counts=True)
        yield key // grams, key % grams, count, start[first]


def find(sorted_keys: np.ndarray, keys: np.ndarray, bound: int | None = None) -> np.ndarray:
    """Where each key is in `sorted_keys`, -1 where it is not. All are below `bound`, if it is given."""
    if not len(sorted_keys):
        return np.full(len(keys), -1)
    if bound is not None and bound <= 1_000_000:  # a table of all possible keys is faster than a search
        table = np.full(bound, -1, dtype=np.int32)
        table[sorted_keys] = np.arange(len(sorted_keys), dtype=np.int32)
        return table[keys]
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, at, -1)
