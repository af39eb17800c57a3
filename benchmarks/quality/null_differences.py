"""How often evaluate.py --compare calls two systems different that are equal, before and after its tests were changed.

    python -m benchmarks.quality.null_differences [--trials 1000]

Pairs: differences of one score at 20, 50 and 200 images, normal and skewed (exponential), whose mean is 0. Groups of 2, 3 and
5 runs, whose captions vary by chance, at 20 and 200 images: once what seeds change is large, once each group has images of its
own that it describes better. "before" are the tests until then: the share of plain resamples of the
images, and of each group's runs, that lie as far from their mean. p < 0.05 should be found in 5 % of trials.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import RESULTS, write_result
from metrics.coco_caption.coco import resampled_sums
from reports.significance import group_test, paired_tests

RESAMPLES = 1000
RUNS, IMAGES = (2, 3, 5), (20, 50, 200)
NOISE = {"normal": lambda g, *size: g.normal(size=size), "skewed": lambda g, *size: g.exponential(size=size) - 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--output", default=str(RESULTS / "null_differences.json"))
    arguments = parser.parse_args()
    begin = time.perf_counter()
    pairs = {
        f"{images} images, {kind}": rates(
            arguments.trials,
            lambda generator, images=images, kind=kind: NOISE[kind](generator, images),
            {"before": plain_bootstrap, "after": lambda d: paired_tests({"": (d.mean(), d)}, RESAMPLES, 0)[""]["p"]},
        )
        for images in IMAGES
        for kind in NOISE
    }
    groups = {
        f"{runs} runs, {images} images, {kind}, {name}": rates(
            arguments.trials,
            lambda generator, runs=runs, images=images, kind=kind, spread=spread: [
                runs_of_a_group(generator, runs, images, NOISE[kind], *spread) for _ in range(2)
            ],
            {"before": bootstrap_of_runs, "after": lambda g: group_test(tuple(g), tuple(x.mean(1) for x in g))["p"]},
        )
        for name, spread in (("seeds differ", (0.5, 0.0)), ("images of their own", (0.1, 0.5)))
        for kind in NOISE
        for images in (20, 200)
        for runs in RUNS
    }
    result = {
        "trials": arguments.trials,
        "resamples": RESAMPLES,
        "share_of_p_below_0.05": {"pairs": pairs, "groups": groups},
    }
    write_result(Path(arguments.output), result | {"seconds": round(time.perf_counter() - begin)})


def rates(trials: int, draw: Callable, tests: dict[str, Callable]) -> dict[str, float]:
    found = dict.fromkeys(tests, 0)
    for trial in range(trials):
        drawn = draw(np.random.default_rng(trial))
        for name, test in tests.items():
            found[name] += test(drawn) < 0.05
    shares = {name: round(float(count) / trials, 3) for name, count in found.items()}
    print(shares, flush=True)
    return shares


def runs_of_a_group(generator, runs: int, images: int, noise: Callable, seeds: float, own: float) -> np.ndarray:
    """(runs, images): chance of each caption, and standard deviations of what seeds change and of the group's own images."""
    chance, of_images = noise(generator, runs, images), noise(generator, images)
    return chance + seeds * generator.normal(size=(runs, 1)) + own * of_images


def plain_bootstrap(differences: np.ndarray) -> float:
    means = resampled_sums(differences[:, None], RESAMPLES, 0)[:, 0] / len(differences)
    return share(means, differences.mean())


def bootstrap_of_runs(groups: list[np.ndarray]) -> float:
    means = []
    for number, values in enumerate(groups):
        of_runs = resampled_sums(values.T, RESAMPLES, 0) / values.shape[1]
        drawn = np.random.default_rng([0, number]).integers(0, len(values), (RESAMPLES, len(values)))
        means.append(np.take_along_axis(of_runs, drawn, axis=1).mean(axis=1))
    return share(means[1] - means[0], groups[1].mean() - groups[0].mean())


def share(resampled: np.ndarray, difference: float) -> float:
    return float(((np.abs(resampled - resampled.mean()) >= abs(difference)).sum() + 1) / (len(resampled) + 1))


if __name__ == "__main__":
    main()
