"""A sweep of 9 generation settings compared with one evaluation, and with nine.

    CAPTION_TEST_DATA=... python -m benchmarks.speed.sweep [--model FOLDER --images 200]

Without --model: BLIP-base at 384 px with random weights, which never end a caption, so each has 20 tokens. An evaluation
captions the photographs with 5 beams and scores them; the sweep does so with 1, 3 and 5 beams times three length penalties.
Both run in one process, in turns; loading the model is not timed.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import data
from arguments import MetricArguments
from benchmarks.harness import RESULTS
from captioner import Captioner
from common.files import write_json
from common.provenance import environment
from models.loading import build_model
from reports.outputs import score_records
from reports.sweep import score_sweep, sweep_settings

SWEEP = "num_beams=1,3,5 length_penalty=0.6,1.0,1.4"


def blip_base(vocab: Path):
    config = {"vision_config": {"image_size": 384}, "text_config": {"num_attention_heads": 12}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        model, processor = build_model(str(path), str(vocab), [])
    return Captioner(model.eval(), processor, max_new_tokens=20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a trained captioner's folder; default: BLIP-base with random weights")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = Path(os.environ["CAPTION_TEST_DATA"])

    captioner = (
        Captioner.from_pretrained(args.model) if args.model else blip_base(folder / "bert-base-uncased/vocab.txt")
    )
    records = data.load(folder / "flickr8k", splits=("train",), max_samples={"train": args.images})["train"]
    settings = sweep_settings(SWEEP)
    metric_args = MetricArguments(meteor=False, spice=False)
    captioners = [captioner.with_settings(**setting) for setting in settings]

    def evaluation():
        captions = captioner.with_settings(num_beams=5).caption_split(records, batch_size=args.batch_size)
        captioned = time.perf_counter()
        score_records(captions, records, metric_args, seed=42)
        return captioned

    def sweep():
        captions = captioner.sweep_split(records, captioners, batch_size=args.batch_size)
        captioned = time.perf_counter()
        score_sweep(settings, captions, records, "CIDEr", metric_args, seed=42)
        return captioned

    def one_by_one():
        for one in captioners:
            score_records(one.caption_split(records, batch_size=args.batch_size), records, metric_args, seed=42)
        return time.perf_counter()

    turns = {"evaluation": evaluation, "sweep": sweep, "one_by_one": one_by_one}
    seconds = {name: [] for name in turns}
    captioning = {name: [] for name in turns}
    for turn in range(args.repeats + 1):  # the first warms up
        for name, run in turns.items():
            start = time.perf_counter()
            captioned = run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                captioning[name].append(captioned - start)
        print({name: values[-1:] for name, values in seconds.items()})
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "model": Path(args.model).name if args.model else "BLIP-base, random weights",
        "images": len(records),
        "sweep": SWEEP,
        "seconds": seconds,
        "of_which_captioning": {name: captioning[name] for name in ("evaluation", "sweep")},
        "sweep_to_one_evaluation": medians["sweep"] / medians["evaluation"],
        "nine_evaluations_to_sweep": medians["one_by_one"] / medians["sweep"],
    }
    name = "sweep_trained" if args.model else "sweep_blip_base"
    write_json(RESULTS / f"{name}.json", result | environment())
    print(json.dumps({name: value for name, value in result.items() if name != "seconds"}, indent=2))


if __name__ == "__main__":
    main()
