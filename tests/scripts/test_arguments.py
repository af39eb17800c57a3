"""The command line: --help and mistakes answer at once, and the flags are those of the dataclasses and of transformers."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from torch.torch_version import TorchVersion
from transformers import HfArgumentParser

import arguments
from common import cli
from common.existence import exists, may_be_on_hub
from jobs.shards import Shard, ShardFolder

SCRIPTS = {"train.py": [], "evaluate.py": [], "demo.py": [], "serve.py": [], "infer.py": ["x.jpg"], "export.py": ["folder"],
           "rewrite.py": ["fuse", "IN", "--llm", "hf:x", "--dry_run"]}  # fmt: skip
# One mistake that argparse finds, one that a dataclass finds, for each script.
MISTAKES = [
    ("train.py", ["--lerning_rate", "1"], "unrecognized argument: --lerning_rate. Did you mean --learning_rate?"),
    ("train.py", ["--scst_top_p", "2"], "scst_top_p must be above 0 and at most 1"),
    ("train.py", ["--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'"),
    ("train.py", ["--max_steps", "many"], "invalid int value: 'many'"),
    ("train.py", ["--eval_strategy", "steps"], "load_best_model_at_end needs a checkpoint at each evaluation"),
    ("train.py", ["--use_cache"], "--use_cache is not used here"),
    ("evaluate.py", ["--splitt=test"], "unrecognized argument: --splitt=test. Did you mean --split?"),
    ("evaluate.py", ["--predictions", "p.json"], "--predictions and --references go together"),
    ("infer.py", ["--device", "gpu", "x.jpg"], "invalid choice: 'gpu'"),
    ("infer.py", [], "Name what to caption"),
    ("export.py", [], "Name one model folder"),
    ("rewrite.py", ["fuse", "IN", "--llm", "hf:x", "--output", "o", "--rows_per_file", "0"], "must be at least 1"),
    ("rewrite.py", ["merge", "IN"], "Say what to do with what"),
    ("demo.py", ["--max_quue", "1"], "unrecognized argument: --max_quue. Did you mean --max_queue?"),
    # What is named is not there.
    ("train.py", ["--dataset_name", "captions.csv"], "--dataset_name captions.csv: no such file or folder"),
    ("train.py", ["--dataset_name", "scenes", "--model_name_or_path", "./blip"], "--model_name_or_path ./blip: no such"),
    ("evaluate.py", ["--predictions", "here.txt", "--references", "r.json"], "--references r.json: no such file"),
    ("evaluate.py", ["--model_name_or_path", "runs/a/b"], "--model_name_or_path runs/a/b: no such file or folder"),
    ("infer.py", ["photos/*.jpg"], "photos/*.jpg: there is no such file or folder, and no file that matches it"),
    ("infer.py", ["https://example.org/a.jpg"], "files are not fetched from web addresses"),
    ("train.py", ["recipes/flickr8k.yml"], "Did you mean recipes/blip/flickr8k.yaml?"),
    ("train.py", ["recipes/blip/flickr8k"], "no such file or folder. Flags begin with --. Did you mean recipes/blip/flickr8k.yaml?"),
    ("rewrite.py", ["fuse", "in.jsonl", "--llm", "hf:x", "--dry_run"], "in.jsonl: no such file or folder"),
    ("export.py", ["runs/none"], "runs/none: no such file or folder"),
    ("demo.py", ["--login", "users.txt"], "--login users.txt: no such file or folder"),
    ("demo.py", ["--login", "here.txt"], "--login here.txt: every line must be user:password."),
    ("demo.py", ["--port", "70000"], "--port 70000: bind(): port must be 0-65535"),
]  # fmt: skip


# What users of Trainer, TRL, argparse scripts and Gradio type, and what they are told.
HABITS = [
    *(("train", word, f"Did you mean --{flag}?") for word, flag in {
        "--model": "model_name_or_path", "--model_name": "model_name_or_path", "--model-id=x": "model_name_or_path",
        "--pretrained": "model_name_or_path", "--checkpoint": "model_name_or_path", "--dataset": "dataset_name",
        "--data": "dataset_name", "--data_path": "dataset_name", "--train_file": "dataset_name",
        "--image_folder": "image_dir", "--images": "image_dir", "--batch_size": "per_device_train_batch_size",
        "--bs": "per_device_train_batch_size", "--train_batch_size": "per_device_train_batch_size",
        "--eval_batch_size": "per_device_eval_batch_size", "--epochs": "num_train_epochs",
        "--num-epochs": "num_train_epochs", "--lr": "learning_rate", "--lr=1e-4": "learning_rate",
        "--learning-rat": "learning_rate", "--steps": "max_steps", "--max_train_steps": "max_steps",
        "--output": "output_dir", "--out": "output_dir", "--save_dir": "output_dir",
        "--grad_accum": "gradient_accumulation_steps", "--warmup_ratio": "warmup_steps",
        "--lr_scheduler": "lr_scheduler_type", "--optimizer": "optim", "--num_workers": "dataloader_num_workers",
        "--gpu": "device", "--mixed_precision": "bf16", "--lora": "use_peft", "--lora_rank": "lora_r",
        "--lora_target_modules": "lora_targets", "--beam_size": "num_beams", "--max_length": "max_new_tokens",
        "--early_stopping_patience": "patience", "--evaluation_strategy": "eval_strategy", "--wandb": "report_to",
        "--num_beam": "num_beams", "--hub_repo_id": "hub_model_id",
    }.items()),
    ("train", "--load_in_4bit", "use --quantization 4bit"),
    ("train", "--overwrite_output_dir", "nothing is overwritten. Name another --output_dir"),
    ("train", "--trust_remote_code", "code from the Hub is never run"),
    ("train", "--resume", "a run resumes by itself"),
    ("train", "--resume_from_checkpoint true", "a run resumes by itself"),
    ("train", "--do_train", "train.py trains"),
    ("train", "--fsdp full_shard", "accelerate launch --config_file"),
    ("train", "--zzz", "unrecognized argument: --zzz."),
    ("train", "--server_port 80", "--server_port: there is no such setting here."),
    ("infer", "--lr 1e-4", "--lr: there is no such setting here."),
    ("train", "--deepspeed x.json", "zero3.yaml train.py with these flags.\n"),
    ("evaluate", "--batch_size 4", "Did you mean --per_device_eval_batch_size?"),
    ("evaluate", "--preds p.json", "Did you mean --predictions?"),
    ("evaluate", "--out_dir x", "Did you mean --output_dir?"),
    ("infer", "--output_dir x", "Did you mean --output?"),
    ("infer", "--images photos", "It is named without a flag: PATHS."),
    ("infer", "--input photos", "It is named without a flag: PATHS."),
    ("demo", "--server_port 80", "Did you mean --port?"),
    ("demo", "--server_name 0.0.0.0", "Did you mean --host?"),
    ("demo", "--auth a:b", "Did you mean --login?"),
    ("demo", "--share", "--host 0.0.0.0 --login FILE"),
    ("rewrite", "--model gpt", "Did you mean --llm?"),
    ("export", "--model runs/a", "It is named without a flag: FOLDER."),
    ("export", "--repo_id me/x", "Did you mean --push_to_hub?"),
]  # fmt: skip
POSITIONALS = {"infer": "paths", "rewrite": "task", "export": "folder"}


def start(script: str, *words, cwd=None) -> tuple[subprocess.CompletedProcess, float]:
    """A script's end, and the seconds of CPU that it took."""
    code = "import resource, runpy, sys, atexit\n" \
           "atexit.register(lambda: print('CPU', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr))\n" \
           "sys.argv = sys.argv[1:]\n" \
           "runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", code, str(ROOT / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / script.rpartition("/")[0])}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return result, float(result.stderr.rpartition("CPU ")[2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    result, seconds = start(script, "--help")
    assert result.returncode == 0, result.stderr
    assert "--model_name_or_path" in result.stdout or script in ("export.py", "rewrite.py")
    assert seconds < 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_each_flag_once_and_no_default_that_is_none(script):
    said = start(script, "--help")[0].stdout
    described = [" ".join(part.split()) for part in re.split(r"\n  -.*(?:\n {20,}|  +)", said)[1:]]
    described = [re.sub(r" ?\(default: [^)]*\)$", "", words) for words in described]
    assert len(described) > 2
    assert len(set(described)) == len(described)
    assert "(default: None)" not in " ".join(said.split())


@pytest.mark.parametrize(("script", "unit"), [("infer.py", "images"), ("rewrite.py", "rows")])
def test_the_progress_of_a_run_is_told_at_once(script, unit, tmp_path):
    shards = [Shard(number, "rows", "", unit, number, number + 1, 1, "00000000") for number in range(3)]
    folder = ShardFolder(str(tmp_path / "out.jsonl"), single=True)
    result, _ = start(script, "--status", folder.output)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{script}: --status {folder.output}: no run has written there.\nCPU")
    folder.begin({}, shards, 1)
    folder.write(shards[0].file, iter([pa.table({"key": ["a"]})]), lambda: {"rows": 1})
    result, seconds = start(script, "--status", folder.output)
    assert (result.returncode, result.stdout) == (0, f"1 of 3 {unit}, 1 of 3 shards\n")
    assert seconds < 2


def test_a_status_that_is_interrupted_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit, match="130"), cli.mistakes_in_one_line("infer.py"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("infer.py: stopped.")


def test_garbage_is_collected_again_when_a_script_runs():
    """It waits during the imports, which are between `check` and `run`."""
    code = (
        "import gc; from arguments import EXPORT_GROUPS as groups; from common import cli\n"
        "cli.check(groups, ['.'], positional='folder'); print(gc.isenabled())\n"  # as sagemaker/launch.py does
        "cli.check(groups, positional='folder'); print(gc.isenabled())\n"
        "cli.run(lambda: print(gc.isenabled()))"
    )
    command = [sys.executable, "-c", code, "."]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.stdout.split() == ["True", "False", "True"], result.stderr


def test_compiling_is_refused_with_a_torch_that_cannot(tmp_path, monkeypatch, capsys):
    words = ["--output_dir", str(tmp_path), "--torch_compile", "true"]
    (args,) = cli.parse((arguments.AllTrainFlags,), words)
    assert args.torch_compile
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    with pytest.raises(SystemExit, match="2"):
        cli.parse((arguments.AllTrainFlags,), words)
    assert "torch_compile needs torch 2.7 or later, and this is 2.6.0+cu124" in capsys.readouterr().err


def test_help_shows_per_cents_as_they_are():
    assert "95 % intervals" in " ".join(start("evaluate.py", "--help")[0].stdout.split())


@pytest.mark.parametrize(("script", "words", "said"), MISTAKES)
def test_a_mistake_answers_at_once(script, words, said, tmp_path):
    (tmp_path / "here.txt").write_text("nobody\n")
    result, seconds = start(script, *words, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert seconds < 2


def refused(script: str, words: list[str], capsys) -> str:
    groups = getattr(arguments, f"{script.upper()}_GROUPS")
    with pytest.raises(SystemExit) as ended:
        cli._read(groups, words, POSITIONALS.get(script))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_habits_of_other_programs_are_told_the_flag(capsys):
    for script, words, answer in HABITS:
        message = refused(script, words.split(), capsys)
        assert answer in message, (script, words)
        assert len(message.splitlines()) == 1


def test_help_has_the_ten_most_used_first_and_each_flag_under_one_heading():
    for script in SCRIPTS:
        groups = getattr(arguments, f"{Path(script).stem.upper()}_GROUPS")
        text = help_of(groups)
        headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        assert len(headings) >= (1 if script == "export.py" else 2)
        assert len(set(headings)) == len(headings)
        flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
        assert len(set(flags)) == len(flags)
        replaced = {f"--{name}" for name in cli.replaced_flags(groups)}
        declared = {f"--{field.name}" for group in groups for field in dataclasses.fields(group) if field.init}
        assert set(flags) == declared - replaced | {"--help"}
    first = help_of(arguments.TRAIN_GROUPS).partition("\n\nthe model:")[0]
    assert len(re.findall(r"^  --", first, re.MULTILINE)) == 10
    assert {"--dataset_name", "--learning_rate", "--num_train_epochs"} <= set(re.findall(r"--\w+", first))


def help_of(groups) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli._read(groups, ["--help"], None if groups[0] is not arguments.ExportArguments else "folder")
    return printed.getvalue()


def test_a_recipe_and_a_data_set_come_first(tmp_path, capsys):
    data = tmp_path / "captions.csv"
    data.write_text("image,caption\n")
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.5\ndataset_name: scenes\n")

    def values(*words):
        found = cli._read(arguments.TRAIN_GROUPS, list(map(str, words)), None)[1]
        return found[3].dataset_name, found[-1].learning_rate

    assert values(data) == (str(data), 5e-05)
    assert values("flickr8k", "--learning_rate", "1") == ("flickr8k", 1)
    assert values(data.as_uri()) == values("--dataset_name", data.as_uri()) == (str(data), 5e-05)
    assert values(tmp_path / "mine.yaml") == ("scenes", 0.5)
    assert values(tmp_path / "mine.yaml", data) == (str(data), 0.5)
    assert values(data, "--dataset_name", data) == (str(data), 5e-05)
    assert "files are not fetched from web addresses" in refused("train", ["https://example.org/a.csv"], capsys)
    assert "name two" in refused("train", [str(data), "--dataset_name", "scenes"], capsys)
    demo = cli._read(arguments.DEMO_GROUPS, ["runs/mine"], None)[1]
    assert demo[0].model_name_or_path == "runs/mine"


def test_paths_of_recipes_are_of_the_repo_from_any_folder(tmp_path, monkeypatch):
    recipes = [*ROOT.glob("recipes/*/*.yaml")]
    monkeypatch.chdir(tmp_path)
    from_elsewhere = {}
    for recipe in recipes:
        if recipe.parent.name != "accelerate":
            found = cli._read(arguments.TRAIN_GROUPS, [str(recipe)], None)[1]
            from_elsewhere[str(recipe.relative_to(ROOT))] = found[1].model_config
    assert from_elsewhere["recipes/quickstart/scenes.yaml"]
    for path in filter(None, from_elsewhere.values()):
        assert Path(path).is_file()
    (tmp_path / "recipes/quickstart").mkdir(parents=True)
    (tmp_path / "recipes/quickstart/model.json").write_text("{}")
    found = cli._read(arguments.TRAIN_GROUPS, [str(ROOT / "recipes/quickstart/scenes.yaml")], None)[1]
    assert found[1].model_config == "recipes/quickstart/model.json"  # what is in the working folder counts first


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_packages_a_script_says_in_one_line_how_to_get_them(script, tmp_path):
    """-S: without site-packages, so nothing but Python's own can be imported."""
    (tmp_path / "common").mkdir()
    for file in (script, "arguments.py", *(f"common/{path.name}" for path in (ROOT / "common").glob("*.py"))):
        shutil.copy(ROOT / file, tmp_path / file)
    command = [sys.executable, "-S", script, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{script}: no yaml and no torch (")
    assert "make install, or " in line
    assert "pip install -r requirements.txt -c constraints.txt" in line


@pytest.mark.parametrize("mistake", ["num_beam: 3", "num_beams: many", "scst_top_p: 2", "a: ["])
def test_a_mistake_in_a_recipe_answers_at_once(mistake, tmp_path):
    (tmp_path / "recipe.yaml").write_text(mistake, encoding="utf-8")
    result, seconds = start("train.py", str(tmp_path / "recipe.yaml"))
    assert result.returncode == 2
    assert seconds < 2


def test_the_trainers_flags_are_those_of_the_installed_transformers():
    """Read from its source, they are what its own parser makes of the class itself."""

    def flags(parser):
        return {
            action.option_strings[0]: (
                action.dest, action.option_strings, action.default, action.nargs, action.const,
                action.choices and list(action.choices), getattr(action.type, "__name__", str(action.type)), action.help,
            )
            for action in parser._actions
        }  # fmt: skip

    read = flags(cli.argument_parser((arguments.AllTrainFlags,)))
    real = flags(HfArgumentParser((arguments.TrainArguments,)))
    assert list(read) == list(real)
    assert read == real


def test_flags_reach_the_trainer(tmp_path):
    words = ["--output_dir", str(tmp_path), "--seed", "7", "--optim", "adamw_torch", "--no_load_best_model_at_end"]
    words += ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--report_to", "none"]
    (args,) = cli.parse((arguments.AllTrainFlags,), words)
    assert type(args) is arguments.TrainArguments
    assert (args.seed, args.optim, args.load_best_model_at_end) == (7, "adamw_torch", False)
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine", {"num_cycles": 2})
    default, same = arguments.TrainArguments(output_dir=str(tmp_path)), cli.parse((arguments.AllTrainFlags,), words[:2])
    assert same[0].to_dict() == default.to_dict()


GROUPS = [getattr(arguments, name) for name in dir(arguments) if name.endswith("_GROUPS")]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: groups[-1].__name__)
def test_no_flag_takes_a_number_that_is_not_finite(groups, number, capsys):
    fields = [field for group in groups for field in dataclasses.fields(group) if field.init]
    names = [field.name for field in fields if field.type in (float, float | None, "float", "float | None")]
    assert len(names) >= (10 if groups is arguments.TRAIN_GROUPS else 0)
    for name in names:
        with pytest.raises(SystemExit) as ended:
            cli._read(groups, [f"--{name}={number}"], None)
        assert ended.value.code == 2
        assert f"--{name} {float(number)}: name a finite number." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flickr8k", "ariG23498/flickr8k", "org/model-1.5", "s3://bucket/a.csv", "*.toml"])
def test_what_may_be_elsewhere_is_not_missing(name):
    assert exists(name) or may_be_on_hub(name)
