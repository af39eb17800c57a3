import functools
import hashlib
import io
import json
from itertools import combinations

import pytest
from PIL import Image

import data
from drawn_scenes import drawing as scenes
from drawn_scenes.facts import parse, scene_facts, score_scene_facts

DIGEST = "9c3c368671050025637b1f0ef2f899b30dc5b7ecb3ebf2c23dce0ae11d0fc698"

TWO_STARS_ABOVE_A_RING = {
    "objects": [
        {"count": 2, "size": "small", "colour": "red", "shape": "star"},
        {"count": 1, "size": "large", "colour": "blue", "shape": "ring"},
    ],
    "relations": [[0, "above", 1]],
}


@pytest.fixture(scope="module")
def dataset():
    return scenes.load(train=1500, validation=150, test=300)


def score(caption, facts=TWO_STARS_ABOVE_A_RING):
    true, total = scene_facts(caption, facts)
    return true.total(), total.total()


def pixels(value):
    return Image.open(io.BytesIO(value["bytes"])).tobytes()


def test_the_same_seed_draws_the_same_pixels_and_words_on_every_machine():
    # PNG bytes hang on the zlib at hand, pixels do not.
    found = hashlib.sha256()
    for row in scenes.load(train=20, validation=0, test=20)["test"]:
        found.update(pixels(row["image"]) + json.dumps([row["captions"], row["facts"]]).encode())
    assert found.hexdigest() == DIGEST


def test_a_scene_does_not_depend_on_the_size_of_its_split(dataset):
    few = scenes.load(train=3, validation=1, test=2)
    for split in few:
        assert few[split].to_list() == dataset[split].select(range(len(few[split]))).to_list()


def test_no_scene_is_said_to_be_in_two_splits(monkeypatch, caplog):
    monkeypatch.setattr(scenes, "load", functools.partial(scenes.load, train=200, validation=20, test=50))
    assert {name: len(rows) for name, rows in data.load("scenes").items()} == {
        "train": 200,
        "validation": 20,
        "test": 50,
    }
    assert "look the same" not in caplog.text


def test_another_seed_draws_other_scenes_with_the_same_pairs_held_out(dataset):
    other = scenes.load(train=600, validation=0, test=0, seed=1)
    assert not set(other["train"]["facts"][:50]) & set(dataset["train"]["facts"][:50])
    assert not pairs_of(other["train"]) & pairs_of(dataset["test"])


def pairs_of(split):
    """Every set of kinds (colour and shape) that a scene of the split shows together."""
    pairs = set()
    for facts in split["facts"]:
        kinds = [(group["colour"], group["shape"]) for group in json.loads(facts)["objects"]]
        pairs |= {frozenset(pair) for pair in combinations(kinds, 2)}
    return pairs


def test_combinations_of_one_split_never_occur_in_another(dataset):
    train, validation, test = (pairs_of(dataset[split]) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert all(len(pair) == 2 for pair in train | validation | test)


def test_every_kind_held_out_in_a_combination_occurs_in_training(dataset):
    assert frozenset().union(*pairs_of(dataset["test"])) <= frozenset().union(*pairs_of(dataset["train"]))
    assert len(frozenset().union(*pairs_of(dataset["train"]))) == len(scenes.COLOURS) * len(scenes.SHAPES)


def test_a_record_is_one_image_with_five_different_captions(dataset):
    row = dataset["train"][12]
    assert row["image_id"] == "scene-train-00012"
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (scenes.SIZE, scenes.SIZE)
    assert all(len(captions) == len(set(captions)) == 5 for split in dataset.values() for captions in split["captions"])


def test_the_picture_shows_as_many_objects_as_the_facts_say():
    for index in range(60):
        rng = scenes.random.Random(index)
        facts = scenes.make_facts("train", rng)
        taken = scenes.place(facts, rng)
        assert [len(slots) for slots in taken] == [group["count"] for group in facts["objects"]]
        assert len(set(taken[0] + taken[1])) == len(taken[0] + taken[1]), "two objects in one slot"
        (rows, columns), (other_rows, other_columns) = (tuple(zip(*slots, strict=True)) for slots in taken)
        holds = {
            "above": max(rows) < min(other_rows),
            "below": min(rows) > max(other_rows),
            "left of": max(columns) < min(other_columns),
            "right of": min(columns) > max(other_columns),
        }
        assert [relation for relation, true in holds.items() if true] == [facts["relations"][0][1]]


def test_silhouettes_differ_from_shape_to_shape_and_from_turn_to_turn():
    masks = {shape: scenes.silhouette(shape, 20, 0).tobytes() for shape in scenes.SHAPES}
    assert len(set(masks.values())) == len(scenes.SHAPES)
    assert scenes.silhouette("star", 20, 10).tobytes() != masks["star"]


def test_references_score_one():
    captions = {}
    for index in range(1500):
        rng = scenes.random.Random(index)
        facts = scenes.make_facts(("train", "validation", "test")[index % 3], rng)
        for number, caption in enumerate(scenes.describe(facts, rng)):
            assert score(caption, facts) == (9, 9), (caption, facts)
            captions[f"{index} {number}"] = caption, facts
    scores = score_scene_facts({k: v[0] for k, v in captions.items()}, {k: v[1] for k, v in captions.items()})
    assert scores == dict.fromkeys(("scene_facts", "count", "size", "colour", "shape", "relation"), 1.0)


@pytest.mark.parametrize(
    "caption",
    [
        "Two small red stars above a large blue ring",
        "a big blue hoop below a pair of tiny red stars",
        "There is a large ring in blue and, above it, two little red stars.",
        "A ring, large and blue, with two stars, small and red, over it",
        "under two small red stars floats one huge blue ring",
        "two small red stars at the top and a large blue ring at the bottom",
        "At the bottom lies a large blue ring, up top two small red stars",
        "a picture of two small red stars higher than a large blue ring",
        "two small red stars sit above the scene's only thing of size, a large blue ring",
    ],
)
def test_the_same_facts_in_other_words_and_order_are_as_true(caption):
    assert score(caption) == (9, 9)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two small green stars above a large blue ring", (8, 9)),  # wrong colour
        ("two small red hearts above a large blue ring", (8, 9)),  # wrong shape
        ("two large red stars above a large blue ring", (8, 9)),  # wrong size
        ("three small red stars above a large blue ring", (8, 9)),  # wrong count
        ("two small red stars below a large blue ring", (8, 9)),  # wrong relation
        ("a large blue ring above two small red stars", (8, 9)),  # the other order without the inverse
        ("two small red stars left of a large blue ring", (8, 9)),
        ("two red stars above a large blue ring", (8, 9)),  # size left out
        ("two small stars above a large blue ring", (8, 9)),
        ("two small red ones above a large blue ring", (8, 9)),
        ("small red stars above a large blue ring", (8, 9)),
        ("two small red stars and a large blue ring", (8, 9)),  # relation left out
        ("two small red stars", (4, 9)),  # group left out
        ("two small red green stars above a large blue ring", (8, 9)),  # both colours are none
        ("two small red stars above a large red ring", (8, 9)),
        ("two small blue stars above a large red ring", (7, 9)),  # colours swapped: binding counts
        ("two small red stars above a large blue ring and a red star", (9, 12)),  # three invented facts
        ("two small red stars above a large blue ring above a small green heart", (9, 14)),  # four, and a relation
        ("two small red stars above a large blue ring, and to their left a ring", (9, 12)),
        ("", (0, 9)),
        ("a photograph of a dog in the park", (0, 9)),
        ("the the of , left", (0, 9)),
    ],
)
def test_every_wrong_missing_or_invented_fact_costs_what_the_definition_says(caption, expected):
    assert score(caption) == expected


def test_a_corpus_sums_facts_before_it_divides():
    facts = {"a": TWO_STARS_ABOVE_A_RING, "b": json.dumps(TWO_STARS_ABOVE_A_RING)}
    scores = score_scene_facts(
        {"a": "two small red stars above a large blue ring", "b": "two stars and a circle"}, facts
    )
    assert scores["scene_facts"] == pytest.approx((9 + 3) / 18)
    assert scores["count"] == 1
    assert scores["size"] == scores["colour"] == scores["relation"] == 0.5
    assert scores["shape"] == 0.75


def test_ids_that_differ_from_the_scenes_are_an_error():
    with pytest.raises(ValueError, match=r"1 scenes have no caption \['a'\], 1 captions have no scene \['b'\]"):
        score_scene_facts({"b": "a star"}, {"a": TWO_STARS_ABOVE_A_RING})
    with pytest.raises(ValueError, match="no captions"):
        score_scene_facts({}, {})


def test_long_nonsense_is_scored_in_no_time_and_gets_next_to_nothing():
    true, total = score("red star above a ring left of two blue small hearts under " * 20)
    assert true / total < 0.1


def test_what_a_caption_says_is_read_as_facts():
    assert parse("A violet disc to the right of three big boxes") == {
        "objects": [
            {"count": 1, "colour": "purple", "shape": "circle"},
            {"count": 3, "size": "large", "shape": "square"},
        ],
        "relations": [(0, "right of", 1)],
    }


def test_captions_of_other_images_are_mostly_untrue(dataset):
    # What the control can reach: true captions, of other scenes.
    shuffled = scenes.load(train=2, validation=150, test=300, shuffled=True)["test"]
    assert shuffled["facts"] == dataset["test"]["facts"]
    assert shuffled["image"] == dataset["test"]["image"]
    assert not any(captions in dataset["test"]["captions"][i] for i, captions in enumerate(shuffled["captions"]))
    assert sorted(map(str, shuffled["captions"])) == sorted(map(str, dataset["test"]["captions"]))
    ids = shuffled["image_id"]
    for number in range(5):
        captions = {i: group[number] for i, group in zip(ids, shuffled["captions"], strict=True)}
        assert score_scene_facts(captions, dict(zip(ids, shuffled["facts"], strict=True)))["scene_facts"] < 0.4


def test_a_split_of_one_cannot_be_shuffled():
    with pytest.raises(ValueError, match="cannot make 1 scenes for validation and shuffle them"):
        scenes.load(train=2, validation=1, test=2, shuffled=True)
