"""Which runs an output folder may be resumed by."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tiny
from conftest import ROOT

from arguments import TRAIN_GROUPS, AdapterArguments
from common.cli import parse
from common.errors import UserError
from models.adapters import settle
from training.building import check_best
from training.checkpoints import find_checkpoint, record_run, reward_files

# What run.json of commit 2ee57a4 recorded with transformers 5.23 for the command below.
EARLIER = json.loads((ROOT / "tests/fixtures/flags_of_2ee57a4.json").read_text(encoding="utf-8"))
COMMAND = [
    str(ROOT / "recipes/quickstart/scenes.yaml"), "--max_steps", "60", "--eval_steps", "20", "--save_steps", "20",
    "--logging_steps", "10", "--save_total_limit", "3", "--max_eval_samples", "20", "--max_test_samples", "20",
    "--meteor", "false", "--per_device_train_batch_size", "8",
]  # fmt: skip


def resume(folder, recorded: dict, *more: str):
    """Where the command would resume in a folder whose run recorded these flags."""
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40/trainer_state.json").write_text('{"global_step": 40}', encoding="utf-8")
    (folder / "checkpoint-40/optimizer.pt").touch()
    (folder / "run.json").write_text(json.dumps({"flags": recorded}), encoding="utf-8")
    return find_checkpoint(folder, flags_of(*COMMAND, "--output_dir", str(folder), *more), None)


def flags_of(*command: str) -> dict:
    """As train.py takes them from a command line."""
    groups = parse(TRAIN_GROUPS, list(command))
    settle(next(group for group in groups if isinstance(group, AdapterArguments)), None)
    return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}


def test_a_run_of_an_earlier_version_is_resumed_though_flags_were_added_since(tmp_path):
    assert resume(tmp_path, EARLIER) == str(tmp_path / "checkpoint-40")


def test_a_flag_that_only_one_release_has_counts_if_it_is_set(tmp_path):
    without = {name: value for name, value in EARLIER.items() if name != "scst_top_p"}
    for number, recorded in enumerate((without, EARLIER | {"gone": None}, EARLIER | {"gone": False})):
        (folder := tmp_path / str(number)).mkdir()
        assert resume(folder, recorded)
    (set_now := tmp_path / "now").mkdir()
    with pytest.raises(ValueError, match=r"holds another run: scst_top_p was None, is 0\.5"):
        resume(set_now, without, "--scst_top_p", "0.5")
    (set_then := tmp_path / "then").mkdir()
    with pytest.raises(ValueError, match="holds another run: gone was 3, is None"):
        resume(set_then, EARLIER | {"gone": 3})


# What this release makes of other flags and of the machine. All of them are older than any release that is supported.
DERIVED = {
    "bf16", "fp16", "gradient_checkpointing_kwargs", "metric_for_best_model", "greater_is_better", "use_cpu",
    "accelerator_config", "remove_unused_columns", "label_names", "debug", "do_eval",
}  # fmt: skip


def test_a_run_that_lacks_any_one_flag_is_resumed_by_a_command_that_leaves_it_alone(tmp_path):
    """As if that flag had come with this release: of this repo, or of transformers (activation_checkpointing, in 5.20)."""
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-40/trainer_state.json").write_text('{"global_step": 40}', encoding="utf-8")
    (tmp_path / "checkpoint-40/optimizer.pt").touch()
    flags = flags_of("--output_dir", str(tmp_path), "--gradient_checkpointing", "true")
    refused = set()
    for name in flags:
        recorded = {key: value for key, value in flags.items() if key != name}
        (tmp_path / "run.json").write_text(json.dumps({"flags": recorded}, default=str), encoding="utf-8")
        try:
            find_checkpoint(tmp_path, flags, None)
        except UserError:
            refused.add(name)
    assert refused <= DERIVED


CHANGED = {
    "report": (["--report", "false"], True),
    "CLIP scores": (["--clip_metrics", "clip-s", "--clip_model", "clip"], True),
    "CLIP scores that select": (["--clip_metrics", "clip-s", "--metric_for_best_model", "RefCLIP-S"], False),
    "language": (["--caption_language", "zh"], False),
    "features": (["--feature_cache", "off"], False),
    "batch": (["--per_device_train_batch_size", "4"], False),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_flag_may_change_if_it_does_not_alter_what_is_learnt(name, tmp_path):
    more, may = CHANGED[name]
    same = ["--metric_for_best_model", "RefCLIP-S"] if "RefCLIP-S" in more else []
    recorded = flags_of(*COMMAND, "--output_dir", str(tmp_path), *same)
    recorded = json.loads(json.dumps(recorded, default=str))
    if may:
        assert resume(tmp_path, recorded, *more)
    else:
        with pytest.raises(UserError, match="holds another run: "):
            resume(tmp_path, recorded, *more)


def test_a_reward_whose_file_changed_is_another_run(tmp_path):
    """The file of a function of one's own, and that of chair's instances, which is free without chair."""
    reward, instances = tmp_path / "mine.py", tmp_path / "instances.json"
    for changed, words in ((reward, f"cider {reward}:one"), (instances, "cider chair:-1")):
        reward.write_text("def one(candidates): return [1] * len(candidates)\n")
        instances.write_text("{}")
        folder = tmp_path / changed.stem
        flags = ["--output_dir", str(folder), "--objective", "scst", "--reward", words, "--instances", str(instances)]
        flags = flags_of(*flags)
        folder.mkdir()
        assert find_checkpoint(folder, flags, None) is None
        record_run(folder, flags, reward_files=reward_files(flags))
        assert find_checkpoint(folder, flags, None) is None
        changed.write_text(changed.read_text() + " ")
        record = (folder / "run.json").read_text()
        record_run(folder, flags)  # as at the end of a run during which it was changed
        assert json.loads((folder / "run.json").read_text())["reward_files"] == json.loads(record)["reward_files"]
        with pytest.raises(UserError, match=rf"reward: .*{changed.name} is not as it was when the run in .* began"):
            find_checkpoint(folder, flags, None)
        changed.unlink()
        with pytest.raises(UserError, match=f"{changed.name} is not as it was"):
            find_checkpoint(folder, flags, None)


def test_a_score_that_no_evaluation_has_cannot_select_the_best_checkpoint(tmp_path):
    nowhere = ["--model_name_or_path", "nowhere/nothing", "--output_dir", tmp_path / "out"]
    for name, hint in (
        ("cider", "Did you mean CIDEr?"),
        ("METEOR", "ROUGE_L, sacrebleu"),
        ("CLIP-S", "compute loss, "),
    ):
        said = tiny.run("train.py", *nowhere, "--metric_for_best_model", name, fails=True).stderr
        assert f"--metric_for_best_model {name}: evaluations in training compute" in said
        assert hint in said
    assert not (tmp_path / "out").exists()
    for name, metrics in (
        ("eval_CIDEr", []),
        ("loss", []),
        ("RefPAC-S", ["pac-s"]),
        ("CLIP-S", ["clip-s"]),
        (None, []),
    ):
        check_best(SimpleNamespace(metric_for_best_model=name), metrics)


def test_the_last_checkpoint_is_the_last_by_number(tmp_path):
    for number in (9, 10, 100, 99):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(f'{{"global_step": {number}}}')
        (tmp_path / f"checkpoint-{number}/optimizer.pt").touch()
        recorded = flags_of(*COMMAND, "--output_dir", str(tmp_path))
        (tmp_path / "run.json").write_text(json.dumps({"flags": recorded}, default=str))
        last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
        assert find_checkpoint(tmp_path, recorded, None) == str(tmp_path / f"checkpoint-{last}")


def test_a_changed_flag_is_another_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds another run: learning_rate was 0\.002, is 0\.001"):
        resume(tmp_path, EARLIER, "--learning_rate", "1e-3")
