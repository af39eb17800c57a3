"""The command line: --help and mistakes answer at once, and the flags are those of the dataclasses and of transformers."""

import dataclasses
import os
import re
import subprocess
import sys

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

SCRIPTS = {"train.py": [], "evaluate.py": [], "demo.py": [], "infer.py": ["x.jpg"], "export.py": ["folder"],
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
    ("rewrite.py", ["fuse", "in.jsonl", "--llm", "hf:x", "--dry_run"], "in.jsonl: no such file or folder"),
    ("export.py", ["runs/none"], "runs/none: no such file or folder"),
    ("demo.py", ["--login", "users.txt"], "--login users.txt: no such file or folder"),
    ("demo.py", ["--login", "here.txt"], "--login here.txt: every line must be user:password."),
    ("demo.py", ["--port", "70000"], "--port 70000: bind(): port must be 0-65535"),
]  # fmt: skip


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
