"""Chat models: one prompt per image for its captions, beams and samples, compared with the library's way; times and memory.

    python -m benchmarks.speed.chat_prefix                                         # a LLaVA, all sizes
    python -m benchmarks.speed.chat_prefix --families qwen2_5_vl smolvlm --tokens 576 --captions 5   # need torchvision

Random weights, about 250 million of them (Qwen2's or Llama's decoder, 50,000 tokens), one photograph's worth of noise with --tokens image
tokens. The library's way is a row per caption with its own pixels and the model's own loss on `labels`, and `generate`.

    train    a forward and backward pass over --captions captions of 20 tokens; both losses must be equal
    beams    one caption by 5 beams; both must write the same tokens
    scst     8 samples and the pass with gradients over them, both given the same samples

Both sides take turns in one process; peak memory is of one more run of each, weights included. Writes benchmarks/results/chat_prefix.json.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.harness import RESULTS, peak_mib, timed, write_result
from captioner import Captioner
from collator import CaptionCollator
from models.decoding import generate
from models.families import model_inputs
from models.loading import ready
from objectives.cross_entropy import caption_loss

WORDS, LENGTH, SAMPLES, PATCH = 50_000, 20, 8, 14
SIDES = {100: 140, 576: 336, 1225: 490}  # image tokens of LLaVA: the picture's side in pixels
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT |= {"num_key_value_heads": 4, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}


def words(*special: str, **names) -> t.PreTrainedTokenizerFast:
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *special])}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), WORDS)}
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    split.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    names |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=split, **names)


def llava(tokens: int):
    side = SIDES[tokens]
    tokenizer = words("<image>", extra_special_tokens={"image_token": "<image>"})
    vision = t.CLIPVisionConfig(image_size=side, patch_size=PATCH, **SMALL)
    config = t.LlavaConfig(vision_config=vision, text_config=t.Qwen2Config(**TEXT), image_token_index=3)
    images = t.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = t.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image> "),
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor, side


def qwen2_5_vl(tokens: int):
    side = round(tokens**0.5) * 2 * PATCH
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = words(*special)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True))
    vision = {"hidden_size": 384, "out_hidden_size": 768, "intermediate_size": 1536, "depth": 6, "num_heads": 6}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    size = {"shortest_edge": side * side, "longest_edge": side * side}
    images, video = t.Qwen2VLImageProcessor(size=size), t.Qwen2VLVideoProcessor(size=size)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|> ")
    processor = t.Qwen2_5_VLProcessor(images, tokenizer, video, chat_template=template)
    return t.Qwen2_5_VLForConditionalGeneration(config), processor, side


def smolvlm(tokens: int):
    side = round(tokens**0.5) * 2 * 16
    special = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = words(*special)
    vision = {"image_size": side, "patch_size": 16, **SMALL}
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = t.LlamaConfig(**TEXT)
    config = t.SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=image, pad_token_id=0
    )
    edge = {"longest_edge": side}
    images = t.SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    template = TEMPLATE.replace("IMAGE", "<image>")
    video = t.SmolVLMVideoProcessor()
    processor = t.SmolVLMProcessor(images, tokenizer, video, image_seq_len=(side // 32) ** 2, chat_template=template)
    return t.SmolVLMForConditionalGeneration(config), processor, side


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "smolvlm": smolvlm}


class Sides:
    """The two ways of each measure, as functions."""

    def __init__(self, family: str, tokens: int, captions: int):
        torch.manual_seed(0)
        model, processor, side = FAMILIES[family](tokens)
        self.model = ready(model, processor)
        draw = np.random.default_rng(0)
        image = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        spell = lambda: " ".join(f"word{i}" for i in draw.integers(100, WORDS, LENGTH - 1))  # noqa: E731
        group = [spell() for _ in range(captions)]
        lengths = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
        self.captioner = Captioner(self.model, processor, prompt="word50 word51", num_beams=5, **lengths)
        collator = CaptionCollator(processor, self.model.config, prompt="word50 word51")
        sample = {"image": image, "image_id": "0", "epoch": 0}
        self.grouped = collator([sample | {"captions": group}])
        self.single = collator([sample | {"captions": [caption]} for caption in group])
        self.prompt = self.captioner.collator([sample])
        self.tokens = self.grouped["input_ids"].shape[1] - LENGTH
        self.samples = [draw.integers(100, WORDS, LENGTH).tolist() for _ in range(SAMPLES)]

    def library_loss(self, batch: dict) -> float:
        inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        loss = self.model(**inputs).loss
        loss.backward()
        return loss.item()

    def train(self, ours: bool) -> float:
        self.model.train().zero_grad(set_to_none=True)
        if not ours:
            return self.library_loss(self.single)
        loss = caption_loss(self.model, self.grouped)
        loss.backward()
        return loss.item()

    @torch.inference_mode()
    def beams(self, ours: bool) -> list:
        self.model.eval()
        if ours:
            return self.captioner.generate_tokens(self.prompt).tolist()
        inputs = model_inputs(self.model.config, self.captioner._on_device(self.prompt))
        return generate(self.model, **inputs, **self.captioner.search())[:, inputs["input_ids"].shape[1] :].tolist()

    def scst(self, ours: bool) -> float:
        """The loss is the mean over the tokens of fixed captions: drawing them is timed, and they are then replaced."""
        self.model.eval().zero_grad(set_to_none=True)
        sampling = {"do_sample": True, "num_beams": 1, "num_return_sequences": SAMPLES, "top_k": 0}
        if ours:
            encoded = self.captioner.encode(self.prompt)
            self.captioner.generate_tokens(encoded, **sampling)
            loss = caption_loss(self.model, self.captioner.training_batch(encoded, self.samples))
            loss.backward()
            return loss.item()
        inputs = model_inputs(self.model.config, self.captioner._on_device(self.prompt))
        with torch.inference_mode():
            generate(self.model, **inputs, **self.captioner.search(**sampling))
        images = {n: v for n, v in self.prompt.items() if n not in ("image_ids", "errors")}
        several = {n: torch.cat([v] * SAMPLES) if isinstance(v, torch.Tensor) else v for n, v in images.items()}
        return self.library_loss(self.captioner.training_batch(several, self.samples))


def peak_of(function, *arguments) -> float:
    """Peak memory of this process in MiB while `function` runs, weights included."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak until now
    function(*arguments)
    return peak_mib("cpu")


def measured(sides: Sides, name: str, turns: int) -> dict:
    function = getattr(sides, name)
    results = {
        side: function(side == "ours") for side in ("peer", "ours")
    }  # also the warm-up and the comparison of prompts
    if name == "beams":
        assert results["peer"] == results["ours"], results
    else:
        assert abs(results["peer"] - results["ours"]) < 1e-4, results
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    for turn in range(turns):
        for side in ("peer", "ours") if turn % 2 == 0 else ("ours", "peer"):
            seconds[side].append(timed(lambda side=side: function(side == "ours"), "cpu")[0])
    sides.model.zero_grad(set_to_none=True)
    memory = {side: peak_of(function, side == "ours") for side in ("peer", "ours")}
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    times = medians["peer"] / medians["ours"]
    print(f"  {name}: {medians['peer']:.2f} s, {medians['ours']:.2f} s, {times:.2f} times, {memory}", flush=True)
    return {"seconds": seconds, "median": medians, "times": times, "peak_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llava"], choices=[*FAMILIES])
    parser.add_argument("--tokens", nargs="+", type=int, default=[*SIDES])
    parser.add_argument("--captions", nargs="+", type=int, default=[1, 5, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "chat_prefix.json")
    arguments = parser.parse_args()
    rows = []
    for family in arguments.families:
        for tokens in arguments.tokens:
            for number in arguments.captions:
                sides = Sides(family, tokens, number)
                weights = sum(one.numel() for one in sides.model.parameters())
                print(f"{family}, {weights / 1e6:.0f} M, prompt {sides.tokens}, {number} captions", flush=True)
                row = {"family": family, "weights": weights, "prompt": sides.tokens, "captions": number}
                row["train"] = measured(sides, "train", arguments.turns)
                if number == arguments.captions[0]:
                    row["beams"] = measured(sides, "beams", arguments.turns)
                    if tokens == 576:
                        row["scst"] = measured(sides, "scst", arguments.turns)
                rows.append(row)
                write_result(
                    arguments.output, {"settings": vars(arguments) | {"output": str(arguments.output)}, "rows": rows}
                )


if __name__ == "__main__":
    main()
