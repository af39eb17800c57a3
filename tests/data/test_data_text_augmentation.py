"""Augmented captions: drawn alike everywhere, still true, and changed in nothing but what was asked."""

import json
import random
import re
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT

from collator import CaptionCollator
from data import CaptionPairs, TextAugmentation, load
from data.synonyms import KEPT, TABLE, synonyms
from data.text_augmentation import replace_words, shuffle_sentences

BOTH = ["synonym:0.2", "sentence_shuffle:0.2"]
PARAGRAPH = "A man walks by the sea. Two kids play on the beach! Is the big dog theirs? It jumps."


class All:
    """A random number generator that does everything it may, and takes the first of what it may take."""

    def random(self):
        return 0.0

    def choice(self, options):
        return options[0]

    def shuffle(self, items):
        items.reverse()


def replaced(caption: str) -> str:
    return replace_words(caption, 1.0, All())


def test_synonyms_are_for_english_captions(caplog):
    for language in ("en", "en-GB"):
        TextAugmentation(BOTH, language=language)
    with pytest.raises(ValueError, match="--augment_text synonym: they are English, and caption_language is de"):
        TextAugmentation(BOTH, language="de")
    TextAugmentation(BOTH[1:], language="de")


@pytest.mark.parametrize("caption", ["a white water rapid", "the shore of a lake", "white water rapids"])
def test_these_stay_as_they_are(caption):
    assert replaced(caption) == caption


def test_clean_captions_are_those_that_blips_own_code_learns():
    caption = " A man, who's \"here\";  reads: (two) *books*!! It's 5~6 #pages.\n"
    cleaned = TextAugmentation(["clean"])([caption, "w " * 40, "Éa?"], 3, "1")
    assert cleaned == ["a man, who's here reads two books it's 5 6 pages", " ".join("w" * 30), "éa?"]


def words(caption: str) -> list[str]:
    return re.findall("[a-z]+", caption.lower())


@pytest.fixture(scope="module")
def real_captions(test_data) -> list[str]:
    rows = json.loads((test_data / "coco_karpathy_test" / "captions_karpathy_test.json").read_text())["annotations"]
    return [row["caption"] for row in rows[::5]]


# ---------------------------------------------------------------------------------------------------------------------
# The draw


def test_the_same_seed_epoch_and_image_give_the_same_words_and_others_give_others():
    one, two = TextAugmentation(BOTH, seed=1), TextAugmentation(BOTH, seed=1)
    assert [one([PARAGRAPH], 0, str(i)) for i in range(50)] == [two([PARAGRAPH], 0, str(i)) for i in range(50)]
    many = {
        (seed, epoch): [TextAugmentation(BOTH, seed)([PARAGRAPH], epoch, str(i))[0] for i in range(50)]
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len({tuple(captions) for captions in many.values()}) == 4
    assert len(set(many[1, 0])) > 10


def test_another_process_draws_the_same():
    code = (
        "from data import TextAugmentation\n"
        f"print([TextAugmentation({BOTH!r})([{PARAGRAPH!r}], 1, str(i)) for i in range(30)])"
    )
    root = ROOT
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([TextAugmentation(BOTH)([PARAGRAPH], 1, str(i)) for i in range(30)])


def test_a_batch_is_the_same_with_any_number_of_workers_and_another_in_the_next_epoch(tmp_path):
    captions = {f"photo{i}": [f"a small man jumps near the road. {i} large dogs."] * 2 for i in range(6)}
    records = load(tiny.write_photos(tmp_path / "photos", captions, dict.fromkeys(captions, "train")))["train"]
    model, processor = tiny.build(tmp_path)
    plain = CaptionCollator(processor, model.config)
    collator = CaptionCollator(
        processor, model.config, text_augmentation=TextAugmentation(["synonym:0.5", "sentence_shuffle:0.5"])
    )

    def labels(epoch, workers, collate=collator):
        pairs = CaptionPairs(records)
        pairs.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(pairs, batch_size=12, collate_fn=collate, num_workers=workers)
        return next(iter(loader))["labels"].tolist()

    assert labels(0, workers=0) == labels(0, workers=2)
    assert labels(0, workers=0) != labels(1, workers=0)
    assert len({tuple(row) for row in labels(0, workers=0)}) > 2  # the two samples of an image have draws of their own
    assert labels(0, workers=0, collate=plain) == labels(1, workers=0, collate=plain)


# ---------------------------------------------------------------------------------------------------------------------
# Synonyms


def test_words_are_replaced_in_the_form_they_have():
    assert replaced("A photo of two women and a child on a couch.") == "A photograph of two ladies and a kid on a sofa."
    assert replaced("Men walking down the streets") == "Guys strolling down the roads"
    assert replaced("a dog jumps over people and is surrounded") == "a dog leaps over individuals and is encircled"
    assert replaced("puppies hugging; he hugged it, tries and tried") == (
        "pups embracing; he embraced it, attempts and attempted"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "a red bus left of two blue buses",  # colours, positions and counts
        "a hot dog on home plate near a train car",
        'a sign that says "big shop" and “small road”',
        "Uncle Big is at Street and PHONE SHOP",
        "[MASK] <image> big-boned man's road_sign @woman #big www.big.com car/boat",
        "a man-made thing",
        "",
        "   ",
    ],
)
def test_what_must_not_change_does_not(caption):
    assert replaced(caption) == caption


def test_a_verb_with_an_object_keeps_to_itself():
    assert replaced("walking a dog") == "walking a dog"
    assert replaced("walking with a dog") == "strolling with a dog"
    assert replaced("dogs jumping rope") == "dogs jumping rope"
    assert replaced("it looks good and looks at us") == "it looks good and gazes at us"


def test_a_and_an_stay_right_and_no_word_comes_twice():
    assert replaced("a plane and the plane") == "a plane and the airplane"
    assert replaced("an airplane, an odd house") == "an aircraft, an odd home"
    assert replaced("a sofa and a couch") == "a sofa and a couch"


def test_the_share_of_replaced_words_is_the_probability():
    caption = "a big man on the street looks at the sea with his phone"
    possible = sum(a != b for a, b in zip(words(caption), words(replaced(caption)), strict=True))
    assert possible == 6
    rng, changed = random.Random(0), 0
    for _ in range(1000):
        changed += sum(a != b for a, b in zip(words(caption), words(replace_words(caption, 0.2, rng)), strict=True))
    assert changed / (possible * 1000) == pytest.approx(0.2, abs=0.015)
    assert replace_words(caption, 0.0, rng) == caption


def test_the_table_keeps_part_of_speech_number_and_tense_and_leaves_colours_and_counts_alone():
    assert 500 < len(TABLE) < 1000
    assert not KEPT & {word for form, others in TABLE.items() for word in (form, *others)}
    for form, others in TABLE.items():
        assert form not in others
        assert len(set(others)) == len(others)
        assert all(re.fullmatch("[a-z]+", other) for other in others)
    # Pairs whose endings differ, which must not be of another number or tense:
    pairs = {(form, other) for form, others in TABLE.items() for other in others}
    assert {form for form, other in pairs if form.endswith("ing") != other.endswith("ing")} == {
        *("sketch", "funny", "busy", "seated", "apparel", "clothing")
    }
    assert {form for form, other in pairs if form.endswith("s") and not other.endswith("s")} == {
        *("ladies", "kids", "youngsters", "toddlers", "airplanes", "planes"),  # women, children, aircraft
        *("gorgeous", "delicious", "enormous", "various", "perhaps"),
    }
    for word in ("left", "right", "red", "two", "several", "behind", "the"):
        assert synonyms(word) == ()


def test_real_captions_keep_their_length_colours_counts_positions_and_articles(real_captions):
    changed, rng = 0, random.Random(0)
    for caption in real_captions:
        new = replace_words(caption, 1.0, rng)
        before, after = words(caption), words(new)
        assert len(before) == len(after)
        assert re.sub("[A-Za-z]+", "w", caption) == re.sub("[A-Za-z]+", "w", new)
        for i, (old, word) in enumerate(zip(before, after, strict=True)):
            if old == word:
                continue
            changed += 1
            assert old not in KEPT
            assert word not in KEPT
            if i and before[i - 1] in ("a", "an"):
                assert (old[0] in "aeiou") == (word[0] in "aeiou"), (caption, new)
    assert changed > len(real_captions) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def test_sentences_change_their_places_and_nothing_else():
    assert shuffle_sentences(PARAGRAPH, 1.0, All()) == (
        "It jumps. Is the big dog theirs? Two kids play on the beach! A man walks by the sea."
    )
    rng = random.Random(0)
    orders = {shuffle_sentences(PARAGRAPH, 1.0, rng) for _ in range(400)}
    assert len(orders) == 24
    assert all(sorted(order.split()) == sorted(PARAGRAPH.split()) for order in orders)
    moved = sum(shuffle_sentences(PARAGRAPH, 0.2, rng) != PARAGRAPH for _ in range(2000))
    assert moved / 2000 == pytest.approx(0.2 * 23 / 24, abs=0.03)


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("one dog runs", "one dog runs"),
        ("A 12 oz. can of Dr. Pepper at 3.5 degrees on St. John road.", None),
        ("the dog runs . the cat sits .", "the cat sits . the dog runs ."),
        ("It waits... and waits.", None),
        ("A dog. It runs", "It runs. A dog."),
        ('It says "stop." A man waits.', 'A man waits. It says "stop."'),
        ('It says "Stop. Go now." A man waits.', 'A man waits. It says "Stop. Go now."'),
        ("It says “Stop. Go now.” A man waits.", "A man waits. It says “Stop. Go now.”"),
        ("", ""),
    ],
)
def test_sentences_are_told_apart(caption, wanted):
    assert shuffle_sentences(caption, 1.0, All()) == (caption if wanted is None else wanted)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("synonim:0.2", "augment_text 'synonim:0.2': unknown operation 'synonim'. Known: synonym, sentence_shuffle"),
        ("synonym", "expected synonym:P"),
        ("synonym:1.5", "P from 0 to 1"),
        ("synonym:nan", "P from 0 to 1"),
        ("sentence_shuffle:many", "expected numbers, sentence_shuffle:P"),
        ("sentence_shuffle:0.2:1", "expected sentence_shuffle:P"),
    ],
)
def test_a_wrong_specification_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        TextAugmentation([text])
