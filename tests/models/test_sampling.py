"""Sampled captions: drawn from the model's own probabilities, and the same in every batch."""

import math
from collections import Counter

import families
import pytest
import torch
from scipy import stats
from test_row_prompts import disturbed, samples  # noqa: F401

from captioner import Captioner
from common.errors import UserError
from models.sampling import gumbel, warpers
from objectives import token_log_probs

DRAWN = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def captioner_of(model, processor, seed=7, **settings) -> Captioner:
    return Captioner(model, processor, seed=seed, **DRAWN | {"max_new_tokens": 5} | settings)


def plain(number: int = 3) -> list[dict]:
    """Pictures without prompts of their own."""
    found = samples([""] * number)
    return [{"image": sample["image"], "image_id": str(place)} for place, sample in enumerate(found)]


@pytest.fixture(scope="module")
def blip():
    model, processor = families.build("blip")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval(), processor


def p_of(counts: dict, probabilities: dict, number: int) -> float:
    """That of a chi-square test, what is expected fewer than five times being one class."""
    usual = [name for name, probability in probabilities.items() if number * probability >= 5]
    expected = [number * probabilities[name] for name in usual]
    observed = [counts.get(name, 0) for name in usual]
    if number - sum(expected) > 1e-6 * number:
        expected, observed = [*expected, number - sum(expected)], [*observed, number - sum(observed)]
    assert len(usual) > 3
    return stats.chisquare(observed, expected).pvalue


def test_captions_are_as_frequent_as_the_model_says(blip):
    """3,000 captions of two tokens: the probability of each is that of teacher forcing."""
    captioner = captioner_of(*blip, num_return_sequences=3000, max_new_tokens=2)
    batch = captioner.collator(plain(1))
    drawn = Counter(map(tuple, captioner.rows(captioner.generate_tokens(batch))))
    assert drawn.total() == 3000
    rows = list(map(list, drawn))
    with torch.no_grad():
        log_probs = token_log_probs(captioner.model, captioner.training_batch(batch, rows)).sum(dim=1)
    probabilities = dict(zip(map(tuple, rows), log_probs.exp().tolist(), strict=True))
    assert p_of(drawn, probabilities, 3000) > 0.01
    warmer = {row: probability**0.8 for row, probability in probabilities.items()}
    scale = sum(warmer.values()) / sum(probabilities.values())
    assert p_of(drawn, {row: value / scale for row, value in warmer.items()}, 3000) < 1e-6  # the test can tell


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"top_k": 8}, {"temperature": 1.3, "top_p": 0.7}])
def test_temperature_top_k_and_top_p_are_the_librarys(blip, settings):
    captioner = captioner_of(*blip, num_return_sequences=3000, max_new_tokens=1, **settings)
    batch = captioner.collator(plain(1))
    first = Counter(row[0] for row in captioner.rows(captioner.generate_tokens(batch)))
    words = [[token] for token in range(captioner.model.config.text_config.vocab_size)]
    with torch.no_grad():
        log_probs = token_log_probs(captioner.model, captioner.training_batch(batch, words)).sum(dim=1).double()
    warped = warpers(DRAWN | settings)(torch.zeros(1, 1, dtype=torch.long), log_probs[None]).softmax(dim=1)[0]
    assert p_of(first, dict(enumerate(warped.tolist())), 3000) > 0.01
    assert all(warped[token] > 0 for token in first)


def test_a_sample_depends_on_seed_image_and_number_alone(disturbed):  # noqa: F811
    captioner = captioner_of(*disturbed, num_return_sequences=2)
    pictures = plain()
    together = captioner.caption_batch(captioner.collator(pictures))
    assert captioner.caption_batch(captioner.collator(pictures[::-1])) == together[::-1]
    assert [captioner.caption_batch(captioner.collator([picture]))[0] for picture in pictures] == together
    three = captioner.with_settings(num_return_sequences=3).caption_batch(captioner.collator(pictures))
    assert [captions[:2] for captions in three] == together
    renamed = [picture | {"image_id": "another"} for picture in pictures]
    torch.manual_seed(5)
    assert captioner.caption_batch(captioner.collator(renamed)) == together
    other = captioner_of(*disturbed, seed=8, num_return_sequences=2)
    assert other.caption_batch(other.collator(pictures)) != together
    asked = samples()  # prompts of different lengths
    together = captioner.caption_batch(captioner.collator(asked))
    assert [captioner.caption_batch(captioner.collator([sample]))[0] for sample in asked] == together


def test_nothing_is_drawn_unless_it_is_asked_for(blip):
    captioner = Captioner(*blip, num_beams=1, max_new_tokens=5, seed=7)
    other = Captioner(*blip, num_beams=1, max_new_tokens=5, seed=8)
    images = [picture["image"] for picture in plain()]
    assert captioner(images) == other(images)
    assert "seed" not in captioner.description()
    assert captioner_of(*blip).description()["seed"] == 7


def test_more_captions_than_beams_are_refused(blip):
    with pytest.raises(UserError, match="3 captions per image are the best of as many beams, and num_beams is 2"):
        Captioner(*blip, num_beams=2, num_return_sequences=3)
    best = Captioner(*blip, num_beams=3, num_return_sequences=3, max_new_tokens=5)
    (found,) = best.caption_batch(best.collator(plain(1)))
    assert len(found) == 3
    assert found[0] == Captioner(*blip, num_beams=3, max_new_tokens=5)([plain(1)[0]["image"]])[0]


def test_noise_is_gumbels_and_differs_by_name():
    noise = gumbel([f"7 1 0 {step}" for step in range(200)], 1000, "cpu")
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.01
    assert noise.unique().numel() == noise.numel()
    neighbours = torch.corrcoef(noise)[0, 1:]
    assert neighbours.abs().max() < 5 / math.sqrt(1000)
    assert gumbel(["7 1 0 3"], 1000, "cpu").equal(noise[3:4])
