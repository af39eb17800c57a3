"""Builds the parts of a train.py run from its flags: the model, the collator, the datasets; and plans its memory."""

import difflib

from peft import PeftModel

import data
from captioner import Captioner
from collator import CaptionCollator, input_size
from common.errors import UserError
from common.processes import captions_in_bfloat16, device_memory
from common.sharding import strategy
from data.prompts import PROMPTS
from metrics.clip_scores import NAMES
from metrics.names import SCORES
from models.families import base_model, family_of
from models.loading import asks, build_model, load_model, make_trainable, without_weights
from training.feature_cache import keep_features
from training.lengths import PUBLISHED
from training.memory import plan
from training.sharding import shard


def check_best(args, clip_metrics: list[str]) -> None:
    """UserError, before anything is loaded, if no evaluation in training will have the score that selects the best
    checkpoint."""
    names = ["loss", *(name for name, score in SCORES.items() if score.in_training)]
    names += [f"{prefix}{NAMES.get(metric, metric)}" for metric in clip_metrics for prefix in ("", "Ref")]
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in names:
        near = difflib.get_close_matches(best.lower(), by_lower := {name.lower(): name for name in names}, n=1)
        raise UserError(
            f"--metric_for_best_model {best}: evaluations in training compute {', '.join(names)}."
            + "".join(f" Did you mean {by_lower[name]}?" for name in near)
        )


def load_augmentations(data_args, seed: int, language: str) -> dict:
    """Augmentations of images and captions as CaptionCollator takes them; ValueError names an unknown operation, or one
    that is not for captions of `language`."""
    images, texts = data_args.augment, data_args.augment_text
    return {
        "augmentation": data.Augmentation(images, seed=seed, language=language) if images else None,
        "text_augmentation": data.TextAugmentation(texts, seed, language) if texts else None,
    }


def questions(model_args, scratch_args, generation_args) -> dict:
    """What images are asked, as data.load takes it."""
    prompt = generation_args.settings()["prompt"]
    if scratch_args.model_config:
        return {"prompt": prompt, "own_questions": False}
    return asks(model_args.model_name_or_path, model_args.model_revision, prompt)


def open_model(model_args, scratch_args, adapter_args, captions, weights: bool = True) -> tuple:
    """(model, processor). A model of random weights, whose tokenizer learns its vocabulary from `captions` unless one is
    given; or a pretrained one, without its weights if `weights` is false."""
    if not scratch_args.model_config:
        merge = not adapter_args.use_peft
        return load_model(model_args.model_name_or_path, merge=merge, weights=weights, **model_args.loading())
    vocab, accents = scratch_args.tokenizer_vocab, scratch_args.strip_accents
    return build_model(scratch_args.model_config, vocab, captions, model_args.fast_attention, accents)


def load_captioner(
    model_args, scratch_args, adapter_args, generation_args, train_records, args, asked: dict
) -> Captioner:
    """A pretrained captioner or one with random weights; only the weights to train are trainable, and the model is
    sharded across processes if they were launched that way."""
    captions = (text for row in train_records for text in row["captions"])
    model, processor = open_model(model_args, scratch_args, adapter_args, captions)
    model = shard(make_trainable(model, adapter_args, scratch_args.freeze_vision), args)
    reading = {
        "autocast": args.autocast_dtype,
        "fast_jpeg": model_args.fast_jpeg,
        "own_questions": asked["own_questions"],
    }
    return Captioner(model, processor, **reading, **generation_args.settings())


def as_loaded(captioner: Captioner, model_args, args) -> Captioner:
    """The trained captioner as every other script will load it (Captioner.from_pretrained), so that they write the same
    captions: its adapter merged, its weights in the precision of captions. Changes the model: training is over."""
    model = captioner.model
    if getattr(model, "is_quantized", False):
        return captioner
    rounded = args.bf16 or (args.fp16 and captions_in_bfloat16(args.device)) or model_args.dtype == "bfloat16"
    like = without_weights(family_of(model.config).model_class, model.config, "bfloat16" if rounded else "float32")
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:  # a merge adds these to the rounded weights
            parameter.data = parameter.data.to(like.dtype)
    of_like = dict(like.named_buffers())  # some are in the precision of the weights, and some are not
    for name, buffer in base_model(model).named_buffers():
        buffer.data = buffer.data.to(of_like.get(name, buffer).dtype)
    if isinstance(model, PeftModel):
        model.merge_adapter()
    captioner.autocast = None
    return captioner


def build_collator(captioner, augmentations: dict, data_args, prompts_only: bool = False) -> CaptionCollator:
    if augmentations["augmentation"]:
        augmentations["augmentation"].size = input_size(captioner.processor.image_processor)
    return CaptionCollator(
        captioner.processor,
        captioner.model.config,
        max_txt_len=data_args.max_txt_len,
        prompt=captioner.prompt,
        system_prompt=captioner.system_prompt,
        fast_jpeg=captioner.fast_jpeg,
        prompts_only=prompts_only,
        **augmentations,
    )


def build_datasets(splits, captioner, collator, scratch_args, data_args, args) -> tuple:
    """(training dataset, validation records or None), with a frozen encoder's images encoded in advance."""
    if collator.prompts_only and PROMPTS in (splits["train"].column_names or ()):
        raise UserError(
            f"--objective {args.objective} asks the same of every image, and these have prompts of their own: give one "
            '--prompt without columns, such as --prompt "Describe the image."'
        )
    used = {"train": splits["train"], "validation": splits.get("validation") if args.eval_strategy != "no" else None}
    # Rewards look at all references of an image at once.
    per_image = None if collator.prompts_only else data_args.captions_per_image
    if not strategy():
        used |= keep_features(scratch_args.feature_cache, captioner, used, args, per_image, collator.augmentation)
    if data_args.streaming:
        seed = args.seed if args.data_seed is None else args.data_seed
        return data.CaptionStream(splits["train"], data_args.captions_per_image, seed), used["validation"]
    return data.CaptionPairs(used["train"], per_image), used["validation"]


def plan_memory(model_args, scratch_args, adapter_args, data_args, objective_args, args) -> None:
    """Print how much memory each process will need; reads the model's config and processor, and no weights."""
    words = [f"word{number}" for number in range(8000)]  # the largest vocabulary that is built from captions
    model, processor = open_model(model_args, scratch_args, adapter_args, words, weights=False)
    model = make_trainable(model, adapter_args, scratch_args.freeze_vision)
    captioner = Captioner(model, processor, fast_jpeg=model_args.fast_jpeg)
    data_args.max_txt_len = data_args.max_txt_len or PUBLISHED
    no_augmentations = {"augmentation": None, "text_augmentation": None}
    collator = build_collator(captioner, no_augmentations, data_args).for_evaluation()
    drawn = {
        "scst": objective_args.scst_samples,
        "dico": objective_args.dico_candidates,
        "grpo": objective_args.num_generations,
    }
    rows = drawn.get(args.objective, data_args.captions_per_image)
    memory_plan = plan(model, collator, args, rows, data_args.max_txt_len, model_args.quantization)
    if args.process_index == 0:
        print("\n".join(memory_plan.lines(device_memory(args.device), args.world_size)))
