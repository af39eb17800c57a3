"""What to say about a flag that there is not: names of other programs, then misspelt names."""

import difflib

# What transformers' Trainer, TRL, argparse scripts and Gradio call it -> the flag here, the first that the script has; or
# what to do instead.
HABITS = {
    **dict.fromkeys(
        (
            "model",
            "model_name",
            "model_id",
            "model_path",
            "pretrained",
            "base_model",
            "checkpoint",
            "ckpt",
            "init_from",
        ),
        ("model_name_or_path", "llm", "FOLDER"),
    ),
    **dict.fromkeys(
        ("dataset", "data", "dataset_path", "data_path", "data_dir", "train_file", "csv", "annotations", "input"),
        ("dataset_name", "PATHS", "TASK"),
    ),
    **dict.fromkeys(("images", "image", "image_path"), ("PATHS", "image_dir", "examples")),
    **dict.fromkeys(("image_folder", "image_root", "images_dir", "img_dir"), ("image_dir", "examples")),
    **dict.fromkeys(
        ("batch_size", "batch", "bs", "train_batch_size"),
        ("per_device_train_batch_size", "per_device_eval_batch_size", "per_device_batch_size"),
    ),
    **dict.fromkeys(("eval_batch_size", "test_batch_size"), ("per_device_eval_batch_size",)),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs"), ("num_train_epochs",)),
    **dict.fromkeys(("lr", "rate"), ("learning_rate",)),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps", "num_train_steps"), ("max_steps",)),
    **dict.fromkeys(("output", "out", "output_file", "save_dir", "out_dir", "output_path"), ("output", "output_dir")),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "accumulate_grad_batches"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), ("warmup_steps",)),
    **dict.fromkeys(("scheduler", "lr_scheduler"), ("lr_scheduler_type",)),
    "optimizer": ("optim",),
    **dict.fromkeys(("workers", "num_workers", "n_workers"), ("dataloader_num_workers",)),
    **dict.fromkeys(("gpu", "gpus", "cuda"), ("device",)),
    **dict.fromkeys(("precision", "mixed_precision", "half", "amp"), ("bf16",)),
    **dict.fromkeys(("lora", "peft"), ("use_peft",)),
    **dict.fromkeys(("rank", "lora_rank"), ("lora_r",)),
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("lora_targets",)),
    "load_in_4bit": "use --quantization 4bit",
    "load_in_8bit": "use --quantization 8bit",
    **dict.fromkeys(("beams", "beam_size", "beam"), ("num_beams",)),
    **dict.fromkeys(("max_length", "max_gen_length", "max_tokens"), ("max_new_tokens",)),
    **dict.fromkeys(("metric", "best_metric", "monitor"), ("metric_for_best_model", "sweep_metric")),
    **dict.fromkeys(("early_stopping_patience", "es_patience"), ("patience",)),
    **dict.fromkeys(("logger", "wandb", "tensorboard"), ("report_to",)),
    "evaluation_strategy": ("eval_strategy",),
    "tokenizer_name": ("tokenizer_vocab", "tokenizer"),
    "hub_repo_id": ("hub_model_id", "push_to_hub"),
    "repo_id": ("hub_model_id", "push_to_hub"),
    "refs": ("references",),
    "preds": ("predictions",),
    "server_port": ("port",),
    **dict.fromkeys(("server_name", "ip", "listen"), ("host",)),
    "auth": ("login",),
    "share": "there are no public links. --host 0.0.0.0 --login FILE opens the demo to your network",
    **dict.fromkeys(
        ("resume", "resume_from", "auto_resume"), "a run resumes by itself: give the same command, with the same output"
    ),
    "overwrite_output_dir": "nothing is overwritten. Name another --output_dir, or delete the folder",
    "trust_remote_code": "code from the Hub is never run",
}


def unrecognized(word: str, known) -> str:
    """The message about `word`, a flag or a recipe's key, that is not one of the `known` names. What is named without a
    flag is known in capitals."""
    dashes, name = "--" if word.startswith("-") else "", word.lstrip("-").split("=")[0].replace("-", "_")
    habit, message = HABITS.get(name.lower()), f"unrecognized argument: {word}"
    if isinstance(habit, str):
        return f"{message}: {habit}."
    if habit is None:
        return f"{message}.{nearest(name, known, dashes)}"
    flag = next((flag for flag in habit if flag in known), None)
    if flag is None:  # what is alike means something else
        return f"{message}: there is no such setting here."
    return (
        f"{message}. It is named without a flag: {flag}."
        if flag.isupper()
        else f"{message}. Did you mean {dashes}{flag}?"
    )


def nearest(name: str, known, dashes: str = "") -> str:
    """A hint with the one known name that begins with a misspelt one, else with the closest, or nothing."""
    match = [flag for flag in known if flag.startswith(name)]
    if len(match) != 1:
        match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {dashes}{match[0]}?" if match else ""
