"""All scores of a set of captions: what `coco_metrics.json` holds about them."""

import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .bleu import bleu_from_statistics, bleu_statistics
from .cider import CiderD
from .java import Unavailable, meteor_from_statistics, meteor_statistics, why_no_meteor
from .languages import check_language, sacrebleu_tokenizer, tokens_of, unsegmented
from .rouge import rouge_l
from .spice import CATEGORIES, are_cached, fetch_corenlp, find_corenlp, why_no_spice
from .spice import spice as spice_of_images
from .text_checks import SENTENCE_END, illegal_characters, repetition

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU

logger = logging.getLogger(__name__)

_BLOCK = 5000
_BLEU_NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"]
# Scores of a corpus that are not a mean over its images: counts of the images are summed, and scored together.
SUMMED = ("Bleu", "sacrebleu", "METEOR")
# These too: they are a share, the first column divided by the second.
SHARES = ("scene_facts", "CHAIRi", "object_recall")
TUPLES = ("tuple_precision", "tuple_recall")  # SPICE's of paragraphs, sentence by sentence
SPICE_SAMPLES = 1500  # images, where their references were never parsed

# A caption that ends in one of these was cut off: what rewards without an end-of-sequence token teach a model.
_DETERMINERS = "a an the this that these those my your his her its our their"
_PREPOSITIONS = (
    "about above across after against along among around as at before behind below beneath beside between beyond by down "
    "during for from in inside into near next of off on onto outside over past through to toward towards under until up "
    "upon with within without"
)
_CONNECTIVES = "and but nor or so than because while if when where which who whose"
_UNFINISHED = "is are was were be being been has have very some"
BAD_ENDINGS = frozenset(f"{_DETERMINERS} {_PREPOSITIONS} {_CONNECTIVES} {_UNFINISHED}".split())


def ends_badly(tokens: list[str]) -> bool:
    """Whether the tokens of a caption end in a word that no caption ends with: "a man with a"."""
    return bool(tokens) and tokens[-1] in BAD_ENDINGS


def repeated_bigrams(tokens: list[str]) -> float:
    """The share of a caption's pairs of neighbouring tokens that occurred before: "a dog and a dog" has 1 of 4."""
    pairs = list(itertools.pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


class InvalidCaptions(ValueError):
    """Predictions or references that cannot be scored."""


class MismatchedImages(InvalidCaptions):
    """Predictions and references are not for the same images."""


def preflight(
    meteor: bool = True, spice: bool | str = "auto", *, cache: str | os.PathLike | None = None, language: str = "en"
) -> dict[str, str]:
    """What will not be available, and why: {"SPICE": reason}. Empty if everything that was asked for is available.

    Cheap, so that a script can say it before hours of generation and not after.
    """
    language, reasons = check_language(language), {}
    if meteor and (reason := _english_only("METEOR", language) or why_no_meteor()):
        reasons["METEOR"] = reason
    if spice and (reason := _english_only("SPICE", language) or why_no_spice(cache=cache, will_fetch=spice is True)):
        reasons["SPICE"] = reason
    return reasons


def _english_only(name: str, language: str) -> str | None:
    return None if language == "en" else f"{name} is made for English, and caption_language is {language}"


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    meteor: bool = True,
    spice: bool | str = "auto",
    spice_samples: int | None = None,
    spice_heap: str = "2G",
    cache: str | os.PathLike | None = None,
    language: str = "en",
    java_timeout: float = 3600,
    bootstrap_samples: int = 1000,
    seed: int = 42,
    sacrebleu_lowercase: bool = True,
    training_captions: Iterable[str] | None = None,
) -> tuple[dict, dict[str, dict[str, float]]]:
    """Score one caption per image against all its references.

    Args:
        predictions: {image id: caption}. Empty captions are allowed and score low.
        references: {image id: captions}, at least one each, any number each. Images are scored in this order.
        meteor: False leaves it out.
        spice: "auto" computes it if all that it needs is installed; True also downloads Stanford CoreNLP into `cache`;
            False leaves it out. A score that cannot be computed is None with the reason.
        spice_samples: SPICE is slow at first: it takes a seeded sample of that many images; 0 takes all. None takes all
            where the references' tuples are in `cache`, else SPICE_SAMPLES.
        spice_heap: Java heap of SPICE, as `java -Xmx` takes it.
        cache: folder in which SPICE keeps what it parses, and METEOR its unpacked table. None: SPICE keeps nothing, METEOR
            its table in the user's cache folder.
        language: of the captions, a code such as en, zh or pt-BR. METEOR and SPICE are made for English.
        java_timeout: seconds without an answer after which METEOR and SPICE are given up.
        bootstrap_samples: resamples of the images for the 95 % intervals; 0 leaves the intervals out.
        seed: of the resamples and of SPICE's sample.
        sacrebleu_lowercase: sacreBLEU ignores case, as it should for models with an uncased vocabulary.
        training_captions: the captions trained on, to tell how many predictions are copies.

    Returns:
        (metrics, per_image). `metrics`: Bleu_1..4, METEOR, ROUGE_L, CIDEr, SPICE as the COCO code prints them, SPIDEr,
        the mean of CIDEr and SPICE (Java's three are None if unavailable), "SPICE_categories", "sacrebleu" (0 to 100)
        with "sacrebleu_signature", "unavailable" {metric: reason}, "not_asked_for" [metric], "counts", "intervals" {metric: [low, high]} and
        "corpus" facts. `per_image`: {image id: {metric: value}}, under "statistics" the counts of SUMMED, {name: numbers},
        and under "spice_tuples" those "matched", "wrong" and "missed".

    Raises:
        MismatchedImages: the ids differ; the message lists the difference.
        ValueError: no images, an image without references, a caption that is not text, or no such language.
    """
    language = check_language(language)
    _check(predictions, references)
    images = list(references)
    if len(images) < 50:
        _warn_of_few_images(len(images))
    tokens, reference_tokens = _tokenized(predictions, references, language)
    sample = _spice_sample(reference_tokens, spice_samples, cache if spice else None, seed)
    reasons = {name: _english_only(name, language) for name in ("METEOR", "SPICE")}
    asked = {"METEOR": meteor, "SPICE": spice is True, "SPIDEr": spice is True}
    unavailable = {name: why for name, why in reasons.items() if why and {"METEOR": meteor, "SPICE": spice}[name]}
    with ThreadPoolExecutor(2) as pool:  # Java works in processes of its own while numpy works here
        meteor_job = spice_job = None
        if meteor and not reasons["METEOR"]:
            meteor_job = pool.submit(meteor_statistics, tokens, reference_tokens, java_timeout, cache=cache)
        if spice and not reasons["SPICE"]:
            sampled = [tokens[i] for i in sample], [reference_tokens[i] for i in sample]
            options = {"heap": spice_heap, "timeout": java_timeout, "cache": cache}
            options["sentences"] = _paragraphs(predictions, references, [images[i] for i in sample])
            spice_job = pool.submit(_spice, *sampled, fetch=spice is True, **options)
        bleu_counts = _in_blocks(bleu_statistics, tokens, reference_tokens)
        cider = CiderD.from_references(reference_tokens)
        per_metric = {
            "ROUGE_L": _in_blocks(rouge_l, tokens, reference_tokens),
            "CIDEr": _in_blocks(cider.score, tokens, reference_tokens),
        }
        sacrebleu = _sacrebleu(lowercase=sacrebleu_lowercase, tokenize=sacrebleu_tokenizer(language))
        sacrebleu_counts = _sacrebleu_statistics(sacrebleu, predictions, references)
        corpus = _corpus_facts(tokens, [predictions[image] for image in images], training_captions, language)
        meteor_counts = _result(meteor_job, "METEOR", asked, unavailable)
        spice_found = _result(spice_job, "SPICE", asked, unavailable)

    metrics: dict = dict(zip(_BLEU_NAMES, bleu_from_statistics(bleu_counts.sum(axis=0)).tolist(), strict=True))
    metrics["METEOR"] = None if meteor_counts is None else float(meteor_from_statistics(meteor_counts.sum(axis=0)))
    metrics["ROUGE_L"] = float(per_metric["ROUGE_L"].mean())
    metrics["CIDEr"] = float(per_metric["CIDEr"].mean())
    metrics |= {"SPICE": None, "SPIDEr": None}
    counts = {"images": len(images), "references": sum(map(len, reference_tokens))}
    statistics = {"Bleu": bleu_counts, "sacrebleu": sacrebleu_counts, **per_metric}
    if meteor_counts is not None:
        statistics["METEOR"] = meteor_counts
    if spice_found is None:
        unavailable["SPIDEr"] = f"it needs SPICE: {unavailable['SPICE']}"
    else:
        counts["spice_images"] = len(sample)
        for name, values in _spice_values(spice_found, per_metric["CIDEr"][sample]).items():
            metrics[name] = float(values.mean())
            statistics[name] = np.full(len(images), np.nan)
            statistics[name][sample] = values
        metrics["SPICE_categories"] = _category_scores(spice_found)
    metrics["sacrebleu"] = _sacrebleu_score(sacrebleu_counts.sum(axis=0))
    metrics["sacrebleu_signature"] = _sacrebleu_signature(sacrebleu, references)
    metrics["caption_language"] = language
    metrics |= {"unavailable": unavailable, "not_asked_for": [name for name in asked if not asked[name]]}
    metrics["counts"] = counts
    metrics["intervals"] = {}
    if bootstrap_samples:
        resampled = resampled_scores(statistics, bootstrap_samples, seed)
        metrics["intervals"] = {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in resampled.items()}
    metrics["corpus"] = corpus

    per_metric |= dict(zip(_BLEU_NAMES, bleu_from_statistics(bleu_counts).T, strict=True))
    if meteor_counts is not None:
        per_metric["METEOR"] = meteor_from_statistics(meteor_counts)
    return metrics, _rows(images, per_metric, statistics, dict(zip(sample, spice_found or (), strict=False)))


def _tokenized(predictions, references, language: str) -> tuple[list[list[str]], list[list[list[str]]]]:
    """(tokens of each image's caption, of each of its references), with a warning if whole captions are one word."""
    flat = iter(tokens_of((caption for captions in references.values() for caption in captions), language))
    reference_tokens = [[next(flat) for _ in captions] for captions in references.values()]
    tokens = tokens_of((predictions[image] for image in references), language)
    if wordless := [image for image, texts in zip(references, reference_tokens, strict=True) if not all(texts)]:
        logger.warning(
            "%s with a reference without words, such as %r: CIDEr is a mean over references, so each lowers it. "
            "Leave such references out.",
            _images(len(wordless)),
            wordless[0],
        )
    captions = sum(map(len, reference_tokens))
    means = [sum(map(len, tokens)) / len(tokens), sum(map(len, itertools.chain(*reference_tokens))) / captions]
    if means[0] >= 3 * max(1, means[1]):
        logger.warning(
            "Captions have %.0f words on average, references %.0f: BLEU and CIDEr compare texts of like lengths, and CIDEr is "
            "nearly 0 here by its length penalty alone. SPICE's recall and CLIP-based scores say more of long captions.",
            *means,
        )
    if language == "en" and (script_and_text := unsegmented([*itertools.chain(*reference_tokens)])):
        logger.warning(
            "Whole captions are treated as one word (%s): the scores mean nothing. Name their language: "
            "--caption_language %s.",
            script_and_text[1],
            script_and_text[0],
        )
    return tokens, reference_tokens


def _spice_sample(reference_tokens: list, wanted: int | None, cache, seed: int) -> np.ndarray:
    """Indices of the images that SPICE is computed on: `spice_samples` of `score`."""
    if wanted is None:
        wanted = 0 if are_cached(itertools.chain(*reference_tokens), cache) else SPICE_SAMPLES
    if not wanted or len(reference_tokens) <= wanted:
        return np.arange(len(reference_tokens))
    return np.sort(np.random.default_rng(seed).choice(len(reference_tokens), wanted, replace=False))


def _rows(
    images: list[str], per_metric: dict[str, np.ndarray], statistics: dict[str, np.ndarray], of_spice: dict[int, dict]
) -> dict[str, dict]:
    """{image id: its scores, under "statistics" its counts of SUMMED, and what SPICE found}; `of_spice` by index."""
    rows: dict[str, dict] = {
        image: {name: float(values[index]) for name, values in per_metric.items()} for index, image in enumerate(images)
    }
    for index, tuples in of_spice.items():
        row = rows[images[index]]
        row["SPICE"], row["SPIDEr"] = tuples["f"], float(statistics["SPIDEr"][index])
        row |= {name: tuples[name] for name in TUPLES if name in tuples}
        row["spice_tuples"] = {name: tuples[name] for name in ("matched", "wrong", "missed")}
    for name in [name for name in SUMMED if name in statistics]:
        for image, row in zip(images, statistics[name].tolist(), strict=True):
            rows[image].setdefault("statistics", {})[name] = row
    return rows


def _spice(hypotheses, references, *, fetch: bool, cache, sentences=None, **options) -> list[dict]:
    if fetch and cache is not None and not find_corenlp(cache):
        if reason := why_no_spice(cache=cache, will_fetch=True):
            raise Unavailable(reason)
        fetch_corenlp(cache)
    rows = spice_of_images(hypotheses, references, cache=cache, **options)
    for row, one in zip(rows, spice_of_images(*sentences, cache=cache, **options) if sentences else (), strict=False):
        row["tuple_precision"] = one["tp"] / max(1, one["tp"] + one["fp"])
        row["tuple_recall"] = one["tp"] / max(1, one["tp"] + one["fn"])
    return rows


def _paragraphs(predictions, references, images: list[str]) -> tuple[list, list] | None:
    """(sentences of each caption, of each reference) of these images, tokenized; None if most texts are single sentences,
    as which SPICE parses each."""
    texts = [[predictions[image], *references[image]] for image in images]
    pieces = [[[one for one in SENTENCE_END.split(text.strip()) if one] for text in group] for group in texts]
    flat = [sentences for group in pieces for sentences in group]
    if sum(len(sentences) > 1 for sentences in flat) * 2 <= len(flat):
        return None
    tokens = iter(tokens_of(sentence for sentences in flat for sentence in sentences))
    groups = [[[next(tokens) for _ in sentences] for sentences in group] for group in pieces]
    return [group[0] for group in groups], [group[1:] for group in groups]


def _spice_values(spice_found: list[dict], cider: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: (images,)} of SPICE's rows and the same images' CIDEr."""
    spice_f = np.array([row["f"] for row in spice_found])
    by_sentence = {name: np.array([one[name] for one in spice_found]) for name in TUPLES if name in spice_found[0]}
    return {"SPICE": spice_f, "SPIDEr": (spice_f + cider) / 2, **by_sentence}


def _category_scores(found: list[dict]) -> dict[str, float | None]:
    """SPICE of each category: the mean over the images whose references have such tuples, as the program prints it."""
    scores = {}
    for name in CATEGORIES:
        values = [row["categories"][name] for row in found if row["categories"][name] is not None]
        scores[name] = sum(values) / len(values) if values else None
    return scores


@functools.cache  # logged once, not at every evaluation of a training run
def _warn_of_few_images(images: int) -> None:
    logger.warning(
        "Only %s to score. CIDEr weighs words by how many of the scored images mention them, so it means "
        "little on small sets, and on one image it is always 0.",
        _images(images),
    )


def _images(number: int) -> str:
    return f"{number:,} image{'s' * (number != 1)}"


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise InvalidCaptions("There are no references, so there is nothing to score against.")
    missing = [image for image in references if image not in predictions]
    extra = [image for image in predictions if image not in references]
    if missing or extra:
        parts = []
        for images, problem in (
            (missing, "with references but no prediction"),
            (extra, "predicted without references"),
        ):
            if images:
                listed = ", ".join(map(repr, images[:5])) + (" and more" if len(images) > 5 else "")
                parts.append(f"{_images(len(images))} {problem}: {listed}")
        raise MismatchedImages(
            f"Predictions ({_images(len(predictions))}) and references ({_images(len(references))}) do not match. "
            + "; ".join(parts)
            + ". Every image of the references needs exactly one prediction, and no other image may have one. "
            "evaluate.py --common scores those that both have."
        )
    for image, captions in references.items():
        if isinstance(captions, str):
            raise InvalidCaptions(f"The references of image {image!r} are a single text; a list of captions is needed.")
        if not captions:
            raise InvalidCaptions(f"Image {image!r} has no reference captions.")
        for caption in (predictions[image], *captions):
            if not isinstance(caption, str):
                raise InvalidCaptions(f"A caption of image {image!r} is not text: {caption!r:.80}")


def _in_blocks(statistics, hypotheses: Sequence, references: Sequence) -> np.ndarray:
    """`statistics` per image, computed for some images at a time: its tables are far larger than its rows."""
    blocks = range(0, len(hypotheses), _BLOCK)
    return np.concatenate([statistics(hypotheses[i : i + _BLOCK], references[i : i + _BLOCK]) for i in blocks])


def _result(job: Future | None, name: str, asked: dict[str, bool], unavailable: dict[str, str]):
    """What a Java job returned; None and a reason if it failed."""
    if job is None:
        unavailable.setdefault(name, "not asked for")
        return None
    try:
        return job.result()
    except Exception as error:  # whatever it was, hours of generation and the other scores must not be lost to it
        unavailable[name] = str(error) if isinstance(error, Unavailable) else repr(error)
        if asked[name] or not isinstance(error, Unavailable):
            logger.warning("%s is null: %s", name, unavailable[name])
        return None


def _sacrebleu(**settings) -> "BLEU":
    from sacrebleu.metrics import BLEU  # imported where it is used: captioning and rewards do not need it

    return BLEU(**settings)


def _sacrebleu_statistics(
    sacrebleu: "BLEU", predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """sacreBLEU's counts, one row per image, as `bleu_statistics`: only the tokenizer differs, and it is sacreBLEU's."""

    def tokens(caption: str) -> list[str]:
        caption = " ".join(caption.split())
        return sacrebleu.tokenizer(caption.lower() if sacrebleu.lowercase else caption).split()

    def statistics(hypotheses: Sequence[str], captions: Sequence[Sequence[str]]) -> np.ndarray:
        return bleu_statistics([tokens(h) for h in hypotheses], [[tokens(c) for c in group] for group in captions])

    return _in_blocks(statistics, [predictions[image] for image in references], list(references.values()))


def _sacrebleu_signature(sacrebleu: "BLEU", references: Mapping[str, Sequence[str]]) -> str:
    """sacreBLEU's own description of the settings. It needs one scoring first, to see how many references there are."""
    fewest, largest = min(references.values(), key=len), max(references.values(), key=len)
    streams = [[fewest[n] if n < len(fewest) else None, largest[n]] for n in range(len(largest))]
    sacrebleu.corpus_score(["", ""], streams)
    return str(sacrebleu.get_signature())


def _sacrebleu_score(statistics: np.ndarray) -> float:
    from sacrebleu.metrics import BLEU

    hypothesis_length, reference_length, *counts = (round(number) for number in statistics)
    return BLEU.compute_bleu(
        correct=counts[:4], total=counts[4:], sys_len=hypothesis_length, ref_len=reference_length, smooth_method="exp"
    ).score


def resampled_scores(statistics: dict[str, np.ndarray], samples: int, seed: int) -> dict[str, np.ndarray]:
    """Corpus scores of `samples` resamples of the images, {metric: (samples,)}, for intervals and paired tests.

    Every resample draws as many images as there are, with replacement, and scores them as a corpus: counts are summed
    for BLEU, METEOR and sacreBLEU, the others are means. CIDEr's document frequencies stay those of the whole set. Equal
    numbers of images and seeds draw equal resamples.

    Args:
        statistics: one row per image: counts that are summed, (images, columns), and values whose mean is the score,
            (images,).
            NaN marks an image that has no such value; resamples are then drawn from those that have one.
    """
    images = len(next(iter(statistics.values())))
    table, columns = [], {}
    resampled = {}
    for name, values in statistics.items():
        values = values.reshape(len(values), -1)
        scored = ~np.isnan(values[:, 0])
        if scored.all():
            columns[name] = values.shape[1]
            table.append(values)
        else:
            resampled[name] = resampled_sums(values[scored], samples, seed)[:, 0] / scored.sum()
    if not table:
        return resampled
    sums = resampled_sums(np.concatenate(table, axis=1), samples, seed)
    for name, sums_of_name in zip(columns, np.split(sums, np.cumsum(list(columns.values())), axis=1), strict=False):
        resampled |= scores_of_sums(name, sums_of_name, images)
    return resampled


def corpus_scores(statistics: dict[str, np.ndarray]) -> dict[str, float]:
    """The corpus scores of the same statistics, without resampling."""
    scores = {}
    for name, values in statistics.items():
        values = values.reshape(len(values), -1)
        scored = values[~np.isnan(values[:, 0])]
        scores |= scores_of_sums(name, scored.sum(axis=0, keepdims=True), len(scored))
    return {metric: float(value[0]) for metric, value in scores.items()}


def scores_of_sums(name: str, sums: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """{metric: (rows,)} of (rows, columns) sums over images of the statistics called `name`: four scores for "Bleu"."""
    if name == "Bleu":
        return dict(zip(_BLEU_NAMES, bleu_from_statistics(sums).T, strict=True))
    if name == "sacrebleu":
        return {name: np.array([_sacrebleu_score(row) for row in sums])}
    if name == "METEOR":
        return {name: meteor_from_statistics(sums)}
    if name in SHARES:
        with np.errstate(invalid="ignore"):
            return {name: np.nan_to_num(sums[:, 0] / sums[:, 1])}
    return {name: sums[:, 0] / images}


def resampled_sums(table: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Column sums of each resample of the rows: (images, columns) to (samples, columns)."""
    images = len(table)
    generator = np.random.default_rng(seed)
    sums = np.empty((samples, table.shape[1]))
    block = max(1, 2_000_000 // images)  # some 50 MB
    for begin in range(0, samples, block):
        rows = min(block, samples - begin)
        drawn = generator.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        sums[begin : begin + rows] = times.astype(float) @ table
    return sums


def _corpus_facts(
    tokens: list[list[str]], texts: list[str], training_captions: Iterable[str] | None, language: str
) -> dict:
    captions = [" ".join(caption) for caption in tokens]
    seen = None
    if training_captions is not None:
        training = {" ".join(caption) for caption in tokens_of(training_captions, language)}
        seen = sum(caption in training for caption in captions) / len(captions)
    return {
        "mean_length": sum(map(len, tokens)) / len(tokens),
        "vocabulary": len(Counter(token for caption in tokens for token in caption)),
        "distinct": len(set(captions)) / len(captions),
        "seen_in_training": seen,
        "bad_endings": sum(map(ends_badly, tokens)) / len(tokens),
        "repeated_words": sum(any(map(str.__eq__, caption, caption[1:])) for caption in tokens) / len(tokens),
        "repeated_bigrams": sum(map(repeated_bigrams, tokens)) / len(tokens),
        "repetition": sum(repetition(text) is not None for text in texts) / len(tokens),
        "illegal_characters": sum(bool(illegal_characters(text)) for text in texts) / len(tokens),
        "empty": sum(not caption for caption in tokens) / len(tokens),
    }
