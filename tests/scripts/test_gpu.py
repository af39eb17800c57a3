"""The scripts on a CUDA GPU (make test-gpu): the same captions as on the CPU, exact resumption, quantised weights."""

import importlib.util
import json
import shutil

import families
import pytest
import tiny
import torch
from small_run import checkpoints, equal_weights, flags, weights

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA GPU here, or make test hides it"
)
BEST = {"metric_for_best_model": "loss", "greater_is_better": "true"}  # the first checkpoint is the best one


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.run("train.py", *flags(folder, dataset, folder / "out", **BEST))
    return folder / "out"


def state(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def test_a_run_in_bfloat16_ends_with_its_best_weights_in_float32(trained):
    best = trained / f"checkpoint-{state(trained)['best_global_step']}"
    assert best != checkpoints(trained)[-1]
    assert equal_weights(trained, best)
    assert not equal_weights(trained, checkpoints(trained)[-1])
    assert {weight.dtype for weight in weights(trained).values()} == {torch.float32}
    results = json.loads((trained / "train_results.json").read_text())
    assert results["train_peak_gpu_memory_gib"] > 0
    assert json.loads((trained / "run.json").read_text())["flags"]["bf16"] is True


@pytest.mark.parametrize("changed", [{}, {"freeze_vision": "true"}, {"dataloader_num_workers": 0}], ids=str)
def test_a_run_that_was_stopped_ends_with_the_weights_of_an_unbroken_one(dataset, tmp_path, changed):
    tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "whole", **BEST, **changed))
    first, last = checkpoints(tmp_path / "whole")[0], checkpoints(tmp_path / "whole")[-1]
    shutil.copytree(first, tmp_path / "stopped" / first.name)
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "stopped")
    tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "stopped", **BEST, **changed))
    assert equal_weights(tmp_path / "stopped" / last.name, last)
    assert equal_weights(tmp_path / "stopped", tmp_path / "whole")


def test_in_float32_captions_and_scores_are_the_cpus(trained, dataset, tmp_path):
    command = ["--model_name_or_path", trained, "--dataset_name", dataset, "--meteor", "false", "--spice", "false"]
    said = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        tiny.run("evaluate.py", *command, "--device", device, "--bf16", "false", "--output_dir", out)
        scores = json.loads((out / "coco_metrics.json").read_text())
        said.append((json.loads((out / "predictions.json").read_text()), scores["CIDEr"], scores["sacrebleu"]))
    assert said[0] == said[1]


def test_infer_with_workers_and_a_small_last_batch_says_what_one_image_at_a_time_says(trained, dataset, tmp_path):
    images = sorted(dataset.parent.glob("*.png"))
    command = [*images, "--model_name_or_path", trained, "--bf16", "false", "--num_beams", 3]
    said = []
    for batch, workers in ((5, 2), (1, 0)):
        output = tmp_path / f"{batch}.jsonl"
        sizes = ("--per_device_eval_batch_size", batch, "--dataloader_num_workers", workers)
        tiny.run("infer.py", *command, *sizes, "--output", output)
        said.append([json.loads(line)["caption"] for line in output.read_text().splitlines()])
    assert said[0] == said[1]
    assert len(said[0]) == len(images)


def test_the_same_seed_draws_the_same_captions_to_reward(trained, dataset, tmp_path):
    changed = {"objective": "scst", "model_name_or_path": trained, "per_device_train_batch_size": 3, "max_steps": 4}
    for name in ("one", "two"):
        words = flags(tmp_path, dataset, tmp_path / name, **changed)
        for flag in ("--model_config", "--tokenizer_vocab"):
            del words[(at := words.index(flag)) : at + 2]
        tiny.run("train.py", *words)
    assert equal_weights(tmp_path / "one", tmp_path / "two")
    assert not equal_weights(tmp_path / "one", trained)
    assert all(abs(row["loss"]) < 1e4 for row in state(tmp_path / "one")["log_history"] if "loss" in row)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["blip2-opt", "llava"])
def test_an_adapter_of_quantised_weights_is_trained_and_used(dataset, tmp_path, monkeypatch, family, bits):
    """Blocks of 64 weights share a scale, so the layers are wider than those of other tests."""
    for part, sizes in (("DECODER", 128), ("LLAMA", 128), ("VISION", 64)):
        wide = getattr(families, part) | {"hidden_size": sizes, "intermediate_size": 2 * sizes}
        monkeypatch.setattr(families, part, wide | ({"head_dim": 64} if part == "LLAMA" else {}))
    model, processor = families.build(family)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    command = ["--model_name_or_path", tmp_path / "base", "--dataset_name", dataset, "--quantization", bits]
    command += ["--use_peft", "true", "--num_train_epochs", 2, "--learning_rate", 1e-2, "--max_new_tokens", 6]
    command += ["--meteor", "false", "--spice", "false", "--bootstrap_samples", 50, "--logging_steps", 1]
    tiny.run("train.py", *command, "--output_dir", tmp_path / "out")
    losses = [row["loss"] for row in state(tmp_path / "out")["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]
    images = sorted(dataset.parent.glob("*.png"))[:3]
    words = ("--model_name_or_path", tmp_path / "out", "--quantization", bits, "--output", tmp_path / "said.jsonl")
    tiny.run("infer.py", *images, *words)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 3


def test_more_processes_than_gpus_are_refused_in_one_line(dataset, tmp_path):
    count = torch.cuda.device_count() + 1
    process = tiny.start("train.py", *flags(tmp_path, dataset, tmp_path / "out"), processes=count)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    said = f"{count} processes were started, and this machine has GPUs for {count - 1}. Start one for each GPU."
    assert f"train.py: {said}" in error
