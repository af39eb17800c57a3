"""Every recipe is one that train.py takes, and the quickstart's runs. Their commands: tests/repo/test_pages.py."""

import json
import os
import subprocess
import sys
import threading

import pytest
import tiny
from conftest import ROOT

import arguments
from benchmarks.quality.grpo_scenes import QUESTIONS, SCST, TWICE, page_table
from captioner import Captioner
from common import cli
from drawn_scenes import drawing
from drawn_scenes.questions import Handler, Server, write_questions

# Those in recipes/accelerate are for accelerate launch: tests/training/test_sharding.py runs them.
RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name != "accelerate")
GROUPS = arguments.TRAIN_GROUPS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_taken_and_says_what_it_needs_and_how_it_is_launched(recipe, tmp_path):
    cli.parse(GROUPS, [str(recipe), "--output_dir", str(tmp_path)])
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Needs:" in head
    assert f"train.py {recipe.relative_to(ROOT)}" in head


def test_the_flickr8k_recipe_is_the_defaults_written_out(tmp_path):
    from captioner import DEFAULTS
    from training.lengths import PUBLISHED

    written = cli.parse(GROUPS, [str(ROOT / "recipes/blip/flickr8k.yaml"), "--output_dir", str(tmp_path)])
    default = cli.parse(GROUPS, ["--output_dir", str(tmp_path)])
    own = {"num_beams", "max_new_tokens", "length_penalty", "early_stopping"}  # their defaults: captioner
    assert written[GROUPS.index(arguments.TrainDataArguments)].max_txt_len == PUBLISHED  # where the captions fit
    for one, other in zip(written, default, strict=True):
        for name, value in vars(other).items():
            # spice_samples: the published subsample of 1,500; by default all images where the references are cached.
            if name not in own | {"distributed_state", "spice_samples", "max_txt_len"}:
                assert getattr(one, name) == value, name
    generation = written[GROUPS.index(arguments.GenerationArguments)]
    assert all(getattr(generation, name) == DEFAULTS[name] for name in own)


def test_the_coco_recipe_learns_and_writes_the_lengths_of_the_official_code(tmp_path):
    """There, min_length 5, max_length 20 and 40 tokens count the start token and the prompt; a caption has 30 words."""
    groups = cli.parse(GROUPS, [str(ROOT / "recipes/blip/coco_karpathy.yaml"), "--output_dir", str(tmp_path)])
    flags = {name: value for group in groups for name, value in vars(group).items()}
    model, processor = tiny.build(tmp_path)
    captioner = Captioner(model, processor, prompt=flags["prompt"])
    prompt = captioner.collator.words_before
    assert (prompt + flags["min_new_tokens"], prompt + flags["max_new_tokens"], flags["max_txt_len"]) == (5, 20, 40)
    official = {"num_beams": 3, "max_grad_norm": 0, "weight_decay": 0.05, "label_smoothing_factor": 0.1}
    official |= {"early_stopping": False, "learning_rate": 1e-5, "num_train_epochs": 5, "augment_text": ["clean"]}
    assert {name: flags[name] for name in official} == official


@pytest.mark.parametrize(
    "control",
    [[], pytest.param(["--dataset_config_name", "shuffled"], marks=pytest.mark.slow)],
    ids=["scenes", "shuffled control"],
)
def test_the_quickstart_runs_and_measures_truth(control, tmp_path):
    tiny.run(
        "train.py", ROOT / "recipes/quickstart/scenes.yaml", "--output_dir", tmp_path, "--max_steps", 4,
        "--eval_steps", 4, "--save_steps", 4, "--max_train_samples", 200, "--max_eval_samples", 4,
        "--max_test_samples", 4, "--meteor", "false", *control,
    )  # fmt: skip
    facts = json.loads((tmp_path / "coco_metrics.json").read_text())["scene_facts"]
    assert 0 <= facts["scene_facts"] < 0.8
    assert {"count", "size", "colour", "shape", "relation"} <= set(facts)


@pytest.mark.slow
def test_the_recipe_of_questions_runs_to_its_end(tmp_path):
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    write_questions(tmp_path / "questions.jsonl", drawing.load(train=20)["train"], each=3)
    judge = (ROOT / "recipes/questions/rewards.py").read_text().replace(":8899", f":{server.server_port}")
    (tmp_path / "judge.py").write_text(judge.replace("runs/questions.jsonl", str(tmp_path / "questions.jsonl")))
    tiny.run(
        "train.py", ROOT / "recipes/questions/scenes.yaml", "--output_dir", tmp_path / "out", "--max_steps", 2,
        "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1, "--max_train_samples", 20, "--max_eval_samples", 4,
        "--max_test_samples", 4, "--meteor", "false", "--model_name_or_path", tiny.build_folder(tmp_path),
        "--reward", f"cider {tmp_path / 'judge.py'}:questions:5",
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [0 <= row["reward_questions"] <= 1 for row in history if "loss" in row] == [True, True]
    kept = (tmp_path / "out/reward_multiple_choice.jsonl").read_text().splitlines()
    assert len(kept) == len({json.loads(line)["key"] for line in kept}) > 10


RESULTS = ROOT / "benchmarks/results"


def test_the_page_has_the_table_and_the_figures_of_grpo_on_scenes():
    page = (ROOT / "docs/rewards.md").read_text()
    result, killed = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("grpo_scenes", "grpo_scenes_killed")
    )
    assert page_table(result) in page
    page = " ".join(page.split())
    runs, settings = result["runs"].values(), result["settings"]
    assert len(runs) == 3
    assert f"{settings['steps']} steps of {settings['batch_size']} images with four captions each" in page
    mean = lambda method, name, row: sum(run[method]["curve"][row][name] for run in runs) / 3  # noqa: E731
    assert f"(SCST from {mean(SCST, 'reward', 1):.2f} to {mean(SCST, 'reward', -1):.2f})" in page
    right = [mean(QUESTIONS, "reward_questions", row) for row in (1, -1)]
    assert f"right answers in the samples from {right[0]:.2f} to {right[1]:.2f}" in page
    seconds = {method: row["processor_seconds"] for method, row in result["test"].items()}
    assert f"take {100 * (1 - seconds[TWICE] / seconds[SCST]):.0f} % less time" in page
    assert f"take {seconds[QUESTIONS] / seconds[SCST]:.1f} times the time" in page
    assert f"{settings['batch_size'] * settings['samples'] * settings['each']} requests a step" in page
    assert f"half of its {killed['answers']['whole']:,} answers" in page
    assert killed["said"][0].split(": the same")[0].rpartition("/")[2] in page  # the checkpoint
    assert sum(killed["answers"][name] for name in ("until the kill", "after it")) == killed["answers"]["whole"]
    assert killed["exit_codes"] == [0, 2, 0]
    assert (killed["kept_twice"], killed["losses_and_rewards_equal"], killed["weights_equal"]) == (0, True, True)


def test_the_page_has_the_figures_of_grpo_beside_trl():
    page = " ".join((ROOT / "docs/rewards.md").read_text().split())
    large, tiny_one = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("grpo_trl", "grpo_trl_tiny"))
    patches = [(result["settings"]["side"] // 8) ** 2 for result in (large, tiny_one)]
    assert (large["settings"]["images"], large["settings"]["samples"]) == (4, 8)
    ratios = [
        result[kind]["ratio"] for result, kind in ((large, "processor"), (large, "wall_clock"), (tiny_one, "processor"))
    ]
    assert f"{large['weights'] / 1e6:.0f} million random weights, 4 pictures of {patches[0]} patches" in page
    assert f"{ratios[0]:.1f} times as many steps per processor second, {ratios[1]:.1f} by the clock" in page
    assert f"have {patches[1]} patches and the time is mostly Python's, it is {ratios[2]:.1f} times" in page


@pytest.mark.parametrize("name", sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.json")))
def test_a_result_has_its_evidence(name):
    """Command, hardware, versions and commit stand in every results file."""
    result = json.loads((RESULTS / name).read_text())
    assert {"command", "commit", "hardware", "versions"} <= set(result)


@pytest.mark.slow
def test_the_counted_vocabulary_is_the_same_in_every_process(tmp_path):
    """Or the same seed would give other numbers each time."""
    code = (
        "import sys; from models.loading import build_model; "
        "words = ['two red dogs run', 'a dog sits', 'three cats', 'a cat sits']; "
        "print(sorted(build_model(sys.argv[1], None, words)[1].tokenizer.get_vocab().items()))"
    )
    printed = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tiny.write_config(tmp_path))]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        printed.add(run.stdout)
    assert len(printed) == 1
    assert "'dog'" in printed.pop()
