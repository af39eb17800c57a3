"""The COCO captioning scores as a module of the `evaluate` library: `evaluate.load("path/to/metrics/coco_caption")`.

`evaluate` copies this file, and the files next to it that it imports by name, into a cache and runs them from there; so
every scorer is imported here, whether used here or not.
"""

import os

import datasets

import evaluate

from .bleu import bleu_statistics
from .cider import CiderD
from .coco import score
from .java import meteor_statistics
from .languages import tokens_of
from .ngrams import encode
from .paraphrases import write_paraphrases
from .rouge import rouge_l
from .spice import spice as spice_of_images
from .spice_program import CATEGORIES
from .text_checks import repetition
from .tokenizer import tokenize

_DESCRIPTION = """\
The scores of image captions: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr and SPICE as the COCO evaluation code computes
them, and sacreBLEU, with 95 % intervals over images. All but METEOR and SPICE need no Java.
"""

_INPUTS = """
Args:
    predictions: list of str, one caption per image.
    references: list of lists of str, all reference captions of each image, any number of them.
    meteor: False leaves it out. Otherwise, if it cannot be computed, it is None, and `unavailable` says why.
    spice: "auto" computes it where Java and Stanford CoreNLP are found, True also downloads CoreNLP, False leaves it out.
    spice_samples: SPICE is slow at first, so it takes a seeded sample of that many images; 0 takes all. None takes all where
        the references were parsed before, else 1500.
    language: of the captions, such as en, zh, ja or pt-BR. METEOR and SPICE are for English.
    bootstrap_samples: resamples of the images for the 95 % intervals; 0 leaves the intervals out.
    seed: of the resamples and of SPICE's sample.
Returns:
    Bleu_1, Bleu_2, Bleu_3, Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE: float as the COCO code prints them, or None.
    sacrebleu: float from 0 to 100, and sacrebleu_signature.
    intervals: {score: [low, high]}.
    unavailable: {score: reason}.
    counts, corpus: facts about the captions (mean length, share of distinct ones, of bad endings, ...).
Example:
    >>> metric = evaluate.load("path/to/metrics/coco_caption")
    >>> scores = metric.compute(
    ...     predictions=["a dog runs", "a red car"],
    ...     references=[["a dog runs on grass", "the dog is running"], ["a red car on a road"]],
    ...     meteor=False, spice=False)
    >>> round(scores["Bleu_1"], 4)
    0.5134
"""

_CITATION = """\
@article{chen2015microsoft,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
          Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  journal={arXiv preprint arXiv:1504.00325},
  year={2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class CocoCaption(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/1504.00325", "https://github.com/tylin/coco-caption"],
        )

    def _compute(
        self,
        predictions,
        references,
        meteor=True,
        spice="auto",
        spice_samples=None,
        language="en",
        bootstrap_samples=1000,
        seed=42,
    ):
        metrics, _ = score(
            dict(enumerate(predictions)),
            dict(enumerate(references)),
            meteor=meteor,
            spice=spice,
            spice_samples=spice_samples,
            language=language,
            cache=os.path.join(self.data_dir, "metrics"),
            bootstrap_samples=bootstrap_samples,
            seed=seed,
        )
        return metrics
