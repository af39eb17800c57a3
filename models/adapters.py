"""LoRA: small trainable matrices added to the frozen weights of a trained model (arXiv 2106.09685), through peft."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from common.errors import UserError
from common.weights import check_keys, errors_in_one_line
from models.families import family_of

logger = logging.getLogger(__name__)

# Flags of a new adapter that are left out, and their names in an adapter's own config.
NEW = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "modules_to_save": []}
SAVED_AS = {"lora_r": "r"}


def settle(flags, model_name_or_path: str | None, revision: str = "main") -> None:
    """Fill in the `flags` (AdapterArguments) that were left out, in place: an adapter that is trained further keeps its
    own values, a new one has those of NEW. UserError if a flag contradicts the adapter."""
    saved = find_adapter(model_name_or_path, revision) if flags.use_peft and model_name_or_path else None
    for name, value in NEW.items():
        asked = getattr(flags, name)
        if saved:
            value = saved.get(SAVED_AS.get(name, name)) or ([] if name == "modules_to_save" else 0)
            if asked is not None and asked != value:
                raise UserError(
                    f"--{name} {asked}: the adapter of {model_name_or_path} has {value}, and keeps it when it is trained "
                    "further. Leave the flag out."
                )
        setattr(flags, name, value if asked is None else asked)


def check_targets(model: PeftModel, targets: str | None) -> None:
    """UserError if `targets`, a regular expression as for add_adapter, does not name the layers that the adapter has."""
    layers = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    names = {name.replace(".base_layer", "") for name, _ in _linear(model.get_base_model()) if ".lora_" not in name}
    if targets and {name for name in names if re.fullmatch(targets, name)} != layers:
        raise UserError(
            f"--lora_targets {targets}: the adapter has the layers {', '.join(_layers(layers))}, and keeps them when it is "
            "trained further. Leave the flag out."
        )


def describe(model) -> dict | None:
    """What the adapter of `model` is: rank, alpha, dropout, {layers that have it: how many}, modules trained in full.
    None if it has none."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config["default"]
    layers = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    kept = ("r", "lora_alpha", "lora_dropout")
    return {
        **{name: getattr(config, name, None) for name in kept},
        "layers": _layers(layers),
        "modules_to_save": list(config.modules_to_save or []),
    }


def _linear(model) -> list[tuple]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def _layers(names) -> dict[str, int]:
    """How many of the layers are of each sort: their names with numbers left out."""
    return dict(sorted(Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names).items()))


def add_adapter(
    model, *, r: int, alpha: int, dropout: float, targets: str | None = None, modules_to_save=()
) -> PeftModel:
    """The model with a new LoRA adapter; only it and the modules of `modules_to_save` are trainable.

    `targets` is a regular expression that the whole name of a linear layer must match (default: the family's). ValueError
    if it matches none, or if a name of `modules_to_save` does not occur.
    """
    base = model.config.name_or_path
    if not base:
        raise UserError("An adapter is for a trained model: give --model_name_or_path instead of --model_config.")
    targets = targets or family_of(model.config).lora_targets
    linear = [name for name, _ in _linear(model)]
    matched = [name for name in linear if re.fullmatch(targets, name)]
    if not matched:
        some = ", ".join([*_layers(linear)][:12])
        raise UserError(f"lora_targets '{targets}' matches no linear layer of {type(model).__name__}. It has: {some}.")
    names = {name for name, _ in model.named_modules()}
    for name in modules_to_save:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            raise UserError(f"modules_to_save: {type(model).__name__} has no module {name}.")
    for name, count in _layers(matched).items():
        logger.info("LoRA adapts %3d x %s", count, name)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=matched,
        modules_to_save=list(modules_to_save) or None,
    )
    model = _without_card(get_peft_model(model, config))
    # The adapter may be loaded from another working directory.
    model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    logger.info("%s", "trainable: {:,} of {:,} weights".format(*model.get_nb_trainable_parameters()))
    return model


def find_adapter(model_name_or_path: str, revision: str = "main") -> dict | None:
    """The adapter_config.json of an adapter folder or Hub repository; None if it is a whole model's."""
    folder = Path(model_name_or_path)
    if folder.exists():
        path = folder / "adapter_config.json"
        path = path if path.is_file() else None
    else:
        try:
            path = find_adapter_config_file(model_name_or_path, revision=revision)
        except OSError:  # no such name, or no network: loading the model will report it
            path = None
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def own_file(model_name_or_path: str, name: str, revision: str = "main") -> Path | None:
    """A file of a model's folder or Hub repository; None if it has none of this name."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model_name_or_path, name, revision=revision, **quiet)
    return path and Path(path)


def load_adapter(base, model_name_or_path: str, revision: str = "main") -> PeftModel:
    """`base` with the adapter, trainable, and with the prompt and generation settings of the adapter's folder or repository."""
    with errors_in_one_line(model_name_or_path):
        model = PeftModel.from_pretrained(base, model_name_or_path, is_trainable=True, revision=revision)
    load_adapter_weights(_without_card(model), model_name_or_path, revision)
    if config := own_file(model_name_or_path, "config.json", revision):  # of our own; others caption as their base does
        saved = json.loads(config.read_text(encoding="utf-8"))
        base.config.caption_prompt, base.config.caption_text = (
            saved.get("caption_prompt", ""),
            saved.get("caption_text", {}),
        )
    if settings := own_file(model_name_or_path, "generation_config.json", revision):
        base.generation_config = GenerationConfig.from_pretrained(settings.parent)
    return model


def _without_card(model: PeftModel) -> PeftModel:
    """`model`, which is saved without peft's own model card: a template for a person to fill in, which would stand before
    the card of reports/model_card.py, and change it at the next save."""
    model.create_or_update_model_card = lambda output_dir: None
    return model


def load_adapter_weights(model: PeftModel, model_name_or_path: str, revision: str = "main") -> None:
    """Load the weights of an adapter into `model`, in place. ValueError if one is missing or unexpected: peft itself
    only warns."""
    with errors_in_one_line(model_name_or_path):
        state = load_peft_weights(model_name_or_path, device="cpu", revision=revision)
        result = set_peft_model_state_dict(model, state)
    names = {name for name, _ in model.named_parameters() if re.search(r"\.default(\.|$)", name)}
    check_keys(model_name_or_path, "its adapter", names & set(result.missing_keys), result.unexpected_keys)
