"""Both published pipelines end to end on drawn scenes with small local models, up to a trained captioner.

    python -m benchmarks.rewriting.rewrite_pipelines [paragraph] [fuse]

paragraph   a small LLM turns the five captions of a scene into a paragraph (rewrite.py paragraph), a captioner is trained
            on the paragraphs (train.py) and scored: n-gram scores, lengths, repetition, and true facts
fuse        infer.py makes synthetic captions with that captioner, a second LLM fuses them with alt texts that name things
            no image shows (rewrite.py fuse, the published prompt), and a captioner is trained on the fused captions

The LLMs are trained for minutes on rule-generated texts and know nothing but these scenes. They stand in for models with
billions of parameters: this shows that every stage works with the next, not that the texts are good.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import data
from benchmarks.harness import RESULTS, ROOT
from benchmarks.rewriting import small_llm
from common.files import write_json
from common.provenance import environment
from drawn_scenes.facts import score_scene_facts
from rewriting.prompts import fill, load_prompt

COUNTS, BRANDS, THINGS = ("", "one", "two", "three"), ("Acme", "Nordlund", "Bellini", "Kato"), ("Poster", "Mug", "Rug")
SCORES = ("Bleu_1", "Bleu_4", "CIDEr", "sacrebleu", "scene_facts", "corpus", "counts")


def run(*words) -> float:
    words = [sys.executable, *map(str, words)]
    print("$", *words, flush=True)
    start = time.perf_counter()
    subprocess.run(words, cwd=ROOT, check=True)
    return time.perf_counter() - start


def paragraph_of(facts: dict) -> str:
    """Two sentences that state all facts of a scene: what the LLM is trained to write from its captions."""
    groups = facts["objects"]
    nouns = [f"{COUNTS[g['count']]} {g['size']} {g['colour']} {g['shape']}{'s' * (g['count'] > 1)}" for g in groups]
    first = f"The picture shows {' and '.join(nouns)}."
    if not facts["relations"]:
        return first
    subject, relation, other = facts["relations"][0]
    names = [f"the {g['colour']} {g['shape']}{'s' * (g['count'] > 1)}" for g in groups]
    place = f"to the {relation}" if relation.endswith(" of") else relation
    verb = "are" if groups[subject]["count"] > 1 else "is"
    return f"{first} {names[subject].capitalize()} {verb} {place} {names[other]}."


def captioner(dataset: Path, folder: Path, steps: int, *more) -> dict:
    """Run train.py with the quickstart's model for a few steps; return its test scores."""
    seconds = run(
        "train.py", "recipes/quickstart/scenes.yaml", "--dataset_name", dataset, "--caption_column", "caption",
        "--output_dir", folder, "--max_steps", steps, "--eval_steps", steps, "--save_steps", steps, "--max_txt_len", 48,
        "--max_new_tokens", 40, "--captions_per_image", 1, "--meteor", "false", "--max_test_samples", 200,
        "--max_eval_samples", 50, *more,
    )  # fmt: skip
    scores = json.loads((folder / "coco_metrics.json").read_text(encoding="utf-8"))
    predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))[:4]
    return {
        "steps": steps,
        "seconds": seconds,
        "test": {k: scores[k] for k in SCORES if k in scores},
        "captions": predictions,
    }


def rewritten(output: Path) -> dict:
    report = json.loads((output.with_name(f"{output.name}.shards") / "_report.json").read_text(encoding="utf-8"))
    wanted = ("status", "rejected", "words", "vocabulary", "tokens", "rows_with_unsupported_names_or_numbers")
    return {key: report[key] for key in wanted} | {"samples": report["samples"].get("rewritten", [])[:3]}


def paragraph(folder: Path) -> dict:
    prompt_file = folder / "prompt.txt"
    prompt_file.write_text("{captions}\nParagraph:", encoding="utf-8")
    prompt, scenes = load_prompt("paragraph", str(prompt_file)), data.load("scenes")
    rows = [(row["captions"], json.loads(row["facts"])) for row in scenes["train"].select(range(3000))]
    pairs = [(fill(prompt, {"captions": captions}), paragraph_of(facts)) for captions, facts in rows]
    llm = small_llm.train(pairs, folder / "llm", steps=300, vocabulary=600)
    output = folder / "paragraphs"
    seconds = run(
        "rewrite.py", "paragraph", "scenes", "--output", output, "--llm", f"hf:{folder / 'llm'}", "--chat", "false",
        "--prompt_file", prompt_file, "--max_new_tokens", 60, "--num_beams", 1, "--per_device_batch_size", 64,
    )  # fmt: skip
    test = data.load(str(output), caption_column="caption")["test"]
    texts = dict(zip(test["image_id"], (captions[0] for captions in test["captions"]), strict=True))
    truth = score_scene_facts(texts, dict(zip(test["image_id"], test["facts"], strict=True)))
    return {
        "llm": llm,
        "rewrite": {"seconds": seconds, "truth_of_the_paragraphs": truth, **rewritten(output)},
        "captioner": captioner(output, folder / "captioner", 400),
    }


def fuse(folder: Path, trained: Path, count: int = 1000) -> dict:
    """Alt texts name a brand and an article that no image shows; the image's facts come from the captioner."""
    rng, prompt = random.Random(0), load_prompt("fuse")
    rows, pairs = [], []
    (folder / "photos").mkdir()
    for number, row in enumerate(data.load("scenes")["train"].select(range(count))):
        facts = json.loads(row["facts"])
        article = f"{rng.choice(BRANDS)} {rng.choice(THINGS)} No {rng.randrange(1, 100)}"
        raw, true = f"{article} - {facts['objects'][0]['shape']} free shipping", paragraph_of(facts)
        name = f"photos/{number:05}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        split = ("validation" if number % 30 == 0 else "test") if number % 15 == 0 else "train"
        rows.append({"image": name, "text": raw, "split": split, "facts": row["facts"]})
        fused = f"The {article} shows {true.removeprefix('The picture shows ')}"
        pairs.append((fill(prompt, {"raw": raw, "synthetic": true}), fused))
    (folder / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    inferred = run(
        "infer.py", folder / "photos", "--model_name_or_path", trained, "--output", folder / "synthetic.jsonl",
        "--num_beams", 1, "--per_device_eval_batch_size", 64,
    )  # fmt: skip
    llm = small_llm.train(pairs, folder / "llm", steps=200, batch_size=16, vocabulary=600)
    output = folder / "fused.jsonl"
    seconds = run(
        "rewrite.py", "fuse", folder / "raw.jsonl", "--raw_column", "text", "--synthetic_file", folder / "synthetic.jsonl",
        "--output", output, "--llm", f"hf:{folder / 'llm'}", "--chat", "false", "--num_beams", 1,
        "--per_device_batch_size", 64,
    )  # fmt: skip
    return {
        "synthetic_captions": {"images": len(rows), "seconds": inferred},
        "llm": llm,
        "rewrite": {"seconds": seconds, **rewritten(output)},
        "captioner": captioner(output, folder / "captioner", 200),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["paragraph", "fuse"], help="default: both")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/benchmark/pipelines")
    arguments = parser.parse_args()
    for name in arguments.what:
        folder = arguments.runs.resolve() / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result = paragraph(folder) if name == "paragraph" else fuse(folder, folder.parent / "paragraph/captioner")
        write_json(RESULTS / f"rewrite_{name}.json", {**result, **environment()})
        print(json.dumps(result, indent=2, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
