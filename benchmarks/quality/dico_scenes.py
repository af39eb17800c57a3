"""DiCO compared with cross-entropy and SCST on the quickstart scenes: what each gains in CLIP-S, and at what cost.

    python -m benchmarks.quality.train_scene_clip runs/scene_clip
    python -m benchmarks.quality.dico_scenes

For each seed one captioner is trained with cross-entropy (train.py, recipes/quickstart/scenes.yaml, --xe_steps). From it
four runs continue for the same number of steps with the same images, optimizer and learning rate: cross-entropy, SCST on
CIDEr, SCST on CLIP-S, DiCO on CLIP-S. The reward CLIP is runs/scene_clip/reward; the other one there, not used in any
training, is the judge. Validation is scored along the way, the test scenes at the end. All results are in
benchmarks/results/dico_scenes.json; docs/dico_tradeoff.png plots each method's path through CIDEr and CLIP-S.

Finished runs are kept in --folder and reused by a call with the same settings and CLIPs: it resumes where a killed one
stopped, and calls with different --seeds can share the work; a final one with all seeds combines them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import get_scheduler

import data
from benchmarks.harness import RESULTS, ROOT
from captioner import Captioner
from collator import IGNORE, CaptionCollator
from common.files import write_json
from common.provenance import environment
from drawn_scenes.facts import ATTRIBUTES, scene_facts, score_scene_facts
from metrics import ends_badly, repeated_bigrams, score, tokenize
from metrics.clip_scores import ClipScorer
from models.loading import load_model
from objectives import CrossEntropy
from objectives.cross_entropy import target_logits
from objectives.dico import Dico
from objectives.policy import SAMPLING, draw
from objectives.rewards import RecordRows, Rewards
from objectives.scst import SelfCritical

START = "the starting model"
METHODS = ("cross-entropy", "SCST on CIDEr", "SCST on CLIP-S", "DiCO on CLIP-S")
SHOWN = (
    "CIDEr", "CLIP-S reward", "CLIP-S judge", "scene_facts", "kl", "distinct", "repeated_bigrams", "bad_endings",
    "mean_length",
)  # fmt: skip


def cross_entropy_model(folder: Path, seed: int, steps: int) -> Path:
    if not (folder / "coco_metrics.json").is_file():
        command = [sys.executable, ROOT / "train.py", ROOT / "recipes/quickstart/scenes.yaml", "--output_dir", folder]
        command += [
            "--seed",
            seed,
            "--max_steps",
            steps,
            "--eval_steps",
            steps,
            "--save_steps",
            steps,
            "--meteor",
            "false",
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{result.stderr[-2000:]}\nThe cross-entropy model of seed {seed} was not trained.")
    return folder


def objective_of(method: str, captioner, rewards: dict, sampled: bool):
    if method == "cross-entropy":
        return CrossEntropy()
    if method == "DiCO on CLIP-S":
        return Dico(captioner, rewards["clip-s"], sampled=sampled)
    return SelfCritical(captioner, rewards["cider" if method == "SCST on CIDEr" else "clip-s"])


def before(start: Path, splits, rewards, scorers) -> dict:
    """The test scores of a starting model, and what DiCO would learn from its beams."""
    model, processor = load_model(str(start))
    captioner = Captioner(model.eval(), processor)
    scores = evaluate(captioner, model, splits["test"], scorers)
    return {
        "test": scores,
        "pairs": what_beams_teach(captioner, splits["train"].select(range(500)), rewards["clip-s"]),
    }


def train(method, start: Path, seed, splits, rewards, scorers, arguments) -> dict:
    """One run: the validation scores at each `eval_steps`, the test scores at the end, seconds of training."""
    model, processor = load_model(str(start))
    captioner = Captioner(model, processor)
    first, _ = load_model(str(start))
    first.eval().requires_grad_(False)
    torch.manual_seed(seed)
    objective = objective_of(method, captioner, rewards, arguments.sampled)
    draws = method != "cross-entropy"
    pairs = data.CaptionPairs(splits["train"], None)
    collator = CaptionCollator(processor, model.config, prompts_only=draws)
    loader = torch.utils.data.DataLoader(
        pairs, arguments.batch_size, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(seed)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(arguments.schedule, optimizer, num_warmup_steps=0, num_training_steps=arguments.steps)
    model.train()
    curve, seconds, step = [], 0.0, 0
    while step <= arguments.steps:
        for batch in loader:
            if step % arguments.eval_steps == 0:
                found = evaluate(captioner, first, splits["validation"], scorers)
                curve.append({"step": step, **found})
                print(
                    f"seed {seed}, {method}, step {step}: " + ", ".join(f"{k} {found[k]:.4f}" for k in SHOWN),
                    flush=True,
                )
            if step == arguments.steps:
                step += 1
                break
            begin = time.perf_counter()
            optimizer.zero_grad()
            objective(model, batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - begin
            step += 1
    test = evaluate(captioner, first, splits["test"], scorers)
    return {"curve": curve, "test": test, "seconds": round(seconds, 1)}


def evaluate(captioner, first, records, scorers: dict) -> dict:
    """Scores of the captions of `records`, and the divergence of the captioner from its starting model."""
    predictions = captioner.caption_split(records, batch_size=50)
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    found, _ = score(predictions, references, meteor=False, spice=False, bootstrap_samples=0)
    result = {name: found[name] for name in ("CIDEr", "Bleu_4")} | found["corpus"]
    for name, scorer in scorers.items():
        result[f"CLIP-S {name}"] = float(
            scorer.score(list(references), records["image"], list(predictions.values()))[0].mean()
        )
    facts = dict(zip(references, records["facts"], strict=True))
    result["scene_facts"] = score_scene_facts(predictions, facts)["scene_facts"]
    result["kl"] = divergence(captioner, first, records)
    return result


@torch.no_grad()
def divergence(captioner, first, records) -> float:
    """Nats per caption: KL of the next-token distribution from the starting model's, summed over sampled captions."""
    rows = [records[i] | {"captions": ["a"], "epoch": 0} for i in range(min(len(records), 200))]
    batch = CaptionCollator(captioner.processor, captioner.model.config, prompts_only=True)(rows)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    drawn = draw(captioner, batch, **SAMPLING, num_return_sequences=1)
    torch.random.set_rng_state(torch_state)
    passed = captioner.training_batch(batch, drawn.tokens)
    was_training = captioner.model.training
    captioner.model.eval()
    own, other = (target_logits(model, passed)[0].log_softmax(dim=-1) for model in (captioner.model, first))
    captioner.model.train(was_training)
    assert len(own) == (passed["labels"] != IGNORE).sum()
    return ((own.exp() * (own - other)).sum() / len(rows)).item()


def what_beams_teach(captioner, records, reward) -> dict:
    """What DiCO would learn from at first: for each image, the beams that the reward likes best and least (tau leaves the
    others almost no weight). Shares of the images where the best states more, as many and fewer true facts, not counting
    relations, which these CLIPs cannot see."""
    captioner = captioner.with_settings(num_beams=5, num_return_sequences=5)
    ahead = []
    for rows in records.iter(batch_size=50):
        samples = [{"image_id": i, "image": image} for i, image in zip(rows["image_id"], rows["image"], strict=True)]
        beams = captioner.caption_batch(captioner.collator(samples))
        rewards, _ = reward(rows["image_id"], beams, None)
        for group, liked, facts in zip(beams, rewards, rows["facts"], strict=True):
            best, worst = (true_facts(group[i], facts) for i in (liked.argmax(), liked.argmin()))
            ahead.append(best - worst)
    return {
        "more": sum(difference > 0 for difference in ahead) / len(ahead),
        "as many": sum(difference == 0 for difference in ahead) / len(ahead),
        "fewer": sum(difference < 0 for difference in ahead) / len(ahead),
    }


def of_references(records, scorers: dict) -> dict:
    """The scores in SHOWN that apply to the reference captions of `records`, each taken as a caption."""
    captions = [text for group in records["captions"] for text in group]
    words = tokenize(captions)
    result = {
        "repeated_bigrams": statistics.mean(map(repeated_bigrams, words)),
        "bad_endings": statistics.mean(map(ends_badly, words)),
        "mean_length": statistics.mean(map(len, words)),
    }
    for name, scorer in scorers.items():
        result[f"CLIP-S {name}"] = float(scorer.score(records["image_id"], records["image"], captions)[0].mean())
    return result


def true_facts(caption: str, facts: str) -> int:
    true, _ = scene_facts(caption, json.loads(facts))
    return sum(true[kind] for kind in ATTRIBUTES)


def table(runs: dict) -> dict:
    """Mean, standard deviation and range over seeds of each method's test scores; for their differences from
    "cross-entropy" with the same seed, mean and standard deviation ("change", "change_sd") and mean size ("distance")."""
    rows = {}
    for method in (START, *METHODS):
        rows[method] = {}
        for name in SHOWN:
            values = [run[method]["test"][name] for run in runs.values()]
            changes = [value - run[METHODS[0]]["test"][name] for value, run in zip(values, runs.values(), strict=True)]
            rows[method][name] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values),
                "min": min(values),
                "max": max(values),
                "change": statistics.mean(changes),
                "change_sd": statistics.stdev(changes),
                "distance": statistics.mean(map(abs, changes)),
            }
    return rows


def plot(runs: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    for axis, name in zip(axes, ("reward", "judge"), strict=True):
        for colour, method in enumerate(METHODS):
            curves = [[(row["CIDEr"], row[f"CLIP-S {name}"]) for row in run[method]["curve"]] for run in runs.values()]
            for points in curves:
                axis.plot(*zip(*points, strict=True), color=f"C{colour}", lw=0.8, alpha=0.3)
                axis.plot(*points[-1], color=f"C{colour}", marker="s", ms=4, alpha=0.3)
            mean = [tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=f"C{colour}", marker="o", ms=4, lw=2.2, label=method)
            axis.plot(*mean[-1], color=f"C{colour}", marker="s", ms=9)
            axis.plot(*mean[0], color="black", marker="*", ms=12, ls="", zorder=3)
        axis.set(xlabel="CIDEr, validation scenes", ylabel=f"CLIP-S of the {name}'s CLIP")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "From the cross-entropy model (star) to the end (square): mean over seeds; single seeds are faint", fontsize=10
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / "runs/scene_clip")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/dico_scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--xe_steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--eval_steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--schedule", default="constant", help="learning rate schedule: constant, linear, cosine")
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--sampled", action="store_true", help="DiCO's candidates are samples instead of beams")
    parser.add_argument("--output", type=Path, default=RESULTS / "dico_scenes.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/dico_tradeoff.png")
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) < 2:
        parser.error("--seeds: give at least two, as differences are compared with the spread over seeds.")

    splits = data.load("scenes")
    references = dict(zip(splits["train"]["image_id"], splits["train"]["captions"], strict=True))
    scorers = {name: ClipScorer.load("clip-s", str(arguments.clips / name)) for name in ("reward", "judge")}
    rows = RecordRows(splits["train"])
    rewards = {name: Rewards({name: 1.0}, references, rows, [scorers["reward"]]) for name in ("cider", "clip-s")}
    settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path) and k != "seeds"}
    settings["clips_sha256"] = {name: scorer.source["sha256"] for name, scorer in scorers.items()}
    runs: dict = {}
    for seed in arguments.seeds:
        start = cross_entropy_model(arguments.folder / f"xe-{seed}", seed, arguments.xe_steps)
        runs[str(seed)] = {}
        for method in (START, *METHODS):
            file = arguments.folder / f"{seed} {method}.json"
            kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if kept.get("settings") != settings:
                if method == START:
                    run = before(start, splits, rewards, scorers)
                else:
                    run = train(method, start, seed, splits, rewards, scorers, arguments)
                kept = {"settings": settings, "run": run, **environment()}
                write_json(file, kept)
            runs[str(seed)][method] = kept["run"] | {"commit": kept["commit"]}
    found = {
        "test": table(runs), "references": of_references(splits["test"], scorers), "settings": settings, "runs": runs,
    }  # fmt: skip
    write_json(arguments.output, found | environment())
    plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
