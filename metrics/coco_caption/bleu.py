"""BLEU-1..4 as the COCO evaluation code computes it, for all images at once."""

import numpy as np

from .ngrams import encode, find, ngram_counts, words

# Columns of the statistics: hypothesis length, closest reference length, then matches and totals of orders 1..4.
_COLUMNS = 10


def bleu_statistics(hypotheses: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """Counts that BLEU is made of, one row per image: (images, 10). They add up over any set of images.

    `hypotheses[i]` are the tokens of image i's caption, `references[i]` those of its reference captions.
    """
    images = len(hypotheses)
    image_of_reference = np.repeat(np.arange(images), [len(captions) for captions in references])
    captions = words(hypotheses) + words(caption for captions in references for caption in captions)
    ids, lengths, vocabulary = encode(captions, {})
    statistics = np.zeros((images, _COLUMNS))

    statistics[:, 0] = lengths[:images]
    # The reference closest in length; of two equally close ones the shorter.
    reference_lengths = lengths[images:]
    distance = np.abs(reference_lengths - lengths[image_of_reference])
    order = np.lexsort((reference_lengths, distance, image_of_reference))
    first = np.searchsorted(image_of_reference[order], np.arange(images))
    statistics[:, 1] = reference_lengths[order][first]

    for n, (owner, gram, count, _) in enumerate(ngram_counts(ids, lengths, len(vocabulary))):
        statistics[:, 6 + n] = np.maximum(lengths[:images] - n, 0)
        if not len(gram):
            continue
        grams = int(gram.max()) + 1
        hypothesis = owner < images
        # For each image and n-gram, its highest count in any one reference.
        key = image_of_reference[owner[~hypothesis] - images] * grams + gram[~hypothesis]
        order = np.argsort(key, kind="stable")
        allowed_key, first = np.unique(key[order], return_index=True)
        allowed = np.maximum.reduceat(count[~hypothesis][order], first) if len(first) else np.zeros(0)
        at = find(allowed_key, owner[hypothesis] * grams + gram[hypothesis])
        matched = at >= 0
        matches = np.minimum(count[hypothesis][matched], allowed[at[matched]])
        statistics[:, 2 + n] = np.bincount(owner[hypothesis][matched], matches, minlength=images)
    return statistics


def bleu_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1..4 of each row of statistics: (..., 10) to (..., 4). Sum rows first for a corpus score.

    The two small constants are those of the COCO code (they keep empty captions from dividing by zero), needed for
    equal values.
    """
    tiny, small = 1e-15, 1e-9
    matches, totals = statistics[..., 2:6], statistics[..., 6:10]
    precisions = np.cumprod((matches + tiny) / (totals + small), axis=-1)
    scores = precisions ** (1.0 / np.arange(1, 5))
    ratio = (statistics[..., :1] + tiny) / (statistics[..., 1:2] + small)
    brevity_penalty = np.exp(np.minimum(1 - 1 / ratio, 0.0))
    return scores * brevity_penalty
