"""Laws of comparing runs and settings."""

import csv
import io
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
from reports.significance import group_test, p_in_words, paired_tests, pseudo_values, student_p
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


def test_p_is_a_share_that_is_never_0():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    for samples in (100, 999):
        for difference in (0.0, 0.3, 5.0, 1e9):
            test = paired_tests({"x": (difference, values - values.mean() + difference)}, samples, 0)["x"]
            assert 1 / (samples + 1) <= test["p"] <= 1
            assert test["p"] * (samples + 1) == pytest.approx(round(test["p"] * (samples + 1)))


def rejected(test, trials: int) -> float:
    return sum(test(np.random.default_rng(trial)) < 0.05 for trial in range(trials)) / trials


@pytest.mark.parametrize("skewed", [False, True])
def test_without_a_difference_5_percent_of_pairs_are_called_different_at_20_images(skewed):
    """The whole simulation: benchmarks.quality.null_differences. Of 400 trials 9.4 % is four standard errors away."""

    def p(generator):
        values = generator.exponential(size=20) - 1 if skewed else generator.normal(size=20)
        return paired_tests({"x": (values.mean(), values)}, 199, 0)["x"]["p"]

    assert rejected(p, 200) < 0.114


@pytest.mark.parametrize(("runs", "images_differ"), [(2, 0.0), (3, 0.3), (5, 0.3)])
def test_without_a_difference_5_percent_of_groups_are_called_different(runs, images_differ):
    def p(generator):
        groups = [
            generator.normal(size=(runs, 40)) + 0.2 * generator.normal(size=(runs, 1)) + images_differ * generator.normal(size=40)
            for _ in range(2)
        ]  # fmt: skip
        return group_test(tuple(groups), tuple(group.mean(axis=1) for group in groups))["p"]

    assert rejected(p, 200) < 0.11


def test_groups_that_differ_are_told_apart_and_too_few_runs_or_images_have_no_p():
    generator = np.random.default_rng(0)
    low, high = generator.normal(size=(3, 50)), generator.normal(size=(4, 50)) + 2
    test = group_test((low, high), (low.mean(axis=1), high.mean(axis=1)))
    assert test["p"] < 0.001
    assert test["interval"][0] < test["difference"] < test["interval"][1]
    for few in ((low[:1], high[:1]), (low[:, :9], high[:, :9])):
        assert group_test(few, tuple(group.mean(axis=1) for group in few))["p"] is None
    assert group_test((low[:1], high), (low[:1].mean(axis=1), high.mean(axis=1)))["p"] < 0.05
    assert paired_tests({"x": (1.0, np.arange(9.0))}, 100, 0)["x"] == {"difference": 1.0, "interval": None, "p": None}


def test_tables_have_the_scores_that_are_named_in_their_order_and_the_best_in_bold(references, tmp_path):
    for name, keep in (("low", 0.1), ("high", 0.95)):
        write_run(tmp_path / name, references, len(name), keep)
    found = comparison.compare(comparison.read_runs([str(tmp_path / "low"), str(tmp_path / "high")]), 1000, 0)
    lines = comparison.summary(found).splitlines()[1:]
    labels = ["CIDEr", "BLEU-4", "ROUGE-L", "sacreBLEU", "BLEU-1", "BLEU-2", "BLEU-3"]
    assert [line.split()[0] for line in lines] == labels
    assert all("  p < 0.001  better" in line for line in lines)
    chosen = comparison.summary(found, ["BLEU-4", "CIDEr"]).splitlines()[1:]
    assert [line.split()[0] for line in chosen] == ["BLEU-4", "CIDEr"]
    tables = comparison.tables(found, ["BLEU-4", "CIDEr", "sacrebleu"])
    head, _, low, high, _, note = tables["comparison.md"].splitlines()
    assert head == "| | BLEU-4 | CIDEr | sacreBLEU |"
    assert "**" not in low
    assert high.count("**") == 6
    assert note == "60 images; bold: the best; *: differs from low, p < 0.05"
    assert comparison.tables(found)["comparison.md"].startswith(f"| | {' | '.join(labels)} |")
    rows = list(csv.DictReader(io.StringIO(tables["comparison.csv"])))
    assert [row["score"] for row in rows] == 2 * ["Bleu_4", "CIDEr", "sacrebleu"]
    with pytest.raises(ValueError, match=r"compare_scores: not every run has SPICE. All have: CIDEr, BLEU-4, ROUGE-L"):
        comparison.tables(found, ["SPICE"])
    assert [p_in_words(p) for p in (None, 0.0, 0.00099, 0.001, 0.0496)] == [
        "no p",
        "p < 0.001",
        "p < 0.001",
        "p 0.001",
        "p 0.050",
    ]


def test_the_scores_of_each_image_are_a_table(references, tmp_path):
    write_run(tmp_path / "one", references, 1, 0.6)
    with open(tmp_path / "one/per_image.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = comparison.read_run(str(tmp_path / "one"))["rows"]
    assert list(table[0]) == [
        "image_id",
        "caption",
        "references",
        "CIDEr",
        "Bleu_4",
        "ROUGE_L",
        "Bleu_1",
        "Bleu_2",
        "Bleu_3",
    ]
    for line, row in zip(table, rows, strict=True):
        assert [line[name] for name in ("image_id", "caption")] == [row["image_id"], row["caption"]]
        assert line["references"].split(" | ") == row["references"]
        assert {name: float(line[name]) for name in row["scores"]} == row["scores"]


def test_p_of_students_t_is_the_published():
    for t, freedom, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (2.228, 10, 0.05), (3.250, 9, 0.01), (1.96, 1e6, 0.05)):
        assert student_p(t, freedom) == pytest.approx(p, abs=1e-4)


def test_pseudo_values_have_the_score_as_their_mean(references, tmp_path):
    write_run(tmp_path / "one", references, 1, 0.6)
    table = comparison.statistics(comparison.read_run(str(tmp_path / "one"))["rows"])
    whole = comparison.corpus_scores(table)
    values = pseudo_values(table)
    assert values.keys() == whole.keys()
    assert values["CIDEr"] == pytest.approx(table["CIDEr"])
    without_first = comparison.corpus_scores({name: of_one[1:] for name, of_one in table.items()})
    for metric, of_images in values.items():
        assert of_images[0] == pytest.approx(60 * whole[metric] - 59 * without_first[metric]), metric
        assert of_images.mean() == pytest.approx(whole[metric], rel=0.05), metric


def test_the_best_setting_is_the_best_in_each_scores_own_direction(references, tmp_path):
    instances = {
        "images": [{"id": n, "file_name": image} for n, image in enumerate(references)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}],
        "annotations": [{"image_id": n, "category_id": 1 + n % 2} for n in range(len(references))],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    flags = MetricArguments(
        meteor=False, spice="false", bootstrap_samples=100, instances=str(tmp_path / "instances.json")
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
        best = sweep["settings"].pop(sweep["best"])
        assert best["p"] is None
        assert all(0 < row["p"] <= 1 for row in sweep["settings"])
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


@pytest.mark.parametrize(("images", "differ", "has_p"), [(12, 1, False), (30, 2, False), (30, 4, True), (12, 12, True)])
def test_where_resamples_have_no_spread_there_is_no_p_and_no_endless_interval(images, differ, has_p):
    values = np.zeros(images)
    values[:differ] = 0.3 if differ == images else np.linspace(0.2, 0.5, differ)
    test = paired_tests({"CIDEr": (values.mean(), values)}, 1000, 0)["CIDEr"]
    assert (test["p"] is not None) == (test["interval"] is not None) == has_p
    if has_p:
        low, high = test["interval"]
        assert -1 < low <= values.mean() <= high < 1
        assert (test["p"] < 0.002) == (differ == images)
