"""Where BLIP looks as it writes each word of a caption: cross-attention over the image's patches.

What a map shows is where information was fetched from, and not why a word was chosen: benchmarks/quality/attention.py measures
on drawn scenes how far the two agree.
"""

import contextlib
import inspect
import math
import threading

import numpy as np
import torch
from PIL import Image
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from common.errors import UserError
from models.blip_attention import target_positions
from models.families import base_model
from models.onnx_model import OnnxModel


def attention_maps(captioner, image, caption: str) -> tuple[list[str], np.ndarray]:
    """The words of `caption` and, for each, how its attention is distributed over the image.

    Args:
        captioner: models.Captioner of a BLIP.
        image: anything that data.open_image takes.
        caption: of this image, as the captioner gave it or any other text.

    Returns:
        (words, maps). The words are those between white space that the tokenizer knows pieces of. Maps are float32
        (words, rows, columns) over the vision encoder's patches, row 0 at the image's top: the mean over the heads of
        the second half of the decoder's layers (the first half hardly distinguishes objects), at the position
        that predicts the word, averaged over its word pieces, of which punctuation counts only where there is nothing
        else. Each sums to 1; the class token, which has no position, is left out.

    Raises:
        ValueError: the model is not a BLIP, or the caption has no word.
    """
    tokenizer = captioner.processor.tokenizer
    if captioner.keep_prompt:
        caption = caption.removeprefix(captioner.collator.words)
    words = caption.split()
    text = " ".join(words)
    # After a prompt a caption's first word may be other tokens than alone: it is tokenized in its place.
    before = f"{captioner.collator.words} " if captioner.collator.words else ""
    encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(begin - len(before), end - len(before)) for begin, end in encoded["offset_mapping"]]
    pieces = [(token, span) for token, span in zip(encoded["input_ids"], spans, strict=True) if span[0] >= 0]
    if not pieces:
        raise UserError("An empty caption has no words to show attention for.")
    batch = captioner.collator([{"image": image, "image_id": ""}])
    batch = captioner.training_batch(batch, [[token for token, _ in pieces]])
    attention = cross_attention(captioner.model, batch)
    attention = attention[len(attention) // 2 :, :, 0, target_positions(batch["labels"])[0], 1:].float()
    attention = (attention / attention.sum(-1, keepdim=True)).mean((0, 1)).cpu().numpy()
    of_word: dict[int, list[tuple[bool, int]]] = {}  # (whether more than punctuation, number) of a word's pieces
    for piece, (_, (begin, end)) in enumerate(pieces):
        of_word.setdefault(text.count(" ", 0, begin), []).append((any(map(str.isalnum, text[begin:end])), piece))
    chosen = [[piece for spelt, piece in spellings if spelt == max(spellings)[0]] for spellings in of_word.values()]
    maps = np.stack([attention[numbers].mean(0) for numbers in chosen])
    rows, columns = (
        side // captioner.model.config.vision_config.patch_size for side in batch["pixel_values"].shape[2:]
    )
    return [words[number] for number in of_word], maps.reshape(-1, rows, columns)


def has_maps(captioner) -> bool:
    """Whether attention can be shown: of a BLIP that runs in torch, not on a server or as ONNX graphs."""
    model = captioner.model
    return not (model is None or isinstance(model, OnnxModel)) and base_model(model).config.model_type == "blip"


def maps_of_worst(captioner, rows: list[dict], images, number: int) -> dict[str, tuple[list[str], np.ndarray]]:
    """{image id: what attention_maps gives} for the captions with the lowest CIDEr, as report.html shows them first.

    rows, images: of reports.outputs.score_captions. Nothing for models without maps.
    """
    if not has_maps(captioner):
        return {}
    worst = sorted(range(len(rows)), key=lambda index: rows[index]["scores"]["CIDEr"])[:number]
    maps = {}
    for index in worst:
        with contextlib.suppress(ValueError):  # an empty caption
            maps[rows[index]["image_id"]] = attention_maps(captioner, images[index], rows[index]["caption"])
    return maps


@torch.inference_mode()
def cross_attention(model, batch: dict) -> torch.Tensor:
    """(layers, heads, captions, length, patches + 1) cross-attention probabilities of a BLIP decoder that reads `batch`,
    one caption per image, as CaptionCollator or Captioner.training_batch makes it: what `output_attentions=True` gives
    with eager attention. Computed from each layer's own inputs, so that fast attention, which never writes them out,
    stays on."""
    model = base_model(model)
    if model.config.model_type != "blip":
        raise UserError(f"Attention maps show BLIP's cross-attention, and this is a {model.config.model_type}.")
    maps, hooks, thread = [], [], threading.get_ident()

    def keep(attention, args, kwargs, _):
        if threading.get_ident() != thread:
            return  # another pass through the same model
        arguments = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        states, image = arguments["hidden_states"], arguments["encoder_hidden_states"]
        split = (attention.num_attention_heads, attention.attention_head_size)
        query = attention.query(states).unflatten(-1, split).transpose(1, 2)
        key = attention.key(image).unflatten(-1, split).transpose(1, 2)
        maps.append((query @ key.mT / math.sqrt(attention.attention_head_size)).softmax(-1))

    was_training = model.training
    model.eval()
    try:
        for name, module in model.named_modules():
            if isinstance(module, BlipTextSelfAttention) and ".crossattention." in name:
                hooks.append(module.register_forward_hook(keep, with_kwargs=True))
        inputs = {name: batch[name].to(model.device) for name in ("pixel_values", "input_ids", "attention_mask")}
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return torch.stack(maps).transpose(1, 2)


def overlay(image: Image.Image, heat: np.ndarray, strength: float = 0.65) -> Image.Image:
    """An RGB image with a (rows, columns) map laid over it, smoothly: dark where the map is low, its own colours where
    it is highest."""
    heat = Image.fromarray((heat / heat.max()).astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    shade = 1 - strength + strength * np.clip(np.asarray(heat), 0, 1)[..., None]
    return Image.fromarray((np.asarray(image.convert("RGB")) * shade).astype(np.uint8))
