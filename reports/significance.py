"""Tests of differences that hold their level where there is none: on few images, with skewed scores, with few seeds.

A score of a corpus is handled as a mean over its images: of the values themselves where it is one (CIDEr, SPICE), else of
their jackknife pseudo-values, n times the score less n - 1 times that of the other images (Efron and Tibshirani, "An
Introduction to the Bootstrap", chapter 11). benchmarks.quality.null_differences simulates the levels.
"""

import math

import numpy as np

from metrics.coco_caption.coco import resampled_sums, scores_of_sums

SMALLEST = 0.001  # a smaller p is not printed as a number: resamples cannot tell it
FEWEST_IMAGES = 10  # below, the spread of so few differences says too little for a p
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def p_in_words(p: float | None) -> str:
    if p is None:
        return "no p"
    return f"p < {SMALLEST}" if p < SMALLEST else f"p {p:.3f}"


def pseudo_values(statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{metric: (images,)}: values whose mean is the score, NaN where an image has none; `statistics` as for
    metrics.coco_caption.coco.resampled_scores."""
    values = {}
    for name, table in statistics.items():
        table = table.reshape(len(table), -1)
        scored = ~np.isnan(table[:, 0])
        rows, number = table[scored], int(scored.sum())
        total = rows.sum(axis=0, keepdims=True)
        without = scores_of_sums(name, total - rows, max(1, number - 1))
        for metric, whole in scores_of_sums(name, total, number).items():
            values[metric] = np.full(len(table), np.nan)
            values[metric][scored] = number * whole - (number - 1) * without[metric]
    return values


def paired_tests(differences: dict[str, tuple[float, np.ndarray]], samples: int, seed: int) -> dict[str, dict]:
    """{metric: {"difference", "interval", "p"}} of {metric: (difference, (images,) differences of its pseudo-values)}.

    The bootstrap-t of the mean (Efron and Tibshirani, chapters 12 and 16): how often a resample of the images deviates
    from all of them, measured in its own standard error, as far as the difference does from 0. Its level holds at 20
    images and with skewed scores, where the plain bootstrap finds differences twice as often as it should. p and interval
    are None below FEWEST_IMAGES images, and where so few of them differ that more than 5 % of the resamples have none.
    """
    tests, tables = {}, {}
    for metric, (difference, values) in differences.items():
        values = values[~np.isnan(values)]
        tests[metric] = {"difference": float(difference), "interval": None, "p": None}
        if not np.any(values):
            tests[metric] |= {"interval": [0.0, 0.0], "p": 1.0}
        elif len(values) >= FEWEST_IMAGES and np.ptp(values) < 1e-9 * abs(values[0]):  # all images differ alike
            tests[metric] |= {"interval": [float(difference)] * 2, "p": 1 / (samples + 1)}
        elif len(values) >= FEWEST_IMAGES:
            tables.setdefault(len(values), {})[metric] = values - values.mean()
    for images, table in tables.items():
        centred = np.stack(list(table.values()), axis=1)
        sums = resampled_sums(np.concatenate([centred, centred**2], axis=1), samples, seed) / images
        means, squares = np.split(sums, 2, axis=1)
        variances = squares - means**2
        variances[variances < 1e-9 * (centred**2).mean(axis=0)] = 0.0  # of equal values: what is there is rounding
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations = np.nan_to_num(np.abs(means) / np.sqrt(variances), posinf=np.inf)
        spread = centred.std(axis=0)  # of the resamples' kind: divided by n, as theirs are
        for place, metric in enumerate(table):
            test = tests[metric]
            reach = np.percentile(deviations[:, place], 95, method="higher") * spread[place]
            if np.isfinite(reach):  # else so few images differ that many a resample has none of them
                test["interval"] = [test["difference"] - reach, test["difference"] + reach]
                as_far = (deviations[:, place] * spread[place] >= abs(test["difference"])).sum()
                test["p"] = float((as_far + 1) / (samples + 1))
    return tests


def group_test(groups: tuple[np.ndarray, np.ndarray], means: tuple[np.ndarray, np.ndarray]) -> dict:
    """{"difference", "interval", "p"} of the mean of the second group of runs above that of the first.

    The variance of the difference has two parts: that of the runs' scores within the groups, which is what other seeds
    change; and what other images change for all runs of a group alike, estimated from the images' mean differences less
    what their runs' own scatter explains. The tails of both parts' t distributions are weighted by them, much as in
    Cochran and Cox's test ("Experimental Designs", section 4.14). Seeds are taken to vary alike in both groups; if these have different numbers of runs, each
    has a part of its own. p and interval are None where neither group has two runs.

    Args:
        groups: (runs, images) pseudo-values of each group, all of the same images; means: (runs,) scores of each group.
    """
    difference = float(means[1].mean() - means[0].mean())
    runs = [len(group) for group in groups]
    images = groups[0].shape[1]
    if max(runs) < 2 or images < FEWEST_IMAGES:
        return {"difference": difference, "interval": None, "p": None}
    squares = [((values - values.mean()) ** 2).sum() for values in means]
    if min(runs) == max(runs) or min(runs) == 1:
        pooled = sum(squares) / (sum(runs) - 2)
        parts = [(pooled * sum(1 / number for number in runs), sum(runs) - 2)]
    else:
        parts = [(square / (number - 1) / number, number - 1) for square, number in zip(squares, runs, strict=True)]
    of_images = (groups[1].mean(axis=0) - groups[0].mean(axis=0)).var(ddof=1) / images
    scatter = sum(((g - g.mean(0) - g.mean(1, keepdims=True) + g.mean()) ** 2).sum() for g in groups)
    scatter /= (sum(runs) - 2) * (images - 1) * images
    parts.append((max(0.0, of_images - scatter * sum(1 / number for number in runs)), images - 1))
    variance = float(sum(part for part, _ in parts))
    if not variance:  # seeds with equal scores: all of the images' spread counts
        parts, variance = [(of_images, images - 1)], float(of_images)
    if not variance:  # all images differ alike
        return {"difference": difference, "interval": None, "p": None if difference else 1.0}
    error = math.sqrt(variance)

    def p(deviation: float) -> float:
        return float(sum(part * student_p(deviation / error, freedom) for part, freedom in parts)) / variance

    low, high = 0.0, error
    while p(high) > 0.05:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p(middle) > 0.05 else (low, middle)
    return {"difference": difference, "interval": [difference - high, difference + high], "p": p(abs(difference))}


def student_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t."""
    begin, end = math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2
    angles = begin + (end - begin) * (_NODES + 1) / 2
    area = (end - begin) / 2 * float(_WEIGHTS @ np.cos(angles) ** (freedom - 1))
    return 2 * area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
