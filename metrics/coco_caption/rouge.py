"""ROUGE-L as the COCO evaluation code computes it, for all images at once."""

import numpy as np

from .ngrams import encode

_BETA_SQUARED = 1.2**2


def _longest_common_subsequences(
    hypotheses: np.ndarray, references: np.ndarray, reference_lengths: np.ndarray
) -> np.ndarray:
    """Length of the longest common subsequence of each row pair of padded ids: (pairs, h), (pairs, r) to (pairs,).

    The usual table, one column per reference word, for all pairs together. `hypotheses` and `references` are padded
    with different numbers, and the rows come longest reference first, so that finished pairs drop out at the end.
    """
    pairs, width = hypotheses.shape
    lengths = np.zeros((pairs, width + 1), dtype=np.int32)
    for column in range(references.shape[1]):
        active = int(np.searchsorted(-reference_lengths, -column, side="left"))  # rows with more than `column` words
        previous = lengths[:active]
        equal = hypotheses[:active] == references[:active, column, None]
        grown = np.maximum(previous[:, 1:], (previous[:, :-1] + 1) * equal)
        lengths[:active, 1:] = np.maximum.accumulate(grown, axis=1)
    return lengths[:, -1]


def _padded(ids: np.ndarray, lengths: np.ndarray, padding: int) -> np.ndarray:
    table = np.full((len(lengths), int(lengths.max())), padding, dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = ids
    return table


def rouge_l(hypotheses: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """ROUGE-L of each image: (images,). The corpus score is the mean.

    F with beta 1.2 of the best precision and the best recall over the references, which may be two different ones, as
    in the COCO code.
    """
    images = len(hypotheses)
    counts = np.array([len(captions) for captions in references])
    image_of_pair = np.repeat(np.arange(images), counts)
    # An empty caption counts as one empty word there ("".split(" ")).
    hypothesis_ids, hypothesis_lengths, vocabulary = encode([tokens or [""] for tokens in hypotheses], {})
    reference_ids, reference_lengths, _ = encode(
        [tokens or [""] for captions in references for tokens in captions], vocabulary
    )
    hypothesis_table = _padded(hypothesis_ids, hypothesis_lengths, -1)
    order = np.argsort(-reference_lengths, kind="stable")
    reference_table = _padded(reference_ids, reference_lengths, -2)

    common = np.zeros(len(order))
    block = max(1, 8_000_000 // hypothesis_table.shape[1])  # some 100 MB
    for begin in range(0, len(order), block):
        rows = order[begin : begin + block]
        common[rows] = _longest_common_subsequences(
            hypothesis_table[image_of_pair[rows]],
            reference_table[rows, : reference_lengths[rows[0]]],
            reference_lengths[rows],
        )
    starts = np.cumsum(counts) - counts
    precision = np.maximum.reduceat(common / hypothesis_lengths[image_of_pair], starts)
    recall = np.maximum.reduceat(common / reference_lengths, starts)
    matched = common.astype(bool)
    scores = np.zeros(images)
    some = np.logical_or.reduceat(matched, starts)
    precision, recall = precision[some], recall[some]
    scores[some] = (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)
    return scores
