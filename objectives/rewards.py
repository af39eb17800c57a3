"""Rewards of candidate captions: what SCST, DiCO and GRPO learn from.

A reward is a function

    reward(image_ids, candidates, references, ended) -> (images, candidates) float tensor

of the ids of a batch's images (list of str), the candidate captions of each image and its reference captions (lists of
lists of str), and whether each candidate ended by itself (lists of lists of bool) or was cut at the maximum length.
N-gram rewards count that end as a word: without it, "a man with a" is as good a beginning as any other, and
self-critical training learns to stop too early. NaN, of a reward of your own, is no opinion.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction

import torch
from accelerate.utils import gather_object

from common.caches import cache_folder
from common.errors import UserError
from common.processes import processes
from metrics import CiderD, ends_badly, preflight, repeated_bigrams
from metrics.chair import objects_of, objects_there
from metrics.clip_scores import NAMES
from metrics.coco_caption.bleu import bleu_from_statistics, bleu_statistics
from metrics.coco_caption.cider import END_OF_SEQUENCE
from metrics.coco_caption.java import Unavailable, meteor_from_statistics, meteor_statistics
from metrics.coco_caption.languages import check_language, tokens_of
from metrics.coco_caption.rouge import rouge_l
from metrics.coco_caption.spice import spice
from objectives.own_reward import OwnReward, RewardFailed, own_function

TIMEOUT = 1800  # seconds to wait for a Java program


class CiderReward:
    """CIDEr-D, 0 to 10, on all references of the image, with the document frequencies of the training corpus."""

    def __init__(self, tokens: dict[str, list[list[str]]], language: str):
        self.tokens, self.language = tokens, language
        folder = cache_folder() / "cider"
        self.scorer = CiderD.cached(list(tokens.values()), folder, end_of_sequence=True)

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        flat = _tokens(candidates, self.language)
        scores = self.scorer.score(flat, [self.tokens[i] for i in image_ids], [e for group in ended for e in group])
        return torch.from_numpy(scores).float().view(len(image_ids), -1)


class BleuReward:
    """BLEU-4 of the single caption, 0 to 1, unsmoothed as the COCO code's own per-image value."""

    def __init__(self, tokens: dict[str, list[list[str]]], language: str):
        self.language = language
        self.tokens = {i: [[*caption, END_OF_SEQUENCE] for caption in captions] for i, captions in tokens.items()}

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        flat = _tokens(candidates, self.language)
        ends = [end for group in ended for end in group]
        flat = [[*caption, END_OF_SEQUENCE] if end else caption for caption, end in zip(flat, ends, strict=True)]
        per_image = len(flat) // len(image_ids)
        references = [self.tokens[i] for i in image_ids for _ in range(per_image)]
        bleu = bleu_from_statistics(bleu_statistics(flat, references))[:, 3]
        return torch.from_numpy(bleu).float().view(len(image_ids), -1)


class ScoreReward:
    """A score of the single caption, 0 to 1, as an evaluation gives it: without the end as a word."""

    def __init__(self, score, tokens: dict[str, list[list[str]]], language: str):
        self.score, self.tokens, self.language = score, tokens, language

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        references = [self.tokens[i] for i, group in zip(image_ids, candidates, strict=True) for _ in group]
        try:
            scores = self.score(_tokens(candidates, self.language), references)
        except Unavailable as error:
            raise RewardFailed(f"reward: {error}.") from error
        return torch.as_tensor(scores).float().view(len(image_ids), -1)


def meteor(hypotheses, references):
    return meteor_from_statistics(meteor_statistics(hypotheses, references, TIMEOUT, cache=cache_folder() / "metrics"))


def spice_f(hypotheses, references):
    rows = spice(hypotheses, references, cache=cache_folder() / "metrics", timeout=TIMEOUT)
    return [row["f"] for row in rows]


class ChairReward:
    """How many of the objects that a caption names are not in the image (metrics/chair.py). `instances` are {image id:
    categories}; what an image's references name is in it, too."""

    def __init__(self, references: dict[str, list[str]], instances: dict):
        self.objects = {i: objects_there(captions, instances.get(i, ())) for i, captions in references.items()}

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        present = [self.objects[image_id] for image_id in image_ids]
        wrong = [
            [sum(name not in objects for name in objects_of(text)) for text in group]
            for objects, group in zip(present, candidates, strict=True)
        ]
        return torch.tensor(wrong, dtype=torch.float32)


class TextReward:
    """A value of the caption alone, mostly with a negative weight."""

    def __init__(self, value, language: str):
        self.value, self.language = value, language

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        values = list(map(self.value, _tokens(candidates, self.language)))
        return torch.tensor(values, dtype=torch.float32).view(len(image_ids), -1)


class ClipReward:
    """CLIP-S, PAC-S or PAC-S++ as the reward of DiCO's published code (utils.py at 7a2f740): the bare caption, without
    "A photo depicts ", and cosines below zero kept. `with_references`: the harmonic mean with the nearest reference's.

    `rows` are {image id: the record}; each image is opened once.
    """

    def __init__(self, scorer, rows, with_references: bool):
        self.scorer, self.rows, self.with_references = scorer, rows, with_references

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        pictures = [("train", image_id) for image_id in image_ids]
        images = [None if self.scorer.knows(of) else self.rows[of[1]]["image"] for of in pictures]
        flat = [text for group in candidates for text in group]
        references = references if self.with_references else None
        scores, with_references = self.scorer.score(pictures, images, flat, references, prefix="", clip=False)
        return torch.from_numpy(with_references if self.with_references else scores).view(len(image_ids), -1)


# Built from {image id: tokenized references} of the training split, and the captions' language.
NGRAM_REWARDS = {
    "cider": CiderReward,
    "bleu": BleuReward,
    "rouge-l": functools.partial(ScoreReward, rouge_l),
    "meteor": functools.partial(ScoreReward, meteor),
    "spice": functools.partial(ScoreReward, spice_f),
}
# Words of a caption; its share of repeated pairs of words; whether it ends in a word such as "a" or "with".
TEXT_REWARDS = {"length": len, "repetition": repeated_bigrams, "bad-endings": ends_badly}
CLIP_REWARDS = {f"{reference}{metric}": metric for reference in ("", "ref-") for metric in NAMES}


class Rewards:
    """The weighted sum of rewards, `weights` being {name: weight} (see `parse_rewards`).

    `references` are {image id: captions} of all images to be scored. They are tokenized once, here, by the tokenizer
    that evaluation uses, so a reward is the score that an evaluation would give (end-of-sequence aside). CLIP-based
    rewards use `scorers` and `rows`, {image id: the record}, as rewards of your own do. `language`: of the captions, a code that
    --caption_language takes. `instances`: {image id: categories}, for chair. `output_dir`: the run's folder.
    """

    def __init__(
        self,
        weights: dict[str, float],
        references: dict[str, list[str]],
        rows=None,
        scorers=(),
        language: str = "en",
        instances: dict | None = None,
        output_dir: str | None = None,
    ):
        language = check_language(language)
        self.weights, self.references, self.rewards = weights, references, {}
        scorers = {scorer.metric: scorer for scorer in scorers}
        if NGRAM_REWARDS.keys() & weights:
            flat = iter(_tokens(references.values(), language))
            tokens = {image_id: [next(flat) for _ in captions] for image_id, captions in references.items()}
        for name in weights:
            if name in NGRAM_REWARDS:
                self.rewards[name] = NGRAM_REWARDS[name](tokens, language)
            elif name == "chair":
                self.rewards[name] = ChairReward(references, instances or {})
            elif name in TEXT_REWARDS:
                self.rewards[name] = TextReward(TEXT_REWARDS[name], language)
            elif name in CLIP_REWARDS:
                self.rewards[name] = ClipReward(scorers[CLIP_REWARDS[name]], rows, name.startswith("ref-"))
            else:
                self.rewards[name] = OwnReward(name, rows, output_dir)

    def __call__(self, image_ids, candidates, ended) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reward of each candidate, (images, candidates), and its unweighted parts by name, of your own by the function's.
        RewardFailed in all processes, if one cannot be computed in any."""
        return self.begin(image_ids, candidates, ended)()

    def begin(self, image_ids, candidates, ended) -> Callable:
        """A function that waits for what `__call__` returns. Rewards that have a thread of their own are computed meanwhile, the
        others before it is returned."""
        references = [self.references[image_id] for image_id in image_ids]
        of_batch = image_ids, candidates, references, ended
        return functools.partial(
            self._finish, {name.rpartition(":")[2]: _begin(reward, *of_batch) for name, reward in self.rewards.items()}
        )

    def _finish(self, begun: dict[str, Future]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        _fail_together([error for part in begun.values() if (error := part.exception())])
        parts = {name: part.result() for name, part in begun.items()}
        return self.weighted(parts), parts

    def weighted(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of rewards, in the order of their names; NaN counts as 0."""
        return sum(
            weight * part.nan_to_num() for weight, part in zip(self.weights.values(), parts.values(), strict=True)
        )


def _begin(reward, *of_batch) -> Future:
    if pool := getattr(reward, "pool", None):
        return pool.submit(reward, *of_batch)
    part = Future()
    try:
        part.set_result(reward(*of_batch))
    except RewardFailed as error:
        part.set_exception(error)
    return part


def _fail_together(errors: list[BaseException]) -> None:
    """Raises in every process if one of them has errors: a process that went on alone would wait for the others forever. The
    first that has one says which."""
    failed = gather_object([bool(errors)]) if processes().num_processes > 1 else [bool(errors)]
    if any(failed):
        raise errors[0] if failed.index(True) == processes().process_index else RewardFailed()


class RecordRows:
    """`rows[image_id]` of records, read on access."""

    def __init__(self, records):
        self.records, self.columns = records, records.column_names
        self.row = {image_id: row for row, image_id in enumerate(records["image_id"])}

    def __getitem__(self, image_id: str) -> dict:
        return self.records[self.row[image_id]]


def _tokens(captions, language: str) -> list[list[str]]:
    """Tokens of all captions of all images. One by one: else a caption's last period depends on the next caption."""
    return [tokens_of([text], language)[0] for group in captions for text in group]


def parse_rewards(text: str) -> dict[str, float]:
    """{name: weight} of "cider:1.0 clip-s:0.5 mine/rewards.py:short:0.1"; the default weight is 1. ValueError if it is not of that
    form, or if a function of your own is not there."""
    names = ", ".join([*NGRAM_REWARDS, *CLIP_REWARDS, *TEXT_REWARDS, "chair", "FILE.py:FUNCTION"])
    weights, seen = {}, set()
    for word in text.replace(",", " ").split():
        file, is_own, tail = word.rpartition(".py:")
        name, _, weight = tail.partition(":")
        if is_own:
            own_function(name := f"{file}.py:{name}")
        elif name not in NGRAM_REWARDS | TEXT_REWARDS | CLIP_REWARDS and name != "chair":
            raise UserError(f"reward: '{name}' is not a reward. Known: {names}.")
        if (short := name.rpartition(":")[2]) in seen:
            raise UserError(f"reward: {short} is named twice in '{text}'.")
        seen.add(short)
        try:
            weights[name] = float(Fraction(weight or 1))  # of "nan" and "inf" it makes no number
        except ValueError:
            raise UserError(f"reward: the weight of {name} is '{weight}', not a number.") from None
    if not any(weights.values()):
        raise UserError(f"reward: '{text}' names no reward. Example: cider:1.0 clip-s:0.5. Known: {names}.")
    return weights


def check_java(weights: dict[str, float], language: str) -> None:
    """UserError if METEOR or SPICE is among the rewards and cannot be computed here, or not of this language."""
    asked = {name: "auto" if name in weights else False for name in ("meteor", "spice")}
    for name, reason in preflight(**asked, cache=cache_folder() / "metrics", language=language).items():
        raise UserError(f"reward: {name} cannot be computed: {reason}.")


def clip_metrics_of(weights: dict[str, float]) -> list[str]:
    """The CLIP-based scores that the rewards need a scorer for."""
    return [CLIP_REWARDS[name] for name in weights if name in CLIP_REWARDS]
