"""SCST and GRPO compared on the quickstart scenes, and what a reward of questions adds: how captions change, step by step.

    python train.py recipes/quickstart/scenes.yaml
    python -m benchmarks.quality.grpo_scenes

From the quickstart's model, for each seed, as many optimizer steps of each method on the same images, with the same optimizer and
learning rate. The rewards are CIDEr, and in one method also the questions of recipes/questions/scenes.yaml, which
drawn_scenes/questions.py answers. Validation scenes are scored along the way, test scenes at the end. Results:
benchmarks/results/grpo_scenes.json, docs/grpo_scenes.png.

    python -m benchmarks.quality.grpo_scenes --kill

trains by recipes/questions/scenes.yaml twice for a few steps; in the second run the server is killed, train.py stops, and the server
and the same command are started again. What was asked and what was learnt are compared: benchmarks/results/grpo_scenes_killed.json.

Finished runs are kept in --folder and reused: the same command resumes after a kill, and calls with other --methods add to them.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import get_scheduler

import data
from benchmarks.harness import RESULTS, ROOT, write_result
from captioner import Captioner
from collator import CaptionCollator
from common.files import write_json
from common.provenance import environment
from drawn_scenes.drawing import load
from drawn_scenes.facts import KINDS, score_scene_facts
from drawn_scenes.questions import Handler, Server, write_questions
from metrics import score
from models.loading import load_model
from objectives.grpo import Grpo
from objectives.rewards import RecordRows, Rewards
from objectives.scst import SelfCritical

SCST, GRPO, TWICE = "SCST", "GRPO, divided by the deviation", "GRPO, two updates per sample, and KL"
QUESTIONS = "SCST on CIDEr and questions"
METHODS = (SCST, GRPO, TWICE, QUESTIONS)
PORT = 8899  # of recipes/questions/rewards.py
JUDGE = "recipes/questions/rewards.py:questions"
SCORES = ("CIDEr", "scene_facts", *KINDS, "words", "distinct")


def objective_of(method: str, captioner, rewards: Rewards, samples: int):
    if method in (SCST, QUESTIONS):
        return SelfCritical(captioner, rewards, samples=samples)
    twice = {"num_iterations": 2, "beta": 0.04} if method == TWICE else {}
    return Grpo(captioner, rewards, num_generations=samples, scale_rewards="group", **twice)


def length_of(logged: dict):
    """Mean tokens of the samples, without their end."""
    if "sample_length" in logged:
        return logged["sample_length"]
    return logged["completions/mean_length"] - (1 - logged["completions/clipped_ratio"])


def train(method: str, seed: int, splits, arguments) -> dict:
    """One run: what each step logs, in means of --eval_steps steps, validation scores after as many, and test scores at the end."""
    model, processor = load_model(str(arguments.model))
    captioner = Captioner(model.train(), processor)
    records = splits["train"]
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    weights = {"cider": 1.0} | ({JUDGE: arguments.weight} if method == QUESTIONS else {})
    run_folder = arguments.folder / f"{seed} {method}"
    run_folder.mkdir(parents=True, exist_ok=True)
    rewards = Rewards(weights, references, RecordRows(records), output_dir=str(run_folder))
    torch.manual_seed(seed)
    objective = objective_of(method, captioner, rewards, arguments.samples)
    loader = torch.utils.data.DataLoader(
        data.CaptionPairs(records, None), arguments.batch_size, shuffle=True, drop_last=True,
        collate_fn=CaptionCollator(processor, model.config, prompts_only=True),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=arguments.steps)
    times = getattr(objective, "num_iterations", 1)
    batches = (batch for batch in loader for _ in range(times))
    curve, logged, seconds = [{"step": 0} | evaluate(captioner, splits["validation"])], [], 0.0
    for step in range(arguments.steps):
        begin, again = time.process_time(), bool(step % times)
        batch = next(batches)
        if hasattr(objective, "begin_step"):
            objective.begin_step([batch], again)
        optimizer.zero_grad()
        result = objective(model, batch)
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - begin
        named = {"reward": result["reward"], "entropy": result["entropy"], "length": length_of(result)}
        named |= {name: result[name] for name in ("kl", "clip_ratio/region_mean", "reward_questions") if name in result}
        logged.append({name: float(value) for name, value in named.items()})
        if (step + 1) % arguments.eval_steps == 0:
            means = {name: statistics.mean(row[name] for row in logged) for name in logged[0]}
            curve.append({"step": step + 1} | rounded(means) | evaluate(captioner, splits["validation"]))
            logged = []
            print(
                f"seed {seed}, {method}:",
                {k: round(v, 3) for k, v in curve[-1].items()},
                f"{seconds:.0f} s",
                flush=True,
            )
    return {"curve": curve, "test": evaluate(captioner, splits["test"]), "processor_seconds": round(seconds, 1)}


def evaluate(captioner, records) -> dict:
    """Scores of the captions of `records`, as evaluate.py decodes them."""
    predictions = captioner.caption_split(records, batch_size=50)
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    scores, _ = score(predictions, references, meteor=False, spice=False, bootstrap_samples=0)
    facts = score_scene_facts(predictions, dict(zip(references, records["facts"], strict=True)))
    of_corpus = {"words": scores["corpus"]["mean_length"], "distinct": scores["corpus"]["distinct"]}
    return rounded({"CIDEr": scores["CIDEr"]} | facts | of_corpus)


def rounded(values: dict) -> dict:
    return {name: round(value, 5) for name, value in values.items()}


def start_server(answered) -> multiprocessing.Process:
    """The server of questions; `answered` counts its answers."""

    class Counting(Handler):
        def do_POST(self):
            super().do_POST()
            with answered.get_lock():
                answered.value += 1

    serve = lambda: Server(("127.0.0.1", PORT), Counting).serve_forever()  # noqa: E731
    server = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    server.start()
    return server


def kill_the_server(arguments) -> dict:
    """Two runs of the recipe, the second with a server that is killed after half of its answers."""
    answered = multiprocessing.Value("i", 0)
    folders = [arguments.folder / name for name in ("whole", "killed")]
    few = {
        "model_name_or_path": arguments.model, "max_steps": 20, "max_train_samples": 400, "logging_steps": 1, "eval_strategy": "no",
        "save_strategy": "no", "load_best_model_at_end": "false", "max_eval_samples": 8, "max_test_samples": 8, "meteor": "false",
        "bootstrap_samples": 0, "report": "false",
    }  # fmt: skip

    def run(folder: Path) -> subprocess.CompletedProcess:
        words = [word for name, value in (few | {"output_dir": folder}).items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "train.py", "recipes/questions/scenes.yaml", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    server = start_server(answered)
    whole = run(folders[0])
    asked, answered.value, ended = answered.value, 0, threading.Event()

    def kill_at_half():
        while answered.value < asked // 2 and not ended.wait(0.01):
            pass
        server.kill()

    watcher = threading.Thread(target=kill_at_half)
    watcher.start()
    stopped = run(folders[1])
    ended.set()
    watcher.join()
    before = answered.value
    start_server(answered)
    resumed = run(folders[1])
    histories = [json.loads((f / "trainer_state.json").read_text(encoding="utf-8"))["log_history"] for f in folders]
    learnt = [[(row["loss"], row["reward"]) for row in history if "loss" in row] for history in histories]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    journals = [
        (folder / "reward_multiple_choice.jsonl").read_text(encoding="utf-8").splitlines() for folder in folders
    ]
    return {
        "what": "a run whose judge's server was killed and started again, and one whose was not",
        "exit_codes": [run.returncode for run in (whole, stopped, resumed)],
        "said": [line for line in stopped.stderr.splitlines() if line.startswith("train.py:") or "saved " in line],
        "traceback": "Traceback" in stopped.stderr,
        "resumed": [line for line in resumed.stderr.splitlines() if "resuming from" in line],
        "answers": {"whole": asked, "until the kill": before, "after it": answered.value - before},
        "kept": {"whole": len(journals[0]), "killed": len(journals[1])},
        "kept_twice": len(journals[1]) - len({json.loads(line)["key"] for line in journals[1]}),
        "steps": len(learnt[0]),
        "losses_and_rewards_equal": learnt[0] == learnt[1],
        "weights_equal": all(weights[0][name].equal(weights[1][name]) for name in weights[0]),
    }


def table(runs: dict) -> dict:
    """{method: {score: {mean, sd, gain over the starting model, its sd}}} over seeds, on the test scenes; and seconds."""
    rows = {}
    for method in next(iter(runs.values())):
        of_seeds = [run[method] for run in runs.values()]
        rows[method] = {"processor_seconds": statistics.mean(run["processor_seconds"] for run in of_seeds)}
        for name in SCORES:
            values = [run["test"][name] for run in of_seeds]
            rows[method][name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return rows


def page_table(result: dict) -> str:
    """The table of docs/rewards.md."""
    lines = [
        "| | CIDEr | scene_facts | count | size | colour | shape | relation | words | entropy | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    before = result["before"]
    facts = ("scene_facts", *KINDS)
    cells = [f"{before['CIDEr']:.2f}", *(f"{before[name]:.3f}" for name in facts), f"{before['words']:.1f}", "", ""]
    lines.append(f"| the quickstart | {' | '.join(cells)} |")
    for method, row in result["test"].items():
        cells = [
            "{mean:.2f} ± {sd:.2f}".format(**row["CIDEr"]),
            *("{mean:.3f} ± {sd:.3f}".format(**row[n]) for n in facts),
        ]
        last = [run[method]["curve"][-1]["entropy"] for run in result["runs"].values()]
        cells += [f"{row['words']['mean']:.1f}", f"{statistics.mean(last):.2f}", f"{row['processor_seconds']:.0f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "reward": "reward of the samples", "CIDEr": "CIDEr, validation", "scene_facts": "true facts, validation",
        "length": "tokens of a sample", "entropy": "entropy, nats per token",
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.6), layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        for number, method in enumerate(METHODS):
            of_seeds = [
                [(row["step"], row[name]) for row in run[method]["curve"] if name in row] for run in runs.values()
            ]
            if name == "reward" and method == QUESTIONS:
                continue  # on another scale
            for points in of_seeds:
                axis.plot(*zip(*points, strict=True), color=f"C{number}", lw=0.8, alpha=0.35)
            mean = [tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*of_seeds, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=f"C{number}", marker="o", ms=4, lw=2.4, label=method)
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("optimizer steps", fontsize=11)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][1].get_legend_handles_labels()
    axes[1][2].axis("off")
    axes[1][2].legend(
        handles,
        labels,
        loc="center left",
        fontsize=13,
        frameon=False,
        title="mean of the seeds; single seeds are faint",
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/quickstart")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/grpo_scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval_steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--samples", type=int, default=4, help="captions of each image")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--weight", type=float, default=5.0, help="of the questions; CIDEr's is 1")
    parser.add_argument("--each", type=int, default=3, help="questions about a scene")
    parser.add_argument("--kill", action="store_true", help="the runs whose server is killed, instead")
    parser.add_argument("--output", type=Path, default=RESULTS / "grpo_scenes.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/grpo_scenes.png")
    arguments = parser.parse_args()
    if len({*arguments.seeds}) < 2:
        parser.error("--seeds: give at least two, as differences are compared with the spread over seeds.")

    splits = load(train=arguments.steps * arguments.batch_size, validation=100)
    if QUESTIONS in arguments.methods:
        write_questions(ROOT / "runs/questions.jsonl", splits["train"], arguments.each)
    if arguments.kill:
        return write_result(arguments.output.with_stem("grpo_scenes_killed"), kill_the_server(arguments))
    if QUESTIONS in arguments.methods:
        start_server(multiprocessing.Value("i", 0))
    settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path) and k not in ("seeds", "methods")}
    runs: dict = {}
    for seed in arguments.seeds:
        runs[str(seed)] = {}
        for method in arguments.methods:
            file = arguments.folder / f"{seed} {method}.json"
            kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if kept.get("settings") != settings:
                kept = {"settings": settings, "run": train(method, seed, splits, arguments), **environment()}
                write_json(file, kept)
            runs[str(seed)][method] = kept["run"] | {"commit": kept["commit"]}
    if {*arguments.methods} == {*METHODS}:
        model, processor = load_model(str(arguments.model))
        before = evaluate(Captioner(model.eval(), processor), splits["test"])
        for run in (run for of_seed in runs.values() for run in of_seed.values()):
            run["curve"] = [{name: row[name] for name in row if name not in KINDS} for row in run["curve"]]
        found = {"before": before, "test": table(runs), "settings": settings, "runs": runs}
        write_json(arguments.output, found | environment())
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
