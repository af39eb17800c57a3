"""Seconds of a step of self-critical training of a chat family: images encoded once, compared with once per caption.

    python -m benchmarks.speed.family_scst_step                      # CPU, a small LLaVA
    python -m benchmarks.speed.family_scst_step --device cuda --images 8 --hidden 1024 --layers 12

Random weights of LlavaForConditionalGeneration (CLIP's vision encoder at 224 px, Llama's decoder), five samples per image.
Sampling and the pass with gradients use

    once     objectives/scst.py: one encoding of each image, with gradients, for both
    again    the same objective on the pixels: encoded for sampling, and again for every caption of the pass

The two take turns on the same weights and must reach the same loss.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.harness import RESULTS, timed, write_result
from captioner import Captioner
from collator import CaptionCollator
from models.loading import ready
from objectives.rewards import Rewards
from objectives.scst import SelfCritical

SIDE, PATCH, WORDS = 224, 14, 300
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_model(hidden: int, layers: int):
    """A LLaVA of this width and depth in encoder and decoder, and its processor with made-up words."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3} | {f"word{i}": i for i in range(4, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(vocabulary)[:4])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": hidden // 64}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes),
        text_config=transformers.LlamaConfig(vocab_size=WORDS, pad_token_id=0, **sizes),
        image_token_index=3,
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return ready(transformers.LlavaForConditionalGeneration(config), processor), processor


class EncodesAgain(Captioner):
    """Passes the pixels on: they are encoded for sampling, and again for every caption of the pass with gradients."""

    def encode(self, batch: dict) -> dict:
        inputs = self._on_device(batch)
        inputs.pop("labels", None)
        return inputs

    def training_batch(self, batch: dict, rows: list[list[int]]) -> dict:
        times = len(rows) // len(batch["input_ids"])
        return super().training_batch({n: v.repeat_interleave(times, dim=0) for n, v in batch.items()}, rows)


def main(arguments) -> dict:
    torch.manual_seed(0)
    model, processor = make_model(arguments.hidden, arguments.layers)
    model = model.to(arguments.device).train()
    lengths = {"max_new_tokens": arguments.max_new_tokens, "min_new_tokens": arguments.max_new_tokens, "num_beams": 1}
    ids = [str(i) for i in range(arguments.images)]
    words = np.random.default_rng(1)  # as random as the captions, so that some words match and rewards differ
    spell = lambda: " ".join(f"word{i}" for i in words.integers(4, WORDS, arguments.max_new_tokens))  # noqa: E731
    references = {image_id: [spell() for _ in range(5)] for image_id in ids}
    rewards = Rewards({"cider": 1.0}, references)
    noise = np.random.default_rng(0).integers(0, 256, (arguments.images, SIDE, SIDE, 3), dtype=np.uint8)
    samples = [
        {"image": Image.fromarray(pixels), "image_id": image_id, "captions": references[image_id], "epoch": 0}
        for pixels, image_id in zip(noise, ids, strict=True)
    ]
    sides = {}
    for name, kind in (("once", Captioner), ("again", EncodesAgain)):
        captioner = kind(model, processor, prompt="word5", **lengths)
        collator = CaptionCollator(processor, model.config, prompt="word5", prompts_only=True)
        batch = {k: v.to(arguments.device) if torch.is_tensor(v) else v for k, v in collator(samples).items()}
        sides[name] = (SelfCritical(captioner, rewards, samples=arguments.samples), batch)

    def step(name: str) -> float:
        objective, batch = sides[name]
        torch.manual_seed(1)
        model.zero_grad()
        loss = objective(model, batch)["loss"]
        loss.backward()
        return loss.item()

    losses = {name: step(name) for name in sides}  # also the warm-up
    if abs(losses["once"] - losses["again"]) > 1e-3 * max(1.0, abs(losses["again"])):
        raise SystemExit(f"The two losses differ: {losses}")
    seconds, processor = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in range(arguments.turns):
        for name in sides if turn % 2 == 0 else reversed(sides):
            began = time.process_time()
            seconds[name].append(timed(lambda name=name: step(name), arguments.device)[0])
            processor[name].append(time.process_time() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"encoded once {medians['once']:.3f} s, encoded again {medians['again']:.3f} s per step: ", end="")
    print(f"{medians['again'] / medians['once']:.2f} times faster; losses {losses['once']:.6f} {losses['again']:.6f}")
    return {
        "what": "seconds of an SCST step of a LLaVA with random weights, images encoded once and once per caption",
        "settings": vars(arguments) | {"output": str(arguments.output)},
        "seconds": seconds,
        "processor_seconds": processor,  # the fairer ones on a shared machine
        "median": medians,
        "losses": losses,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "family_scst_step.json")
    arguments = parser.parse_args()
    write_result(arguments.output, main(arguments))
    sys.exit(0)
