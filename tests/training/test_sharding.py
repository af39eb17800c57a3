"""FSDP2 on two CPU processes: all that holds in one process holds there, on tiny models of the real classes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from conftest import ROOT
from ranks import Ranks
from safetensors.torch import load_file
from small_run import CAPTIONS
from torch.distributed.fsdp import FSDPModule

from common.errors import UserError
from models.loading import load_model
from training.sharding import check_sharding

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks of one process, to spare their imports")
FSDP2, DDP = (ROOT / f"recipes/accelerate/{name}.yaml" for name in ("fsdp2", "ddp"))
# Seven images to evaluate: two processes have four and three of them.
SPLITS = {name: "train" if i < 8 else "test" if i == 8 else "validation" for i, name in enumerate(CAPTIONS)}
# The checkpoint of the highest loss is the best one: the first of two, so that the last is not the one to end with.
RUN = {
    "num_train_epochs": 2, "learning_rate": 2e-3, "gradient_accumulation_steps": 2, "logging_steps": 1,
    "num_beams": 2, "max_new_tokens": 8, "meteor": "false", "spice": "false", "bootstrap_samples": 0, "report": "false", "ddp_timeout": 60,
    "report_to": "none", "per_device_eval_batch_size": 2, "metric_for_best_model": "loss", "greater_is_better": "true",
    "lora_dropout": 0,
}  # fmt: skip
LORA = {"use_peft": "true", "lora_r": 4}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("logs"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), CAPTIONS, SPLITS)


def save(name: str, folder: Path) -> Path:
    model, processor = families.build(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(ranks, base, dataset, output, *, processes=1, config=None, until=None, **changed):
    values = RUN | {"per_device_train_batch_size": 2 // processes} | changed
    values |= {"model_name_or_path": base, "dataset_name": dataset, "output_dir": output}
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    return ranks.run(*words, processes=processes, config=config, until=until)


def sharded(*arguments, **changed):
    return train(*arguments, processes=2, config=FSDP2, **changed)


class Family:
    """A family's tiny model, trained by one process and by two that share it."""

    def __init__(self, name, kind, ranks, dataset, folder):
        self.base, self.flags = save(name, folder / "base"), LORA if kind == "lora" else {}
        self.one, self.two, self.dataset, self.ranks = folder / "one", folder / "two", dataset, ranks
        train(ranks, self.base, dataset, self.one, **self.flags)
        self.log, _ = sharded(ranks, self.base, dataset, self.two, **self.flags)


CASES = [(name, kind) for name in ("blip2-opt", "llava", "idefics3") for kind in ("full", "lora")]
CASES += [("blip2-t5", "full")]  # weights that four modules share
FAST = [("llava", "lora"), ("blip2-t5", "full")]
CASES = [pytest.param(case, id="-".join(case), marks=() if case in FAST else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module", params=CASES)
def trained(request, ranks, dataset, tmp_path_factory):
    return Family(*request.param, ranks, dataset, tmp_path_factory.mktemp("-".join(request.param)))


def state(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def logged(folder, name: str) -> list[float]:
    return [row[name] for row in state(folder)["log_history"] if name in row]


def captions(folder) -> dict:
    return {row["image_id"]: row["caption"] for row in json.loads((folder / "predictions.json").read_text())}


def weights(folder) -> dict:
    return {name: one for file in sorted(folder.glob("*model*.safetensors")) for name, one in load_file(file).items()}


def test_losses_are_those_of_one_process(trained):
    for name in ("loss", "eval_loss"):
        one, two = logged(trained.one, name), logged(trained.two, name)
        assert len(one) > 1
        assert two == pytest.approx(one, abs=1e-5), name
    assert logged(trained.two, "grad_norm") == pytest.approx(logged(trained.one, "grad_norm"), rel=1e-3)


def test_a_process_holds_its_share_alone(trained):
    """The log counts local parts of DTensors: a parameter that is none has no such part, and ends the run."""
    here, of = re.search(
        r"2 processes share the model; this one holds ([\d,]+) of ([\d,]+) weights", trained.log
    ).groups()
    here, of = (int(number.replace(",", "")) for number in (here, of))
    assert 0.5 * of <= here < 0.52 * of  # the first has the odd rows
    model, _ = load_model(str(trained.two), merge=False)
    assert of == sum(one.numel() for one in model.parameters())


def test_the_card_names_the_librarys_class(trained):
    assert "FSDP" not in (trained.two / "README.md").read_text()


def test_weights_and_captions_are_those_of_one_process(trained):
    one, two = weights(trained.one), weights(trained.two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    for split in ("", "validation"):
        assert captions(trained.two / split) == captions(trained.one / split)
    assert len(captions(trained.two / "validation")) == 7


def test_the_best_checkpoint_is_what_the_folder_holds(trained):
    """It is the first of two, so that the last is not it; each process wrote its share of it."""
    two = state(trained.two)
    assert two["best_global_step"] == two["global_step"] // 2
    kept = trained.two / f"checkpoint-{two['best_global_step']}"
    assert len(list((kept / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    shares = checkpoint_weights(kept)
    final = {name.replace(".default", ""): one for name, one in shares.items()}
    model, _ = load_model(str(trained.two), merge=False)
    ours = {name.replace(".default", ""): one for name, one in model.state_dict().items()}
    assert len(final) >= len(weights(trained.two))
    assert [name for name, one in final.items() if not ours[name].equal(one)] == []
    last = checkpoint_weights(trained.two / f"checkpoint-{two['global_step']}")
    assert [name for name in shares if not shares[name].equal(last[name])]


def checkpoint_weights(checkpoint) -> dict:
    """The weights in the shares of a checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", checkpoint.parent / "whole.bin")
    found = torch.load(checkpoint.parent / "whole.bin", weights_only=True)["model"]
    (checkpoint.parent / "whole.bin").unlink()
    return found


def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(trained, tmp_path):
    stopped = tmp_path / "stopped"
    first = stopped / f"checkpoint-{state(trained.two)['best_global_step']}"
    given = (trained.ranks, trained.base, trained.dataset, stopped)
    sharded(*given, **trained.flags, until=first / "trainer_state.json")
    assert not (stopped / "trainer_state.json").exists()
    log, _ = sharded(*given, **trained.flags)
    assert f"resuming from {first}" in log
    last = f"checkpoint-{state(trained.two)['global_step']}"
    unbroken, resumed = (checkpoint_weights(folder / last) for folder in (trained.two, stopped))
    assert unbroken.keys() == resumed.keys()
    assert [name for name in unbroken if not unbroken[name].equal(resumed[name])] == []
    assert all(one.equal(weights(stopped)[name]) for name, one in weights(trained.two).items())


def test_an_export_is_one_folder_that_captions_alike(trained, tmp_path):
    """Of an adapter, merged; of a whole model, copied."""
    images = sorted(trained.dataset.parent.glob("*.png"))
    trained.ranks.run(trained.two, "--output_dir", tmp_path / "exported", script="export")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert not (tmp_path / "exported" / "adapter_config.json").exists()
    words = ["--model_name_or_path", tmp_path / "exported", "--output", tmp_path / "captions.jsonl"]
    trained.ranks.run(*images, *words, script="infer")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    found = {Path(row["image"]).name: row["caption"] for row in rows}
    known = captions(trained.two / "validation") | captions(trained.two)
    assert {name: found[name] for name in known} == known


@pytest.mark.slow
def test_rewards_of_captions_drawn_on_shares_are_those_of_two_whole_models(ranks, dataset, tmp_path):
    """SCST with the encoder trained, so with gradients through the shared encoding, and DiCO, whose reference is kept in
    shares: both as under DDP, where each process has the model."""
    base = save("llava", tmp_path / "base")
    for objective in ({"objective": "scst", "scst_samples": 3, "ce_weight": 0.3}, {"objective": "dico"}):
        flags = objective | {"num_train_epochs": 1, "metric_for_best_model": "CIDEr", "dico_candidates": 3}
        for name, config in (("ddp", DDP), ("fsdp", FSDP2)):
            out = tmp_path / f"{objective['objective']}-{name}"
            train(ranks, base, dataset, out, processes=2, config=config, **flags)
        one, two = (tmp_path / f"{objective['objective']}-{name}" for name in ("ddp", "fsdp"))
        for name in ("loss", "reward"):
            assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-5), (objective, name)
        assert len(set(logged(two, "loss"))) > 1
        assert captions(two / "validation") == captions(one / "validation")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_with_a_model_each_give_what_one_gives(kind, ranks, dataset, tmp_path):
    """DDP, of a model with weights that no loss reaches, checkpointed: the library's defaults end it at the second step."""
    base, flags = save("llava", tmp_path / "base"), LORA if kind == "lora" else {}
    train(ranks, base, dataset, tmp_path / "one", **flags)
    train(ranks, base, dataset, tmp_path / "two", processes=2, config=DDP, **flags)
    for name in ("loss", "eval_loss"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), abs=1e-5), name
    assert captions(tmp_path / "two/validation") == captions(tmp_path / "one/validation")


def test_a_dry_run_reads_no_weights_and_counts_the_shares(ranks, tmp_path):
    base = save("blip2-opt", tmp_path / "base")
    (base / "model.safetensors").unlink()
    words = ["--model_name_or_path", base, "--output_dir", tmp_path / "out", "--dry_run"]
    (alone,) = ranks.run(*words)
    shared, other = ranks.run(*words, processes=2, config=FSDP2)
    assert "parameters 80,512, trained 80,512 (100.00%)" in alone
    assert "GiB per process (1 process):" in alone
    assert "GiB per process (2 processes, FSDP):" in shared
    assert "GiB per process" not in other
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_documented_command_is_what_the_other_tests_start(dataset, tmp_path):
    """accelerate launch itself, once."""
    base, values = save("blip2-opt", tmp_path / "base"), RUN | {"num_train_epochs": 1, "per_device_train_batch_size": 1}
    values |= {"model_name_or_path": base, "dataset_name": dataset, "output_dir": tmp_path / "out"}
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", FSDP2, "--num_processes", 2]
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    command = list(map(str, [*launch, "--main_process_port", 0, ROOT / "train.py", *words]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes share the model" in done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["blip2-opt", "llava", "idefics3"])
def test_zero_gives_what_one_process_gives(name, stage, kind, ranks, dataset, tmp_path):
    """Losses, captions of unequal shares, best checkpoint, and a resumed run."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed, and DS_ACCELERATOR=cpu")
    base, flags = save(name, tmp_path / "base"), LORA if kind == "lora" else {}
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    if flags:  # from an adapter: ZeRO-3 reads weights with other random numbers, and a new one would begin elsewhere
        train(ranks, base, dataset, tmp_path / "adapter", **flags, num_train_epochs=1)
        base = tmp_path / "adapter"
    launch = {"processes": 2, "config": ROOT / f"recipes/accelerate/zero{stage}.yaml"}
    train(ranks, base, dataset, one, **flags)
    train(ranks, base, dataset, two, **launch, **flags)
    for name in ("loss", "eval_loss"):
        assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-5), name
    assert captions(two / "validation") == captions(one / "validation")
    first, last = (two / f"checkpoint-{step}" for step in (state(two)["best_global_step"], state(two)["global_step"]))
    assert all(tensor.equal(weights(first)[name]) for name, tensor in weights(two).items())
    assert any(not tensor.equal(weights(last)[name]) for name, tensor in weights(two).items())
    shutil.copytree(first, stopped / first.name)
    shutil.copy(two / "run.json", stopped)
    train(ranks, base, dataset, stopped, **launch, **flags)
    assert all(tensor.equal(weights(stopped / last.name)[name]) for name, tensor in weights(last).items())


REFUSED = {
    "4bit": ({"quantization": "4bit"}, "quantization 4bit: quantised weights are not sharded"),
    "features": ({"feature_cache": "memory", "freeze_vision": "true"}, "feature_cache memory: cached features need"),
    "batch size": ({"auto_find_batch_size": "true"}, "auto_find_batch_size restarts with"),
    "only weights": ({"save_only_model": "true"}, "save_only_model keeps nothing to resume from"),
    "compiled": ({"torch_compile": "true"}, "torch_compile was not tested with FSDP"),
    "FSDP1": ({"environment": {"FSDP_VERSION": "1"}}, "only FSDP2 is supported. Set fsdp_version: 2"),
    "whole": ({"environment": {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}}, "checkpoints are sharded"),
    "twice": ({"environment": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}}, "in train.py it is --gradient_check"),
    "alone": ({"processes": 1}, "shards a model across processes, and there is only one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_loaded(case, ranks, tmp_path):
    flags, line = REFUSED[case]
    options = {"processes": 2, "config": FSDP2} | {n: flags[n] for n in ("processes",) if n in flags}
    words = [word for n, v in flags.items() if n not in ("processes", "environment") for word in (f"--{n}", v)]
    words += ["--model_name_or_path", "nowhere/nothing", "--output_dir", tmp_path / "out"]
    log, *_ = ranks.run(*words, code=2, **options, **flags.get("environment", {}))
    said = [row for row in log.splitlines() if row.startswith("train.py: ")]
    assert len(said) == 1, log
    assert line in said[0]
    assert "Traceback" not in log
    assert not (tmp_path / "out").exists()


def test_a_torch_whose_shards_cannot_be_kept_gathered_is_refused(monkeypatch):
    """It would train, and end in a traceback at the first evaluation."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    args = SimpleNamespace(
        auto_find_batch_size=False, save_only_model=False, objective="cross_entropy", torch_compile=False, world_size=2
    )
    others = SimpleNamespace(quantization=None), SimpleNamespace(feature_cache="off")
    check_sharding(args, *others)
    monkeypatch.delattr(FSDPModule, "set_reshard_after_forward")
    with pytest.raises(UserError, match=r"With FSDP, torch \d.*: torch 2.8 or later is needed"):
        check_sharding(args, *others)
