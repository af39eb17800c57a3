"""Train two small CLIPs on the quickstart's scenes, so that CLIP-S means something there: a reward and a judge.

    python -m benchmarks.quality.train_scene_clip runs/scene_clip [--steps 1000]

Writes runs/scene_clip/reward and runs/scene_clip/judge, folders for `--clip_model`, and
benchmarks/results/scene_clip.json: what they distinguish on the test scenes, whose pairs of kinds no CLIP has seen, and
which of several true wordings they prefer. The two share only their architecture: each has its own random weights, its own
drawn scenes and its own order of them. Neither has seen the scenes that the captioners of recipes/ are trained on.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch.nn.functional import cross_entropy, normalize
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, get_cosine_schedule_with_warmup

from benchmarks.harness import RESULTS
from common.files import output_folder, write_json
from common.provenance import environment
from data import open_image
from drawn_scenes import drawing as scenes
from metrics.clip_scores import PREFIX, ClipScorer, preprocess

SEEDS = {"reward": 1, "judge": 2}  # 0 is the seed of the captioners' scenes
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_act": "gelu", "attention_dropout": 0.0}
OUTPUT = RESULTS / "scene_clip.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=10000)
    args = parser.parse_args()
    test = scenes.load(train=0, validation=0, test=500)["test"]
    found = {}
    for name, seed in SEEDS.items():
        folder = output_folder(Path(args.folder) / name)
        start = time.perf_counter()
        train(folder, seed, args)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = {"seed": seed, "seconds": seconds, **examine(folder, test)}
        print(name, json.dumps(found[name]), flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "folder"}
    write_json(
        OUTPUT, {"clips": found, "chance": {"retrieval": 1 / 500, "told_apart": 0.5}, **settings, **environment()}
    )


def train(folder: Path, seed: int, args) -> None:
    """Train one CLIP contrastively (Radford et al., arXiv 2103.00020, figure 3) and save it."""
    records = scenes.load(train=args.scenes, validation=0, test=0, seed=seed)["train"]
    captions = records["captions"][:]
    pixels = np.stack([preprocess(open_image(image), scenes.SIZE) for image in records["image"]])
    tokenizer = word_tokenizer([PREFIX, *(text for group in captions for text in group)])
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = CLIPModel(
        CLIPConfig(
            # One patch is one slot of the scenes' grid.
            vision_config={
                **LAYERS, "hidden_size": 256, "intermediate_size": 1024, "image_size": scenes.SIZE,
                "patch_size": scenes.SIZE // scenes.GRID,
            },
            text_config={
                **LAYERS, "hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 64,
                "vocab_size": len(tokenizer), "bos_token_id": tokenizer.cls_token_id,
                "eos_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=128,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.steps)
    order, target = np.empty(0, dtype=int), torch.arange(args.batch_size)
    for step in range(args.steps):
        if len(order) < args.batch_size:
            order = rng.permutation(len(captions))
        rows, order = order[: args.batch_size], order[args.batch_size :]
        # With the score's prefix, and without it as in DiCO's reward.
        texts = [rng.choice(["", PREFIX]) + rng.choice(captions[row]) for row in rows]
        tokens = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        image = model.visual_projection(model.vision_model(torch.from_numpy(pixels[rows])).pooler_output)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
        logits = model.logit_scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{folder.name}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size=scenes.SIZE, crop_size=scenes.SIZE).save_pretrained(folder)


def word_tokenizer(texts) -> BertTokenizer:
    splitter = BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate([*special, *words])}, do_lower_case=True)


def examine(folder: Path, test) -> dict:
    """Retrieval among the test scenes (a caption that two scenes share counts for both), and for each kind of fact the share
    of scenes whose true caption scores higher than the same caption with that fact wrong. `wordings`: the mean CLIP-S of the
    true caption in each of the scenes' sentence patterns, all of which say the same."""
    scorer = ClipScorer.load("clip-s", str(folder))
    groups, facts = test["captions"][:], [json.loads(text) for text in test["facts"]]
    images = scorer.image_features(test["image_id"], test["image"])
    captions = [text for group in groups for text in group]
    similarity = images @ scorer.text_features([PREFIX + text for text in captions]).T  # (scenes, captions)
    fits = torch.tensor([[text in group for text in captions] for group in map(set, groups)])
    result = {
        "image_to_text": fits[range(len(groups)), similarity.argmax(dim=1)].float().mean().item(),
        "text_to_image": fits[similarity.argmax(dim=0), range(len(captions))].float().mean().item(),
        "told_apart": {},
    }
    for kind in ("count", "size", "colour", "shape", "relation"):
        pairs = []
        for number, scene in enumerate(facts):
            wrong = json.loads(json.dumps(scene))
            change(wrong, kind, random.Random(f"{kind} {number}"))
            pairs += [PREFIX + scenes.describe(s, random.Random(number))[0] for s in (scene, wrong)]
        features = scorer.text_features(pairs).view(len(facts), 2, -1)
        right, other = (images[:, None] * features).sum(dim=-1).unbind(dim=1)
        result["told_apart"][kind] = (right > other).float().mean().item()
    result["wordings"] = {}
    for pattern in scenes.TEMPLATES:
        captions = [scenes.caption_of(scene, random.Random(number), [pattern]) for number, scene in enumerate(facts)]
        result["wordings"][pattern] = float(scorer.score(test["image_id"], test["image"], captions)[0].mean())
    return result


def change(scene: dict, kind: str, rng: random.Random) -> None:
    """Make one fact of a scene wrong, in place."""
    values = {
        "count": scenes.COUNTS, "size": list(scenes.SIZES), "colour": list(scenes.COLOURS), "shape": scenes.SHAPES,
    }  # fmt: skip
    if kind == "relation":
        first, relation, second = scene["relations"][0]
        scene["relations"][0] = [first, scenes.INVERSE[relation], second]
    else:
        group = rng.choice(scene["objects"])
        group[kind] = rng.choice([value for value in values[kind] if value != group[kind]])


if __name__ == "__main__":
    main()
