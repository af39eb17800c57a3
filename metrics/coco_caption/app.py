"""The page of the metric's Space: captions in, scores out."""

import json
from pathlib import Path

import gradio as gr

import evaluate

metric = evaluate.load(str(Path(__file__).parent / "coco_caption.py"))
EXAMPLE = """\
[
  {"prediction": "a dog runs on grass", "references": ["a dog running on the grass", "the brown dog is outside"]},
  {"prediction": "a red car", "references": ["a red car parked on a road", "an old car"]}
]"""


def compute(text: str) -> dict:
    try:
        rows = json.loads(text)
        predictions, references = ([row[name] for row in rows] for name in ("prediction", "references"))
        return metric.compute(predictions=predictions, references=references)
    except (ValueError, TypeError, KeyError) as error:
        raise gr.Error(f'Expected a list of {{"prediction": text, "references": [text, ...]}}: {error}') from None


gr.Interface(
    compute,
    gr.Code(EXAMPLE, language="json", label="Captions and their references"),
    gr.JSON(label="Scores"),
    title="COCO caption scores",
    description=metric.info.description,
).launch()
