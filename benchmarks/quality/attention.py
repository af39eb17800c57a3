"""Whether a word for a shape attends to that shape: the quickstart model's attention maps on drawn scenes, whose object
positions are known.

    python -m benchmarks.quality.attention runs/quickstart        (a model that `make quickstart` trained)

For a word that names a shape: the share of its map that falls on the shape's patches, divided by these patches' share of
the image; 1 is chance. The control is the same word's share on the other group of objects.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import RESULTS
from captioner import Captioner
from collator import IGNORE
from common.files import write_json
from common.provenance import environment
from drawn_scenes import drawing as scenes
from drawn_scenes.facts import WORDS
from metrics.coco_caption.coco import resampled_sums
from reports.attention_maps import attention_maps, cross_attention

SCENES, SEED = 500, 1  # the layers were chosen on scenes of seed 0


def draw_scenes() -> tuple[list, list]:
    """Records of the test split, and the slots (row, column) of each record's groups of objects."""
    slots, place = [], scenes.place

    def place_and_note(facts, rng):
        slots.append(place(facts, rng))
        return slots[-1]

    scenes.place = place_and_note
    return list(scenes.load(train=0, validation=0, test=SCENES, seed=SEED)["test"]), slots


def times_chance(heat: np.ndarray, slots: list) -> float:
    """The share of a (GRID, GRID) map on these slots, over their share of the image."""
    return sum(heat[slot] for slot in slots) / heat.sum() / (len(slots) / heat.size)


def summary(values: list) -> dict:
    """Mean over scenes, with its 95 % bootstrap interval."""
    table = np.array(values)[:, None]
    means = resampled_sums(table, 1000, seed=0)[:, 0] / len(table)
    return {"mean": float(table.mean()), "interval": np.percentile(means, [2.5, 97.5]).tolist()}


def main():
    folder = Path(sys.argv[1])
    captioner = Captioner.from_pretrained(folder)
    found = {name: [] for name in ("own shape", "other group", "pointed at own shape", "chance of that")}
    layers: dict[str, list] = {}
    for row, groups in zip(*draw_scenes(), strict=True):
        shapes = [group["shape"] for group in json.loads(row["facts"])["objects"]]
        if shapes[0] == shapes[1]:
            continue  # a word does not say which of the two it means
        words, maps = attention_maps(captioner, row["image"], row["captions"][0])
        batch = captioner.collator([row])
        tokens = captioner.collator.target_ids(row["captions"][:1])[0][:-1]
        batch = captioner.training_batch(batch, [tokens])
        every = cross_attention(captioner.model, batch)[:, :, 0, :, 1:].mean(1)  # layers, length, patches
        first = int((batch["labels"][0] != IGNORE).nonzero()[0, 0])
        of_scene = {name: [] for name in found}
        for word, heat in zip(words, maps, strict=True):
            kind, shape = WORDS.get(word.strip(",.").lower(), ("", ""))
            if kind != "shape":
                continue
            own, other = groups if shape == shapes[0] else reversed(groups)
            of_scene["own shape"].append(times_chance(heat, own))
            of_scene["other group"].append(times_chance(heat, other))
            of_scene["pointed at own shape"].append(np.unravel_index(heat.argmax(), heat.shape) in own)
            of_scene["chance of that"].append(len(own) / heat.size)
        for name, values in of_scene.items():
            found[name].append(np.mean(values))
        for position, token in enumerate(captioner.processor.tokenizer.convert_ids_to_tokens(tokens), first):
            kind, shape = WORDS.get(token, ("", ""))
            if kind == "shape":
                own = groups[shapes.index(shape)]
                for layer, heats in enumerate(every):
                    for where, at in (("predicting", position - 1), ("reading", position)):
                        heat = heats[at].reshape(scenes.GRID, scenes.GRID).numpy()
                        layers.setdefault(f"layer {layer}, {where} the word", []).append(times_chance(heat, own))
    write_json(
        RESULTS / "attention.json",
        {
            "what": f"attention maps of a quickstart model on {len(found['own shape'])} scenes with two different shapes; "
            "share of a shape word's map on the patches named, over these patches' share of the image (1 is chance)",
            "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            **{name.replace(" ", "_"): summary(values) for name, values in found.items()},
            "own_shape_by_layer_and_position": {name: summary(values) for name, values in layers.items()},
            **environment(),
        },
    )


if __name__ == "__main__":
    main()
