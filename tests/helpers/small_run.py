"""A small run of train.py: its captions and splits, its flags, and the weights it leaves."""

import tiny
from safetensors.torch import load_file

CAPTIONS = {
    f"photo{i}": [f"a {colour} {shape} on the grass.", f"the small {colour} {shape} near water."]
    for i, (colour, shape) in enumerate(
        (c, s) for c in ("red", "green", "blue", "yellow") for s in ("circle", "square", "star", "ball")
    )
}
SPLITS = dict.fromkeys(CAPTIONS, "train") | {
    "photo3": "validation", "photo6": "validation", "photo9": "test", "photo12": "test",
}  # fmt: skip


def flags(folder, dataset, output, **changed):
    """train.py's flags for a small run."""
    values = {
        "dataset_name": dataset, "output_dir": output, "model_config": tiny.write_config(folder),
        "tokenizer_vocab": tiny.write_vocabulary(folder), "num_train_epochs": 3, "learning_rate": 1e-3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "gradient_checkpointing": "false", "num_beams": 2, "max_new_tokens": 8, "meteor": "false", "spice": "false",
        "bootstrap_samples": 50,
    }  # fmt: skip
    return [word for name, value in (values | changed).items() for word in (f"--{name}", value)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def checkpoints(folder) -> list:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
