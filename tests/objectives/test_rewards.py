"""Rewards are the scores of an evaluation, with the caption's end as one more word."""

import random

import datasets
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from metrics import ends_badly, tokenize
from metrics.coco_caption.cider import END_OF_SEQUENCE
from objectives.rewards import Rewards, parse_rewards

WORDS = [
    "a",
    "the",
    "man",
    "dog",
    "red",
    "runs",
    "on",
    "in",
    "with",
    "hat",
    "grass",
    "water",
    "two",
    "small",
    "ball",
    "near",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpus():
    """{image id: captions} as people write them, with capitals and a period."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(4, 10))) for _ in range(120)]
    return {f"image{i}": [f"{text.capitalize()}." for text in texts[3 * i : 3 * i + 3]] for i in range(40)}


def candidates_of(corpus, count):
    """Captions near the references: some words of one of them, and not always to its end."""
    chance = random.Random(1)
    found = []
    for captions in corpus.values():
        words = [chance.choice(captions).rstrip(".").lower().split() for _ in range(count)]
        found.append([" ".join(line[: chance.randint(2, len(line))]) for line in words])
    ended = [[chance.random() < 0.6 for _ in group] for group in found]
    return found, ended


def spelled_out(caption, end=True):
    return " ".join(tokenize([caption])[0] + [END_OF_SEQUENCE] * end)


def coco(scorer, corpus, candidates, ended, k):
    """pycocoevalcap's per-image scores of each image's k-th candidate, the end spelled out as a word."""
    references = {i: [spelled_out(text) for text in captions] for i, captions in corpus.items()}
    hypotheses = {i: [spelled_out(group[k], ends[k])] for i, group, ends in zip(corpus, candidates, ended, strict=True)}
    return scorer.compute_score(references, hypotheses)[1]


def test_cider_is_that_of_the_coco_code_with_the_end_as_a_word(corpus):
    candidates, ended = candidates_of(corpus, 3)
    total, parts = Rewards({"cider": 1.0}, corpus)(list(corpus), candidates, ended)
    assert total.shape == (40, 3)
    for k in range(3):
        expected = torch.tensor(coco(Cider(), corpus, candidates, ended, k), dtype=torch.float)
        torch.testing.assert_close(parts["cider"][:, k], expected)
    assert total.max() > 3


def test_bleu_is_that_of_the_coco_code_with_the_end_as_a_word(corpus):
    candidates, ended = candidates_of(corpus, 2)
    _, parts = Rewards({"bleu": 1.0}, corpus)(list(corpus), candidates, ended)
    for k in range(2):
        expected = torch.tensor(coco(Bleu(4), corpus, candidates, ended, k)[3], dtype=torch.float)
        torch.testing.assert_close(parts["bleu"][:, k], expected)
    assert 0.3 < parts["bleu"].max() <= 1


def test_rewards_cut_captions_as_their_language_is_cut():
    """Chinese, cut into characters: what the COCO code gives for characters with spaces between them. Read as English, each
    caption is one word, and no candidate of another wording earns anything."""
    corpus = {
        "1": ["一个男人骑着马在沙滩上", "一个人骑马"],
        "2": ["两只狗在雪地里奔跑", "雪地里的两只狗"],
        "3": ["桌子上有一盘食物", "一盘食物放在木桌上"],
    }
    candidates = [["一个人骑着马"], ["雪地里有两只狗"], ["木桌上有一盘食物"]]
    spaced = {image: [" ".join(text) for text in captions] for image, captions in corpus.items()}
    apart = [[" ".join(text) for text in group] for group in candidates]
    ended = [[True]] * 3
    _, parts = Rewards({"cider": 1.0, "bleu": 1.0}, corpus, language="zh-Hans")(list(corpus), candidates, ended)
    expected = {"cider": coco(Cider(), spaced, apart, ended, 0), "bleu": coco(Bleu(4), spaced, apart, ended, 0)[3]}
    for name, values in expected.items():
        torch.testing.assert_close(parts[name][:, 0], torch.tensor(values, dtype=torch.float))
    assert parts["cider"].min() > 0.5
    assert Rewards({"bleu": 1.0}, corpus)(list(corpus), candidates, ended)[0].max() < 1e-3


def test_an_images_reward_does_not_depend_on_the_batch(corpus):
    """CIDEr's frequencies are the training corpus's: within the batch, that of one image would be 0."""
    candidates, ended = candidates_of(corpus, 3)
    rewards = Rewards({"cider": 1.0, "bleu": 0.5}, corpus)
    together, parts = rewards(list(corpus), candidates, ended)
    alone = [rewards([i], [c], [e])[0] for i, c, e in zip(corpus, candidates, ended, strict=True)]
    torch.testing.assert_close(torch.cat(alone), together)
    torch.testing.assert_close(together, parts["cider"] + 0.5 * parts["bleu"])
    assert together[0].max() > 0


def test_a_caption_that_is_broken_off_earns_less_than_one_that_ends_there(corpus):
    rewards = Rewards({"cider": 1.0}, corpus)
    image_id, captions = next(iter(corpus.items()))
    (ended, cut), = rewards([image_id], [[captions[0], captions[0]]], [[True, False]])[0].tolist()  # fmt: skip
    assert ended > cut > 0


def test_bad_endings_are_found():
    assert [ends_badly(caption.split()) for caption in ("a man with a", "a man with", "a man", "")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("cider", {"cider": 1}),
        ("cider:1.0 bleu:0.5", {"cider": 1, "bleu": 0.5}),
        ("bleu:2,cider:1", {"bleu": 2, "cider": 1}),
    ],
)
def test_rewards_are_named_with_their_weights(text, weights):
    assert parse_rewards(text) == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cidre:1", "'cidre' is not a reward. Known: cider, bleu"),
        ("cider:much", "the weight of cider is 'much', not a number"),
        ("", "names no reward"),
        ("cider:0", "names no reward"),
        ("cider cider", "named twice"),
    ],
)
def test_a_wrong_reward_is_one_clear_message(text, said):
    with pytest.raises(ValueError, match=said):
        parse_rewards(text)
