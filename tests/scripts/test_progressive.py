"""The three recipes of progressive training, one after the other, on a tiny BLIP-2 with T5."""

import itertools
import json

import families
import pytest
import tiny
from conftest import ROOT
from safetensors.torch import load_file

CAPTIONS = {f"photo{i}": [families.TEXT[i % 10], families.TEXT[(i + 3) % 10]] for i in range(12)}
SPLITS = dict.fromkeys(CAPTIONS, "train") | dict.fromkeys(("photo8", "photo9"), "validation") | {"photo10": "test"}
NO_JAVA = ("--meteor", "false", "--spice", "false")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(dataset, folders of the three stages)."""
    folder = tmp_path_factory.mktemp("progressive")
    dataset = tiny.write_photos(folder / "photos", CAPTIONS, SPLITS)
    model, processor = families.build("blip2-t5")
    model.save_pretrained(folder / "0")
    processor.save_pretrained(folder / "0")
    folders = [folder / "0"]
    for number, recipe in enumerate(("1_lora", "2_augment", "3_scst"), start=1):
        tiny.run(
            "train.py", ROOT / f"recipes/progressive/{recipe}.yaml", "--dataset_name", dataset, "--model_name_or_path",
            folders[-1], "--output_dir", folder / str(number), "--num_train_epochs", 2, "--learning_rate", 1e-2,
            "--per_device_train_batch_size", 3, "--bf16", "false", "--max_new_tokens", 8, "--bootstrap_samples", 0,
            "--logging_steps", 1, *NO_JAVA,
        )  # fmt: skip
        folders.append(folder / str(number))
    return dataset, folders[1:]


def test_lora_reaches_the_language_model_and_the_qformer_at_every_stage(stages):
    """The published code looked for the Q-Former's layers under names that they do not have, and passed over them."""
    _, folders = stages
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for part in ("qformer", "language_model"):
        # lora_B begins at zero: what is not zero was trained.
        names = [name for name in adapters[0] if part in name and "lora_B" in name]
        assert names
        assert all(adapters[0][name].abs().max() > 0 for name in names)
        for before, after in itertools.pairwise(adapters):
            assert any(not before[name].equal(after[name]) for name in names)


def test_evaluation_has_the_adapter_that_was_trained(stages, tmp_path):
    """The published code injected another LoRA for inference than the one that it had trained."""
    dataset, folders = stages
    tiny.run(
        "evaluate.py",
        "--model_name_or_path",
        folders[-1],
        "--dataset_name",
        dataset,
        "--output_dir",
        tmp_path,
        *NO_JAVA,
    )
    trained, again = (json.loads((folder / "coco_metrics.json").read_text()) for folder in (folders[-1], tmp_path))
    assert again["generation"]["prompt"] == "caption:"
    assert trained["sacrebleu"] == again["sacrebleu"]
    captions = [json.loads((folder / "predictions.json").read_text()) for folder in (folders[-1], tmp_path)]
    assert captions[0] == captions[1]


def test_the_last_stage_is_scst_mixed_with_cross_entropy(stages):
    _, folders = stages
    log = json.loads((folders[-1] / "trainer_state.json").read_text())["log_history"]
    assert all({"reward_cider", "ce_loss"} <= set(row) for row in log if "loss" in row)
    assert json.loads((folders[-1] / "run.json").read_text())["flags"]["scst_top_p"] == 0.9
