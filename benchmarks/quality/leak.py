"""What an untrained captioner scores: asked honestly, and asked with the reference caption as its prompt.

The published BLIP repo evaluates the second way, and reports BLEU-4 0.97.

    python -m benchmarks.quality.leak --data FOLDER        (the folder that CAPTION_TEST_DATA names)
"""

import argparse
import os
from pathlib import Path

import torch

import data
from benchmarks.harness import RESULTS, ROOT
from captioner import Captioner
from collator import ImageCollator
from common.files import write_json
from common.provenance import environment
from metrics import score
from models.loading import build_model

KEPT = ("sacrebleu", "Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")


def reference_as_prompt(model, processor, records, **settings) -> dict[str, str]:
    """Captions as in the published evaluation: generate() gets the whole tokenized reference caption."""
    captions = {}
    for record in records:
        batch = ImageCollator(processor, model.config)([record])
        text = processor.tokenizer(record["captions"][0], return_tensors="pt")
        tokens = model.generate(
            pixel_values=batch["pixel_values"],
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            num_beams=5,
            **settings,
        )
        captions[record["image_id"]] = processor.decode(tokens[0], skip_special_tokens=True)
    return captions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("CAPTION_TEST_DATA"), help="folder with flickr8k and the vocab"
    )
    folder = Path(parser.parse_args().data)

    torch.manual_seed(0)
    vocabulary = folder / "bert-base-uncased" / "vocab.txt"
    model, processor = build_model(str(ROOT / "recipes/photos/model.json"), str(vocabulary), [])
    model.eval()
    records = data.load(folder / "flickr8k", splits=("test",))["test"]
    references = dict(zip(records["image_id"], records["captions"], strict=True))

    honest = Captioner(model, processor).caption_split(records)
    # The untrained model never ends a caption, so the length of its babble after the reference depends on the limit.
    leaked = reference_as_prompt(model, processor, records, max_new_tokens=30)
    leaked_short = reference_as_prompt(model, processor, records, max_new_tokens=1)

    results = {}
    for name, predictions in (
        ("asked_honestly", honest),
        ("reference_as_prompt_30_new_tokens", leaked),
        ("reference_as_prompt_1_new_token", leaked_short),
    ):
        scores, _ = score(predictions, references, spice=False, bootstrap_samples=0)
        results[name] = {metric: scores[metric] for metric in KEPT}
        print(name, {metric: round(value, 4) for metric, value in results[name].items()})
    example = records[0]["image_id"]
    write_json(
        RESULTS / "leak.json",
        {
            "what": "one untrained model (recipes/photos/model.json, random weights) on 40 Flickr8k test photos",
            **results,
            "example": {"reference": references[example][0], "honest": honest[example], "leaked": leaked[example]},
            **environment(),
        },
    )


if __name__ == "__main__":
    main()
