"""The one table of scores: how each is called where, how it is shown, which way is better.

A score that is added here is shown by the summary, the report, the model card, comparisons and sweeps wherever it is in
coco_metrics.json. What is not in the table (CLIP-based scores, which are named after their weights) is shown under its own
name with three decimals.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    name: str  # in coco_metrics.json
    label: str  # for people
    hub_id: str | None = None  # of the Hub's metric, for the model card's metadata
    decimals: int = 3
    better_low: bool = False
    per_image: bool = True  # shown with every caption of the report
    main: bool = False  # in the first row of the report
    in_training: bool = False  # computed at every evaluation of a training run
    curve: bool = False  # drawn in its curves

    @property
    def anchor(self) -> str:
        """Its heading in docs/scores.md."""
        return self.label.lower().replace(" ", "-")


SCORES = {
    score.name: score
    for score in (
        Score("CIDEr", "CIDEr", "cider", main=True, in_training=True, curve=True),
        Score("Bleu_4", "BLEU-4", "bleu", main=True, in_training=True),
        Score("METEOR", "METEOR", "meteor", main=True),
        Score("ROUGE_L", "ROUGE-L", "rouge", main=True, in_training=True),
        Score("SPICE", "SPICE", "spice", main=True),
        Score("SPIDEr", "SPIDEr"),
        Score("tuple_precision", "Tuple precision"),
        Score("tuple_recall", "Tuple recall"),
        Score("sacrebleu", "sacreBLEU", "sacrebleu", decimals=1, in_training=True, curve=True),
        Score("Bleu_1", "BLEU-1", "bleu", per_image=False),
        Score("Bleu_2", "BLEU-2", per_image=False),
        Score("Bleu_3", "BLEU-3", per_image=False),
        Score("CLAIR", "CLAIR", main=True),
        Score("caption_qa", "Caption QA"),
        Score("win_rate", "Win rate"),
        Score("CHAIRs", "CHAIRs", better_low=True),
        Score("CHAIRi", "CHAIRi", better_low=True),
        Score("object_recall", "Object recall"),
        Score("scene_facts", "Scene facts", main=True),
    )
}


# The arguments of metrics.score for an evaluation in training: without Java, and without intervals.
QUICK = {"meteor": False, "spice": False, "bootstrap_samples": 0}


def is_shown(name: str, scores: dict) -> bool:
    """Whether people want to read of a score: it was computed, or it was asked for and could not be."""
    missing = name in scores.get("unavailable", {}) and name not in scores.get("not_asked_for", ())
    return scores.get(name) is not None or missing


def score_named(name: str) -> Score:
    return SCORES.get(name) or Score(name, name)


def name_of(text: str) -> str:
    """The name of the score with this label ("BLEU-4"); else the text, which is a name."""
    return next((score.name for score in SCORES.values() if score.label == text), text)


def is_better_low(name: str) -> bool:
    return score_named(name).better_low


def shown(name: str, value: float, signs: bool = False) -> str:
    """The value with the score's own number of decimals."""
    return f"{value:{'+' if signs else ''}.{score_named(name).decimals}f}"


def in_order(names) -> list[str]:
    """These names in the table's order, those not in it last."""
    order = list(SCORES)
    return sorted(names, key=lambda name: order.index(name) if name in SCORES else len(order))
