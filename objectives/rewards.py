"""Rewards of candidate captions: what SCST and DiCO learn from.

A reward is a function

    reward(image_ids, images, candidates, references, ended) -> (images, candidates) float tensor

of the ids of a batch's images (list of str), the records' own images if the caller has them (else None), the candidate
captions of each image and its reference captions (lists of lists of str), and whether each candidate ended by itself
(lists of lists of bool) or was cut at the greatest length. N-gram rewards count that end as a word: without it,
"a man with a" is as good a beginning as any other, and self-critical training learns to break off.
"""

import torch

from data.records import cache_folder
from metrics import CiderD, tokenize
from metrics.bleu import bleu_from_statistics, bleu_statistics
from metrics.cider import END_OF_SEQUENCE


class CiderReward:
    """CIDEr-D, 0 to 10, on all references of the image, with the document frequencies of the training corpus."""

    def __init__(self, tokens: dict[str, list[list[str]]]):
        self.tokens = tokens
        folder = cache_folder() / "cider"
        self.scorer = CiderD.cached(list(tokens.values()), folder, end_of_sequence=True)

    def __call__(self, image_ids, images, candidates, references, ended) -> torch.Tensor:
        flat = _tokens(candidates)
        scores = self.scorer.score(flat, [self.tokens[i] for i in image_ids], [e for group in ended for e in group])
        return torch.from_numpy(scores).float().view(len(image_ids), -1)


class BleuReward:
    """BLEU-4 of the single caption, 0 to 1, unsmoothed as the COCO code's own per-image value."""

    def __init__(self, tokens: dict[str, list[list[str]]]):
        self.tokens = {i: [[*caption, END_OF_SEQUENCE] for caption in captions] for i, captions in tokens.items()}

    def __call__(self, image_ids, images, candidates, references, ended) -> torch.Tensor:
        flat = _tokens(candidates)
        ends = [end for group in ended for end in group]
        flat = [[*caption, END_OF_SEQUENCE] if end else caption for caption, end in zip(flat, ends, strict=True)]
        per_image = len(flat) // len(image_ids)
        references = [self.tokens[i] for i in image_ids for _ in range(per_image)]
        bleu = bleu_from_statistics(bleu_statistics(flat, references))[:, 3]
        return torch.from_numpy(bleu).float().view(len(image_ids), -1)


# Made from {image id: tokenized references} of the training split.
NGRAM_REWARDS = {"cider": CiderReward, "bleu": BleuReward}


class Rewards:
    """The weighted sum of rewards, `weights` being {name: weight} (see `parse_rewards`).

    `references` are {image id: captions} of all images that will be asked about. They are tokenized once, here, by the
    tokenizer that evaluation uses, so a reward is the score that an evaluation would give (end-of-sequence aside).
    """

    def __init__(self, weights: dict[str, float], references: dict[str, list[str]]):
        self.weights, self.references = weights, references
        flat = iter(_tokens(references.values()))
        tokens = {image_id: [next(flat) for _ in captions] for image_id, captions in references.items()}
        self.rewards = {name: NGRAM_REWARDS[name](tokens) for name in weights}

    def __call__(self, image_ids, candidates, ended, images=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reward of each candidate, (images, candidates), and its unweighted parts by name."""
        references = [self.references[image_id] for image_id in image_ids]
        parts = {
            name: reward(image_ids, images, candidates, references, ended) for name, reward in self.rewards.items()
        }
        return sum(self.weights[name] * part for name, part in parts.items()), parts


def _tokens(captions) -> list[list[str]]:
    """Tokens of all captions of all images. One by one: tokenize lets a caption's last period depend on the next one."""
    return [tokenize([text])[0] for group in captions for text in group]


def parse_rewards(text: str) -> dict[str, float]:
    """{name: weight} of "cider:1.0 bleu:0.5"; a name without a weight has 1. ValueError if it is not of that form."""
    known = ", ".join(NGRAM_REWARDS)
    weights = {}
    for word in text.replace(",", " ").split():
        name, _, weight = word.partition(":")
        if name not in NGRAM_REWARDS:
            raise ValueError(f"reward: '{name}' is no reward. Known: {known}.")
        if name in weights:
            raise ValueError(f"reward: {name} is named twice in '{text}'.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"reward: the weight of {name} is '{weight}', not a number.") from None
    if not any(weights.values()):
        raise ValueError(f"reward: '{text}' names no reward. Example: cider:1.0 bleu:0.5. Known: {known}.")
    return weights
