"""CHAIR: equal to what the published implementation gives for 5,000 captions, and to its rules on words."""

import json

import pytest

from data.caption_files import load_predictions, load_references
from metrics.chair import CATEGORIES, chair_scores, objects_of, read_instances


def test_every_image_as_in_the_published_implementation(test_data):
    folder = test_data / "coco_karpathy_test"
    predictions = load_predictions(folder / "predictions_contrastive.json")
    references = load_references(folder / "captions_karpathy_test.json")
    scores, found = chair_scores(predictions, references, read_instances(folder / "instances_karpathy_test.json"))
    published = json.loads((folder / "chair.json").read_text(encoding="utf-8"))
    assert {name: scores[name] for name in ("CHAIRs", "CHAIRi")} == {
        name: published[name] for name in ("CHAIRs", "CHAIRi")
    }
    assert scores["object_recall"] == published["recall"]
    for row in published["per_image"]:
        ours = found[str(row["image_id"])]
        assert ours["objects"] == sorted(row["objects"]), row
        assert ours["hallucinated"] == sorted(row["hallucinated"]), row


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and a woman.", ["person", "person"]),
        ("one bus", []),  # pattern.en makes it "bu"
        ("three buses", ["bus"]),
        ("a baby elephant near an adult zebra", ["elephant", "zebra"]),
        ("a baby in a passenger train", ["person", "train"]),
        ("the toilet seat is up", ["toilet"]),
        ("the seat of a toilet", ["toilet"]),
        ("a chair, its seat", ["chair", "chair"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("two ties", []),  # "ty"
        ("a wine glass and wine glasses", ["wine glass", "wine glass"]),
        ("a motor bike", []),  # the published list has " motor bike", with a blank that no caption has
        ("a cheesecake", []),
        ("hot dogs.a dog", ["dog"]),  # one word to the tokenizer: a full stop ends a sentence before a blank only
        ("it says 'hot dogs' on the bench. a dog's ball", ["hot dog", "bench", "dog", "sports ball"]),
        ("knives and scissors", ["knife", "scissors"]),
        ("", []),
    ],
)
def test_words_are_found_as_published(caption, objects):
    assert objects_of(caption) == objects


def test_every_name_of_a_category_is_that_category():
    assert len(CATEGORIES) == 80
    unseen = {name for name in CATEGORIES if objects_of(f"the {name} here") != [name]}
    assert unseen == {"bus"}


def test_shares_are_of_words_and_of_captions():
    predictions = {"1": "a dog and a dog and a cat", "2": "nothing"}
    references = {"1": ["a dog"], "2": ["a car"]}
    scores, found = chair_scores(predictions, references, {"1": {"bench"}}, bootstrap_samples=50, seed=1)
    assert scores["CHAIRs"] == 1 / 2
    assert scores["CHAIRi"] == 1 / 3
    assert scores["object_recall"] == 1 / 3
    assert found["1"]["missed"] == ["bench"]
    assert set(scores["intervals"]) == {"CHAIRs", "CHAIRi", "object_recall"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"images": [], "annotations": []},
        {"images": [], "annotations": [], "categories": [{"id": 1, "name": "gnome"}]},
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json"):
        read_instances(path)
