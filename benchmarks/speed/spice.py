"""Cost of SPICE on COCO's Karpathy test split: 5,000 images, first run and second run.

    CAPTION_TEST_DATA=... CORENLP_DIR=... python -m benchmarks.speed.spice [--output benchmarks/results/spice.json]

A model that writes like people: its captions are the first reference of each image, its references are the others. (The
system's captions in the test data are one sentence, 5,000 times.) The first run parses every distinct caption. The
second finds the references' tuples cached and only parses the captions, as for a second model: the same captions, removed
from the cache first, so that the score must be the same. A third run has nothing to parse. All values are compared with
those of the original program. Both wall-clock and CPU times are reported: on a shared machine the latter count.
"""

import argparse
import json
import os
import resource
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks.harness import RESULTS
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_predictions, load_references
from metrics import tokenize
from metrics.coco_caption.java import cores, find_java, run
from metrics.coco_caption.spice import spice


def tokens_of(captions: dict, images: list[str]) -> list[list[str]]:
    return tokenize(captions[image] for image in images)


def timed(hypotheses, references, cache) -> tuple[dict, list[dict]]:
    distinct = {" ".join(tokens) for group in (hypotheses, *references) for tokens in group}
    before_parsing = len(distinct & kept(cache))
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = spice(hypotheses, references, cache=cache, timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    mean = sum(of_one["f"] for of_one in found) / len(found)
    result = {"seconds": round(time.perf_counter() - clock, 1), "cpu_seconds": round(cpu, 1), "SPICE": mean}
    result |= {"distinct_captions": len(distinct), "parsed": len(distinct) - before_parsing}
    print(result, f"load {os.getloadavg()[0]:.1f}", flush=True)
    return result, found


def kept(cache) -> set[str]:
    if not (Path(cache) / "spice.sqlite").is_file():
        return set()
    with closing(sqlite3.connect(Path(cache) / "spice.sqlite")) as file:
        return {caption for (caption,) in file.execute("SELECT caption FROM tuples")}


def forget(captions: set[str], cache) -> None:
    with closing(sqlite3.connect(Path(cache) / "spice.sqlite")) as file, file:
        file.executemany("DELETE FROM tuples WHERE caption = ?", [(caption,) for caption in captions])


def unlike(program: dict, images: list[str], found: list[dict]) -> str:
    """How many of the images scored by the original program have a different value here."""
    ours = dict(zip(images, found, strict=True))
    rows = [row for row in program["per_image"] if str(row["image_id"]) in ours]
    pairs = [(row, ours[str(row["image_id"])]) for row in rows]
    differ = sum(value(row) != value(of_one) for row, of_one in pairs)
    return f"{differ} of {len(rows)}"


def value(of_one: dict) -> tuple:
    return tuple(of_one[name] for name in ("f", "tp", "fp", "fn"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--output", default=str(RESULTS / "spice.json"))
    arguments = parser.parse_args()
    folder = Path(os.environ["CAPTION_TEST_DATA"]) / "coco_karpathy_test"
    predictions = load_predictions(folder / "predictions_contrastive.json")
    everything = load_references(folder / "captions_karpathy_test.json")
    images = list(predictions)[: arguments.images]
    program = json.loads((folder / "spice.json").read_text(encoding="utf-8"))
    references = [tokenize(everything[image]) for image in images]
    human = [captions[0] for captions in references]
    others = [captions[1:] for captions in references]
    java = run([find_java(), "-version"], "", timeout=60, errors=True).splitlines()[0]
    record = {"images": len(images), "java": java, "threads_of_java": cores(), **environment()}
    with tempfile.TemporaryDirectory() as cache:
        record["first_run"], first = timed(human, others, cache)
        record["first_run"]["unlike_the_program"] = unlike(program["human_200"], images, first)
        of_references = {" ".join(tokens) for group in others for tokens in group}
        forget({" ".join(tokens) for tokens in human} - of_references, cache)
        for name in ("second_model", "nothing_to_parse"):
            record[name], again = timed(human, others, cache)
            differ = [pair for pair in zip(first, again, strict=True) if pair[0] != pair[1]]
            record[name]["images_with_other_values"] = sum(value(one) != value(other) for one, other in differ)
            record[name]["images_listed_otherwise"] = len(differ)
            record[name]["for_example"] = differ[:1]
        record["one_sentence_for_all"], found = timed(tokens_of(predictions, images), references, cache)
        record["one_sentence_for_all"]["unlike_the_program"] = unlike(program["contrastive_500"], images, found)
        record["cache_mb"] = round((Path(cache) / "spice.sqlite").stat().st_size / 2**20, 1)
    write_json(arguments.output, record | {"load_average": os.getloadavg()})
    print(record)


if __name__ == "__main__":
    main()
