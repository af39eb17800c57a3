"""The effect of lower precision on captions: how many stay the same, and CIDEr, on the images of a data set.

    python -m benchmarks.quality.precision runs/photos --dataset_name /data/flickr8k --split test
    python -m benchmarks.quality.precision blip-open-out --dataset_name scenes --kinds float32 "ONNX, float32" "ONNX, int8"

The model captions each image with float32, and with each of --kinds: bfloat16 weights (--bf16 of infer.py, demo.py and the
endpoint), int8 linear layers of torch (dynamic quantisation, which no script uses: benchmarks/NOTES.md), the graphs that
export.py --format onnx writes, in float32 and with --int8. CIDEr uses the data set's own
references; its difference from float32's has an interval from a paired bootstrap over the images.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import data
from benchmarks.harness import RESULTS, has_bfloat16, write_result
from benchmarks.speed.captioning import ALSO
from captioner import Captioner
from metrics import CiderD, tokenize

SAMPLES = 10_000
KINDS = ["float32", "bfloat16", "ours, int8 linear layers"]


def captions(kind: str, arguments, records) -> tuple[dict[str, str], float]:
    """{image_id: caption} and the seconds they took."""
    settings = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens}
    loaded = Captioner.from_pretrained(arguments.model, device="cpu", bf16=kind == "bfloat16", **settings)
    if kind in ALSO:
        loaded.model = ALSO[kind](None, loaded.model)
    start = time.perf_counter()
    return loaded.caption_split(records, batch_size=arguments.batch_size), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_beams", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=["float32", "bfloat16", *list(ALSO)[-3:]])
    parser.add_argument("--about", help="a line about the model and the images, for the result file")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    arguments = parser.parse_args()
    records = data.load(arguments.dataset_name, splits=(arguments.split,))[arguments.split]
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    tokens = {image: tokenize(list(found)) for image, found in references.items()}
    scorer = CiderD.from_references(list(tokens.values()))
    draws = np.random.default_rng(0).integers(0, len(references), (SAMPLES, len(references)))
    found, said, cider = {}, {}, {}
    for kind in arguments.kinds:
        said[kind], seconds = captions(kind, arguments, records)
        hypotheses = tokenize([said[kind][image] for image in references])
        cider[kind] = np.asarray(scorer.score(hypotheses, [tokens[image] for image in references]))
        change = cider[kind] - cider["float32"]
        found[kind] = {
            "CIDEr": cider[kind].mean(),
            "CIDEr_change": change.mean(),
            "CIDEr_change_interval_95": np.percentile(change[draws].mean(axis=1), [2.5, 97.5]).tolist(),
            "CIDEr_interval_95": np.percentile(cider[kind][draws].mean(axis=1), [2.5, 97.5]).tolist(),
            "same_captions": float(np.mean([said[kind][image] == said["float32"][image] for image in references])),
            "different_captions": len(set(said[kind].values())),
            "seconds": seconds,
        }
        print(kind, {name: value for name, value in found[kind].items() if not isinstance(value, list)})
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    about = {
        "settings": settings,
        "images": len(references),
        "processor_computes_in_bfloat16": has_bfloat16(torch.device("cpu")),
    }
    write_result(arguments.output, about | {"precisions": found})


if __name__ == "__main__":
    main()
