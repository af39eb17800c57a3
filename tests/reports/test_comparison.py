"""Laws of comparing runs and settings."""

import json
import random

import datasets
import numpy as np
import pytest

import metrics
from arguments import MetricArguments
from metrics.names import SCORES, is_better_low
from reports import comparison
from reports.outputs import score_captions, write_scores
from reports.sweep import score_sweep

WORDS = ["a", "dog", "runs", "on", "the", "grass", "red", "ball", "man", "near", "water", "two"]
QUICK = MetricArguments(meteor=False, spice="false", bootstrap_samples=0)


def caption(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


@pytest.fixture(scope="module")
def references():
    rng = random.Random(0)
    return {f"{n}.jpg": [caption(rng) for _ in range(3)] for n in range(60)}


def write_run(folder, references, seed: int, keep: float) -> None:
    """A run whose captions are its references', each word kept with this probability."""
    rng = random.Random(seed)
    predictions = {
        image: " ".join(word if rng.random() < keep else rng.choice(WORDS) for word in texts[0].split())
        for image, texts in references.items()
    }
    folder.mkdir()
    scores, rows = score_captions(predictions, references, QUICK, 0)
    write_scores(folder, scores, rows)


def compared(*folders):
    return comparison.compare(comparison.read_runs([str(folder) for folder in folders]), 200, 0)["differences"]


def test_differences_do_not_depend_on_the_order_of_either_runs_rows(references, tmp_path):
    for name, keep in (("one", 0.5), ("other", 0.7)):
        write_run(tmp_path / name, references, len(name), keep)
    folders = tmp_path / "one", tmp_path / "other"
    expected = compared(*folders)
    for number, folder in enumerate(folders[::-1]):
        lines = (folder / "per_image.jsonl").read_text().splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        (folder / "per_image.jsonl").write_text("".join(lines))
        differences = compared(*folders)
        for name, tests in expected.items():
            for metric, test in tests.items():
                again = differences[name][metric]
                assert again["difference"] == pytest.approx(test["difference"], abs=1e-9), metric
                # The first run's order decides which images a resample draws.
                assert again["p"] == pytest.approx(test["p"], abs=0.05 if number else 1e-9), metric


def test_p_is_a_share_that_is_never_0(references, tmp_path):
    rng = np.random.default_rng(0)
    for samples in (1, 99, 1000):
        resampled = rng.normal(size=samples)
        for difference in (0.0, 0.3, 5.0, 1e9):
            p = comparison.difference_of(difference, resampled)["p"]
            as_far = (np.abs(resampled - resampled.mean()) >= difference).sum()
            assert p == pytest.approx((as_far + 1) / (samples + 1))
            assert 1 / (samples + 1) <= p <= 1


def test_the_best_setting_is_the_best_in_each_scores_own_direction(references, tmp_path):
    instances = {
        "images": [{"id": n, "file_name": image} for n, image in enumerate(references)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}],
        "annotations": [{"image_id": n, "category_id": 1 + n % 2} for n in range(len(references))],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    flags = MetricArguments(
        meteor=False, spice="false", bootstrap_samples=0, instances=str(tmp_path / "instances.json")
    )
    captions = []
    for seed, keep in ((1, 0.2), (2, 0.9), (3, 0.5)):
        rng = random.Random(seed)
        captions.append(
            {
                image: " ".join(word if rng.random() < keep else rng.choice(WORDS) for word in texts[0].split())
                for image, texts in references.items()
            }
        )
    records = datasets.Dataset.from_dict({"image_id": list(references), "captions": list(references.values())})
    directions = {False: max, True: min}
    for metric in ("CIDEr", "Bleu_4", "CHAIRs", "CHAIRi", "object_recall"):
        sweep = score_sweep([{"num_beams": n} for n in (1, 2, 3)], captions, records, metric, flags, 0)
        values = [row["scores"][metric] for row in sweep["settings"]]
        assert len(set(values)) > 1
        assert values[sweep["best"]] == directions[is_better_low(metric)](values), metric
        ranked = [row["scores"][metric] for row in sorted(sweep["settings"], key=lambda row: row["rank"])]
        assert ranked == sorted(values, reverse=not is_better_low(metric)), metric
    assert [name for name in SCORES if is_better_low(name)] == ["CHAIRs", "CHAIRi"]


def test_spider_of_an_image_is_the_mean_of_its_own_two(references, monkeypatch):
    from metrics.coco_caption import coco

    def spice(hypotheses, references, **_):  # a different value for each image
        return [
            {
                "f": (sum(map(len, words)) % 97) / 97,
                "categories": dict.fromkeys(coco.CATEGORIES),
                **{name: [] for name in ("matched", "wrong", "missed")},
            }
            for words in hypotheses
        ]

    monkeypatch.setattr(coco, "spice_of_images", spice)
    rng = random.Random(4)
    predictions = {image: texts[0] if rng.random() < 0.5 else caption(rng) for image, texts in references.items()}
    scores, rows = metrics.score(predictions, references, meteor=False, spice_samples=20, bootstrap_samples=0)
    sampled = [row for row in rows.values() if "SPICE" in row]
    assert len(sampled) == 20
    for row in sampled:
        assert row["SPIDEr"] == pytest.approx((row["SPICE"] + row["CIDEr"]) / 2)
    assert len({row["SPIDEr"] for row in sampled}) > 10
    assert scores["SPIDEr"] == pytest.approx(np.mean([row["SPIDEr"] for row in sampled]))
