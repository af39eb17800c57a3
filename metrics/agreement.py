"""How far scores of captions agree with people: Kendall's tau-b and tau-c with ratings, accuracy on pairs, each with a
95 % bootstrap interval over images.

A resample gives every image a number of copies, all of whose judgments count that often. Tau is computed from the numbers
of copies, so that a thousand resamples of 17,000 judgments take seconds; its values are those of the definition (Kendall
1945 for ties, tau-b; Stuart 1953, tau-c).
"""

from collections.abc import Iterator

import numpy as np

_CELLS = 4_000_000  # of the tables of some resamples at a time: 32 MB


class Kendall:
    """Kendall's tau of values `x` and `y` of the same judgments, (n,) each, for any numbers of copies of each judgment."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
        # Two judgments differ in y by the highest bit in which their ranks differ: those with equal higher bits form
        # groups, and in each the ones are above the zeros. Within a group in the order of x, what lies before the
        # first judgment with the same x has a lower x.
        by_x = np.argsort(self.x, kind="stable")
        self.levels = []
        for bit in range(int(self.y.max()).bit_length() if len(self.y) else 0):
            group = (self.y >> (bit + 1))[by_x]
            order = by_x[np.argsort(group, kind="stable")]
            group, value = self.y[order] >> (bit + 1), self.x[order]
            self.levels.append((order, (self.y[order] >> bit & 1).astype(bool), _starts(group), _starts(group, value)))

    def tau(self, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tau-b, tau-c), (resamples,) each, for (resamples, n) numbers of copies; NaN where all are tied."""
        difference = np.zeros(len(copies))  # of concordant and discordant pairs
        for order, above, group, ties in self.levels:
            of_order = copies[:, order]
            for side, sign in ((~above, 1), (above, -1)):
                before = np.zeros((len(copies), len(order) + 1))
                np.cumsum(np.where(side, of_order, 0), axis=1, out=before[:, 1:])
                lower = before[:, ties] - before[:, group]
                difference += sign * np.einsum("bn,bn->b", lower, np.where(side, 0, of_order))
        total = copies.sum(axis=1)
        pairs = total * (total - 1) / 2
        sizes = [_sizes(values, copies) for values in (self.x, self.y)]
        untied = [pairs - (size * (size - 1) / 2).sum(axis=1) for size in sizes]
        classes = np.minimum(*((size > 0).sum(axis=1) for size in sizes))
        with np.errstate(divide="ignore", invalid="ignore"):
            tau_b = difference / np.sqrt(untied[0] * untied[1])
            tau_c = 2 * difference * classes / (total**2 * (classes - 1))
        return tau_b, tau_c


def _starts(*keys: np.ndarray) -> np.ndarray:
    """For each place of sorted keys, the first place with the same ones."""
    new = np.ones(len(keys[0]), dtype=bool)
    new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _sizes(ranks: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(resamples, ranks): copies of the judgments of each rank."""
    order = np.argsort(ranks, kind="stable")
    return np.add.reduceat(copies[:, order], np.unique(ranks[order], return_index=True)[1], axis=1)


def agreement_with_ratings(
    scores: np.ndarray, ratings: np.ndarray, images: np.ndarray, samples: int, seed: int
) -> dict:
    """{"tau_b", "tau_c": {"value", "interval"}, "judgments"} of scores, NaN where there is none, with ratings of the same
    judgments. `images`: the number of each judgment's image."""
    scored = ~np.isnan(scores)
    scores, ratings, images = scores[scored], ratings[scored], images[scored]
    kendall = Kendall(scores, ratings)
    values = kendall.tau(np.ones((1, len(scores))))
    resampled = [kendall.tau(copies) for copies in _resamples(images, samples, seed)]
    result: dict = {"judgments": len(scores)}
    for place, name in enumerate(("tau_b", "tau_c")):
        result[name] = _with_interval(values[place][0], [of_some[place] for of_some in resampled])
    return result


def accuracy_on_pairs(
    first: np.ndarray, second: np.ndarray, preferred: np.ndarray, images: np.ndarray, samples: int, seed: int
) -> dict:
    """{"value", "interval", "pairs", "ties"}: the share of pairs in which the caption that people prefer has the higher
    score; two equal scores count as half right, as a coin would decide them. `preferred`: 1 for the first, -1 for the
    second, 0 where people have no preference: such pairs, and those without scores, are left out."""
    decided = (preferred != 0) & ~np.isnan(first) & ~np.isnan(second)
    right = (1 + np.sign(first - second)[decided] * preferred[decided]) / 2
    images, result = images[decided], {"pairs": int(decided.sum()), "ties": int((right == 0.5).sum())}
    if not len(right):
        return {"value": None, "interval": None, **result}
    resampled = [copies @ right / copies.sum(axis=1) for copies in _resamples(images, samples, seed)]
    return _with_interval(right.mean(), resampled) | result


def pairs_of_ratings(captions: np.ndarray, ratings: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((pairs, 2) numbers of captions of one image, (pairs,) 1 or -1): which of the two people rate higher on average,
    without those that they rate the same. All arguments: (judgments,)."""
    means = np.bincount(captions, ratings) / np.maximum(np.bincount(captions), 1)
    of_image: dict[int, dict] = {}
    for caption, image in zip(captions.tolist(), images.tolist(), strict=True):
        of_image.setdefault(image, {})[caption] = None
    pairs = [(a, b) for group in of_image.values() for n, a in enumerate(group) for b in list(group)[n + 1 :]]
    table = np.array(pairs, dtype=int).reshape(-1, 2)
    signs = np.sign(means[table[:, 0]] - means[table[:, 1]])
    return table[signs != 0], signs[signs != 0]


def _resamples(images: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """(some resamples, judgments) numbers of copies of each judgment: those of its image, drawn with replacement."""
    names, number = np.unique(images, return_inverse=True)
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // max(1, len(images)))
    for begin in range(0, samples, block):
        rows = min(block, samples - begin)
        drawn = generator.integers(0, len(names), (rows, len(names))) + np.arange(rows)[:, None] * len(names)
        yield np.bincount(drawn.ravel(), minlength=rows * len(names)).reshape(rows, -1)[:, number].astype(float)


def _with_interval(value: float, resampled: list[np.ndarray]) -> dict:
    """JSON has no NaN: a tau of values that are all tied is None."""
    values = np.concatenate(resampled) if resampled else np.zeros(0)
    values = values[~np.isnan(values)]
    interval = np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None
    return {"value": None if np.isnan(value) else float(value), "interval": interval}
