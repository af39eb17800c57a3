"""What SPICE costs on COCO's Karpathy test split: 5,000 images, first run and second run.

    CAPTION_TEST_DATA=... CORENLP_DIR=... python -m benchmarks.speed.spice [--output benchmarks/results/spice.json]

The first run parses every distinct caption; the second, of another model's captions (here the first reference of each
image, against the others), finds the references' tuples kept. Times are of the clock and of the CPU: the second counts
where other work shares the machine.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_predictions, load_references
from metrics import tokenize
from metrics.coco_caption.java import cores
from metrics.coco_caption.spice import spice


def tokens_of(captions: dict, images: list[str]) -> list[list[str]]:
    return tokenize(captions[image] for image in images)


def timed(hypotheses, references, cache) -> tuple[dict, list[dict]]:
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = spice(hypotheses, references, cache=cache, timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    distinct = {" ".join(tokens) for group in (hypotheses, *references) for tokens in group}
    mean = sum(of_one["f"] for of_one in found) / len(found)
    result = {"seconds": round(time.perf_counter() - clock, 1), "cpu_seconds": round(cpu, 1), "SPICE": mean}
    return result | {"distinct_captions": len(distinct)}, found


def unlike(program: dict, images: list[str], found: list[dict]) -> str:
    """How many of the images that the program itself scored have another value here."""
    ours = dict(zip(images, found, strict=True))
    rows = [row for row in program["per_image"] if str(row["image_id"]) in ours]
    pairs = [(row, ours[str(row["image_id"])]) for row in rows]
    differ = sum(any(row[name] != of_one[name] for name in ("f", "tp", "fp", "fn")) for row, of_one in pairs)
    return f"{differ} of {len(rows)}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/spice.json"))
    arguments = parser.parse_args()
    folder = Path(os.environ["CAPTION_TEST_DATA"]) / "coco_karpathy_test"
    predictions = load_predictions(folder / "predictions_contrastive.json")
    everything = load_references(folder / "captions_karpathy_test.json")
    images = list(predictions)[: arguments.images]
    program = json.loads((folder / "spice.json").read_text(encoding="utf-8"))
    references = [tokenize(everything[image]) for image in images]
    record = {"images": len(images), "threads": cores(), **environment()}
    with tempfile.TemporaryDirectory() as cache:
        hypotheses = tokens_of(predictions, images)
        record["first_run"], first = timed(hypotheses, references, cache)
        record["same_captions_again"], again = timed(hypotheses, references, cache)
        assert again == first
        record["first_run"]["unlike_the_program"] = unlike(program["contrastive_500"], images, first)
        human = [captions[0] for captions in references]
        others = [captions[1:] for captions in references]
        record["another_model_same_references"], found = timed(human, others, cache)
        record["another_model_same_references"]["unlike_the_program"] = unlike(program["human_200"], images, found)
        record["cache_mb"] = round(sum(file.stat().st_size for file in Path(cache).iterdir()) / 2**20, 1)
    write_json(arguments.output, record)
    print(record)


if __name__ == "__main__":
    main()
