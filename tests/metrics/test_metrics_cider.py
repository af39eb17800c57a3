"""CIDEr-D as a reward: frequencies of a training corpus, several candidates, the end-of-sequence token, the cache."""

import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from metrics import CiderD
from metrics.coco_caption.cider import END_OF_SEQUENCE

WORDS = [f"w{n}" for n in range(30)]


def captions(randomness: random.Random, count: int) -> list[list[str]]:
    return [randomness.choices(WORDS, k=randomness.randint(0, 12)) for _ in range(count)]


@pytest.fixture
def corpus():
    randomness = random.Random(3)
    return [captions(randomness, randomness.randint(1, 6)) for _ in range(64)]


def pycocoevalcap_cider(hypotheses, references) -> np.ndarray:
    gts = {i: [" ".join(tokens) for tokens in image] for i, image in enumerate(references)}
    res = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    return Cider().compute_score(gts, res)[1]


def test_candidates_score_as_in_pycocoevalcap_one_at_a_time(corpus):
    candidates = [captions(random.Random(seed), 64) for seed in range(5)]
    together = [candidates[k][image] for image in range(64) for k in range(5)]
    scores = CiderD.from_references(corpus).score(together, corpus).reshape(64, 5)
    for k in range(5):
        np.testing.assert_allclose(scores[:, k], pycocoevalcap_cider(candidates[k], corpus), atol=1e-12)
    assert scores.max() > 0.5


def test_the_end_of_sequence_token_counts_everywhere(corpus):
    hypotheses = captions(random.Random(1), 64)
    scores = CiderD.from_references(corpus, end_of_sequence=True).score(hypotheses, corpus)
    spelled_out = [[[*tokens, END_OF_SEQUENCE] for tokens in image] for image in corpus]
    expected = pycocoevalcap_cider([[*tokens, END_OF_SEQUENCE] for tokens in hypotheses], spelled_out)
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_with_the_end_token_a_broken_off_caption_loses():
    references = [[["a", "man", "with", "a", "hat"]] * 5, [["a", "dog", "on", "grass"]] * 5, [["two", "cats"]] * 5]
    whole, broken = ["a", "man", "with", "a", "hat"], ["a", "man", "with", "a"]
    with_end = CiderD.from_references(references, end_of_sequence=True)
    without = CiderD.from_references(references)
    loss_with = np.diff(with_end.score([broken, whole], references[:1]))
    loss_without = np.diff(without.score([broken, whole], references[:1]))
    assert loss_with > loss_without > 0


def test_frequencies_come_from_the_training_corpus_also_for_one_image_and_new_words(corpus):
    scorer = CiderD.from_references(corpus)
    all_scores = scorer.score([image[0] for image in corpus], corpus)
    alone = [scorer.score([image[0]], [image])[0] for image in corpus]
    np.testing.assert_allclose(alone, all_scores, atol=1e-12)
    unseen = scorer.score([["zebra", "w1", "zebra"], ["zebra"]], [[["zebra", "w1"]], [["w1"]]])
    assert unseen[0] > 0
    assert unseen[1] == 0
    assert "zebra" not in scorer.vocabulary


def test_a_cached_scorer_is_the_same_and_is_not_counted_again(corpus, tmp_path, monkeypatch):
    hypotheses = captions(random.Random(5), 64)
    expected = CiderD.cached(corpus, tmp_path, end_of_sequence=True).score(hypotheses, corpus)
    CiderD.cached(corpus, tmp_path, end_of_sequence=False)
    CiderD.cached(corpus[:-1], tmp_path, end_of_sequence=True)
    assert len(list(tmp_path.iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(CiderD, "from_references", None)
        again = CiderD.cached(corpus, tmp_path, end_of_sequence=True)
    assert again.end_of_sequence is True
    np.testing.assert_array_equal(again.score(hypotheses, corpus), expected)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"not a zip at all"])
def test_a_damaged_cache_file_is_made_again(corpus, tmp_path, damage):
    expected = CiderD.cached(corpus, tmp_path).score([["w1"]], corpus[:1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    np.testing.assert_array_equal(CiderD.cached(corpus, tmp_path).score([["w1"]], corpus[:1]), expected)
    assert CiderD.load(file).images == 64


def test_loading_something_else_is_an_error_that_names_the_file(tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, a=np.arange(3))
    with pytest.raises(ValueError, match=r"x\.npz does not hold CIDEr"):
        CiderD.load(file)


def test_hypotheses_that_do_not_fit_the_images_are_refused(corpus):
    scorer = CiderD.from_references(corpus)
    with pytest.raises(ValueError, match="3 hypotheses cannot be divided evenly among 2 images"):
        scorer.score([["w1"]] * 3, corpus[:2])
    with pytest.raises(ValueError, match="image 1 of the batch has no reference"):
        scorer.score([["w1"]] * 2, [corpus[0], []])
    with pytest.raises(ValueError, match="at least one image"):
        CiderD.from_references([])
