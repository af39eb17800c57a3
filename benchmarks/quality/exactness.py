"""evaluate.py's scores compared with pycocoevalcap's, on COCO's Karpathy test split.

    CAPTION_TEST_DATA=... python -m benchmarks.quality.exactness

Twice: for the published system's captions that come with the data (one caption for all 5,000 images), and for each
image's first reference scored against the others, which are as varied as human captions.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.speed.scores import pycocoevalcap_scores
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_predictions, load_references


def evaluate(predictions: dict[str, str], references: dict[str, list[str]]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.json") for name in ("predictions", "references")}
        write_json(files["predictions"], predictions)
        write_json(files["references"], references)
        flags = [word for name, path in files.items() for word in (f"--{name}", path)]
        command = [
            sys.executable,
            ROOT / "evaluate.py",
            *flags,
            "--output_dir",
            Path(folder, "out"),
            "--spice",
            "false",
        ]
        subprocess.run(command, check=True)
        return json.loads(Path(folder, "out", "coco_metrics.json").read_text(encoding="utf-8"))


def main() -> None:
    folder = Path(os.environ["CAPTION_TEST_DATA"], "coco_karpathy_test")
    references = load_references(folder / "captions_karpathy_test.json")
    published = load_predictions(folder / "predictions_contrastive.json")
    first = {image: captions[0] for image, captions in references.items()}
    others = {image: captions[1:] for image, captions in references.items()}

    record, worst = {}, 0.0
    for name, predictions, wanted in (
        ("published captions", published, references),
        ("first reference", first, others),
    ):
        ours, theirs = evaluate(predictions, wanted), pycocoevalcap_scores(predictions, wanted)
        record[name] = {metric: {"pycocoevalcap": value, "ours": ours[metric]} for metric, value in theirs.items()}
        for metric, value in theirs.items():
            print(f"{name:<20} {metric:<8} pycocoevalcap {value:.10f}  ours {ours[metric]:.10f}")
            worst = max(worst, abs(value - ours[metric]))
    print(f"largest difference: {worst:.1e}")
    write_json(
        RESULTS / "exactness.json",
        {"images": len(references), **record, "largest_difference": worst, **environment()},
    )


if __name__ == "__main__":
    main()
