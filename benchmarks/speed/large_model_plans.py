"""What train.py --dry_run estimates for models of published sizes: docs/large-models.md's table. No weights are read.

    python -m benchmarks.speed.large_model_plans          # needs torchvision, for Qwen's processor

The configs are those of tests/fixtures/configs (BLIP-2 OPT 6.7B: that of 2.7B with OPT 6.7B's sizes); the tokenizers are
the tests' small ones, which only changes the ids of the image placeholders.
"""

import os
import sys
from types import SimpleNamespace

import torch
from transformers import AutoConfig

from arguments import AdapterArguments
from benchmarks.harness import RESULTS, ROOT, write_result
from captioner import Captioner
from collator import CaptionCollator
from models.adapters import settle
from models.families import family_of
from models.loading import make_trainable, ready, without_weights
from training.memory import plan

GIB = 2**30
OPT_6_7B = {
    "hidden_size": 4096,
    "word_embed_proj_dim": 4096,
    "ffn_dim": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
# Processes, how they share the model, what is trained, dtype of loaded weights, images per process and step.
CASES = [
    (1, None, "LoRA, 4-bit", "bfloat16", 4),
    (2, "FSDP", "LoRA", "bfloat16", 4),
    (4, "FSDP", "full", "float32", 2),
    (8, "FSDP", "full", "float32", 2),
]


def models():
    """{name: (config, processor)}."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
    import families
    import transformers as t

    fixtures = ROOT / "tests/fixtures/configs"
    blip2 = AutoConfig.from_pretrained(fixtures / "blip2-opt-2.7b")
    blip2.text_config.update(OPT_6_7B)
    words = families.opt_tokenizer()
    blip2.image_token_index = blip2.image_token_id = words.image_token_id
    images = t.BlipImageProcessor(size={"height": 224, "width": 224})
    found = {"BLIP-2 OPT 6.7B": (blip2, t.Blip2Processor(images, words, num_query_tokens=32))}
    qwen = AutoConfig.from_pretrained(fixtures / "Qwen2.5-VL-7B-Instruct")
    _, processor = families.qwen_vl("qwen2_5_vl")
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = {"image": "<|image_pad|>", "video": "<|video_pad|>"}.get(name[:5], f"<|{name[:-9]}|>")
        setattr(qwen, name, processor.tokenizer.convert_tokens_to_ids(token))
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # as published
    processor.image_processor = t.Qwen2VLImageProcessor(size=size)
    return found | {"Qwen2.5-VL 7B": (qwen, processor)}


def estimate(config, processor, processes, how, what, dtype, images):
    os.environ["ACCELERATE_USE_FSDP"] = str(how == "FSDP").lower()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(bool(how) and how.startswith("ZeRO")).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = (how or "")[-1:]
    model = ready(without_weights(family_of(config).model_class, config, dtype), processor)
    model.config.name_or_path = "published"
    settle(adapter := AdapterArguments(use_peft=what != "full"), None)
    model = make_trainable(model, adapter, freeze_vision=False)
    prompt = Captioner(model, processor).prompt
    args = SimpleNamespace(
        world_size=processes, autocast_dtype=torch.bfloat16, optim="adamw_torch_fused", gradient_accumulation_steps=4,
        per_device_train_batch_size=images, gradient_checkpointing=True, activation_checkpointing=True,
    )  # fmt: skip
    collator = CaptionCollator(processor, config, max_txt_len=64, prompt=prompt)
    return plan(model, collator, args, 1, 64, "4bit" if "4-bit" in what else None)


def main():
    rows = []
    for name, (config, processor) in models().items():
        for processes, how, what, dtype, images in CASES:
            found = estimate(config, processor, processes, how, what, dtype, images)
            row = {"model": name, "trained": what, "processes": processes, "how": how or "whole", "images": images}
            row |= {"parameters": found.parameters, "trained_parameters": found.trained}
            counts = ("parameters", "trained")
            row |= {part: round(size / GIB, 2) for part, size in vars(found).items() if part not in counts}
            rows.append(
                row | {"training": round(found.training / GIB, 1), "evaluation": round(found.evaluation / GIB, 1)}
            )
            print(rows[-1], flush=True)
    write_result(RESULTS / "large_model_plans.json", {"gib": rows, "picture": "640 x 480", "max_txt_len": 64})


if __name__ == "__main__":
    main()
