"""docs/scores.md: every formula, run from its text on an example, gives what the code gives."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from sacrebleu.metrics import BLEU
from test_judges import ANSWERS

from drawn_scenes.facts import score_scene_facts
from metrics import score, tokenize
from metrics.chair import chair_scores, objects_of
from metrics.clip_scores import ClipScorer
from metrics.coco_caption.java import meteor_from_statistics
from metrics.judges import clair_score
from metrics.names import SCORES

TEXT = (ROOT / "docs/scores.md").read_text(encoding="utf-8")
PREDICTIONS = {
    "1": "a man riding a brown horse on a beach", "2": "two dogs run in the deep snow", "3": "a table with a plate of food",
    "4": "the red bus on the street",
}  # fmt: skip
REFERENCES = {
    "1": ["a man rides a horse", "the man is riding a brown horse on the beach", "a person on a horse"],
    "2": ["two dogs play in the snow", "dogs running through the deep snow"],
    "3": ["a plate of food on a wooden table"],
    "4": ["a red bus drives down the street", "a bus on the street of a city", "red bus", "the bus is red"],
}


@pytest.fixture(scope="module")
def formula():
    names = {"Counter": Counter, "exp": math.exp, "log": math.log, "sqrt": math.sqrt}
    names |= {"loads": json.loads, "split": re.split, "findall": re.findall}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def code():
    return score(PREDICTIONS, REFERENCES, meteor=False, spice=False, bootstrap_samples=0)


@pytest.fixture(scope="module")
def example():
    return tokenize(PREDICTIONS.values()), [tokenize(captions) for captions in REFERENCES.values()]


def test_every_score_has_its_paragraph():
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert {one.label for one in SCORES.values()} <= set(headings)
    assert [
        one.anchor for one in SCORES.values() if one.anchor not in [h.lower().replace(" ", "-") for h in headings]
    ] == []


def test_ngram_scores(formula, code, example):
    scores, per_image = code
    assert formula["bleu"](*example) == pytest.approx([scores[f"Bleu_{n}"] for n in (1, 2, 3, 4)], abs=1e-9)
    assert formula["cider"](*example) == pytest.approx([row["CIDEr"] for row in per_image.values()], abs=1e-9)
    rouge = [formula["rouge_l"](*pair) for pair in zip(*example, strict=True)]
    assert rouge == pytest.approx([row["ROUGE_L"] for row in per_image.values()], abs=1e-9)


def test_clair_of_its_answers(formula):
    for answer, _ in ANSWERS:
        assert formula["clair"](answer) == clair_score(answer)


def test_sacrebleu_of_its_counts(formula):
    for captions in (["a dog runs over the green grass", "cats"], ["a dog here", "cats sit on a mat"]):
        found = BLEU(lowercase=True).corpus_score(captions, [["a dog runs over green grass", "cats sit on mats"]])
        assert formula["sacrebleu"](found.counts, found.totals, found.sys_len, found.ref_len) == pytest.approx(
            found.score
        )


def test_meteor_of_its_counts(formula):
    generator = np.random.default_rng(3)
    matches = generator.integers(1, 4, (4, 2, 2)).astype(float)
    counts = np.zeros(23)
    counts[0:2], counts[2:4], counts[4:20], counts[20], counts[21:23] = [40, 45], [10, 12], matches.ravel(), 6, [20, 21]
    expected = meteor_from_statistics(counts)
    assert formula["meteor"](matches, counts[0:2], counts[2:4], 6, counts[21:23]) == pytest.approx(float(expected))


def test_spice_of_the_program_itself(formula, test_data):
    rows = json.loads((test_data / "coco_karpathy_test/spice.json").read_text())["human_200"]["per_image"]
    assert [formula["spice"](row["tp"], row["fp"], row["fn"]) for row in rows] == pytest.approx(
        [row["f"] for row in rows]
    )
    assert formula["spider"](1.2, 0.2) == pytest.approx(0.7)


def test_chair(formula):
    instances = {"1": {"dog"}, "3": {"pizza"}}
    scores, _ = chair_scores(PREDICTIONS, REFERENCES, instances)
    named = [objects_of(caption) for caption in PREDICTIONS.values()]
    there = [
        instances.get(image, set()) | {name for caption in captions for name in objects_of(caption)}
        for image, captions in REFERENCES.items()
    ]
    assert formula["chair"](named, there) == pytest.approx(
        (scores["CHAIRs"], scores["CHAIRi"], scores["object_recall"])
    )


def test_scene_facts(formula):
    """A true caption, one with a wrong colour, one that invents a red star (count, colour, shape) beside the true facts."""
    scene = {
        "objects": [
            {"count": 1, "size": "small", "colour": "blue", "shape": "circle"},
            {"count": 2, "size": "large", "colour": "green", "shape": "square"},
        ],
        "relations": [[0, "left of", 1]],
    }
    captions = {
        "1": "a small blue circle to the left of two large green squares",
        "2": "a small red circle to the left of two large green squares",
        "3": "a small blue circle to the left of two large green squares and a red star",
    }
    found = score_scene_facts(captions, dict.fromkeys(captions, scene))["scene_facts"]
    assert formula["scene_facts"]([9, 8, 9], [9, 9, 9], [0, 0, 3]) == pytest.approx(found)


def test_clip_scores(formula):
    """The code on unit vectors in place of encoded images and texts."""
    vectors = {
        "picture": [1.0, 0.0],
        "caption": [0.3, 0.91**0.5],
        "same": [0.6, 0.8],
        "other": [-0.6, 0.8],
        "bad": [-0.6, 0.8],
    }
    features = {name: torch.tensor(vector) for name, vector in vectors.items()}

    class Given(ClipScorer):
        def __init__(self, metric):
            self.weight = {"clip-s": 2.5, "pac-s": 2.0}[metric]
            self._images, self._references = features, {}
            self.size, self.mean, self.std = 1, (0,), (1,)

        def text_features(self, texts):
            return torch.stack([features[text] for text in texts])

    for metric, factor in (("clip-s", 2.5), ("pac-s", 2.0)):
        for caption in ("caption", "bad"):
            score, with_references = Given(metric).score(["picture"], None, [caption], [["same", "other"]], prefix="")
            cosine = float(features["picture"] @ features[caption])
            nearest = [float(features[caption] @ features[name]) for name in ("same", "other")]
            assert score[0] == pytest.approx(formula["clip_s"](cosine, factor=factor), abs=1e-6)
            assert with_references[0] == pytest.approx(formula["clip_s"](cosine, nearest, factor), abs=1e-6)


def test_the_report_has_the_paragraph_of_every_score():
    from reports.report import _explanations

    found = _explanations()
    assert {one.label for one in SCORES.values()} <= set(found)
    assert found["CHAIRi"].startswith("Share of the named objects")
    assert "def " not in " ".join(found.values())
