"""Which word pairs a run's captions repeat: whether repetition is a fault, or the wording of sound captions.

    python -m benchmarks.quality.repeated_pairs runs/dico_scenes/xe-1 runs/dico-scenes

Counts, in each folder's predictions.json, the pairs of neighbouring words that already occurred in their caption, and
writes the most common to benchmarks/results/repeated_pairs.json.
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

from benchmarks.harness import RESULTS
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_predictions
from metrics import tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "repeated_pairs.json")
    arguments = parser.parse_args()
    found = {str(run): count(load_predictions(run / "predictions.json")) for run in arguments.runs}
    write_json(arguments.output, {"runs": found, **environment()})
    print(json.dumps(found, indent=2))


def count(predictions: dict[str, str]) -> dict:
    repeated, pairs = Counter(), 0
    for words in tokenize(predictions.values()):
        of_caption = Counter(map(" ".join, itertools.pairwise(words)))
        pairs += of_caption.total()
        repeated.update({pair: times - 1 for pair, times in of_caption.items() if times > 1})
    return {
        "captions": len(predictions),
        "pairs": pairs,
        "repeated": repeated.total(),
        "commonest": dict(repeated.most_common(8)),
    }


if __name__ == "__main__":
    main()
