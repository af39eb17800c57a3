"""Chat models: an image and its prompt are read once for all captions, beams and samples of the image.

A prompt holds hundreds of image tokens, a caption twenty. Training and scoring put `prompt, caption 1, ..., caption K` into one
row: a caption's tokens see the prompt and their own caption, at the positions that they have right behind the prompt.
Decoding reads the prompt once, repeats its keys and values for the beams, and leaves all else to the library's `generate`.

The masks are the library's own for a prompt with one caption, taken apart and put together again, so that sliding windows and
prompts whose tokens see each other in both directions stay as they are. Each of the two is compared with the library's way on
the first batch of a model; where they differ, or the family cannot do it, that model goes the library's way, and a line says so.
"""

import copy
import inspect

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import create_masks_for_generate

from models.decoding import generate
from models.decoding_step import CACHE
from models.families import base_model, family_of, is_encoder_decoder, takes
from models.vision import equal_logits, equal_once, repeat_images

IGNORE = -100
ATTENTION = ("sdpa", "eager")  # the kinds that take any mask
TYPES = ("token_type_ids", "mm_token_type_ids")
AGAIN = " reads its prompt again for each of an image's captions or beams: the same results, in more time."


def may_share(model) -> bool:
    """Whether the prompt of the model's family holds the image's tokens, and its attention takes any mask."""
    config = base_model(model).config
    family, attention = family_of(config), getattr(config.get_text_config(), "_attn_implementation", None)
    joint = family.prompt is None and not is_encoder_decoder(config)
    return joint and attention in ATTENTION and takes(model, "logits_to_keep")


def shares_prompt(model, inputs: dict, times: int, prompt: int) -> bool:
    """Whether shared_logits can take the place of a row per caption. `inputs` and `prompt` as there."""

    def compared(base) -> bool:
        if isinstance(next(base.parameters()), FakeTensor):  # a plan of memory: there are no numbers to compare
            return True
        rows = family_of(base.config).text_inputs
        both = [0, times - 1]  # an image's first caption and its last
        two = {n: v.unflatten(0, (-1, times))[:, both].flatten(0, 1) if n in rows else v for n, v in inputs.items()}
        labels = two["input_ids"].masked_fill(two["attention_mask"] == 0, IGNORE)
        labels[:, :prompt] = IGNORE
        ours = shared_logits(base, two, 2, prompt, labels)
        kept = labels.shape[1] - prompt + 1
        theirs = base(**repeat_images(base, two, 2), use_cache=False, logits_to_keep=kept).logits[:, :-1]
        return equal_logits(base, ours.float(), theirs[labels[:, prompt:] != IGNORE].float())

    return may_share(model) and equal_once(model, "captions", compared, AGAIN)


def shared_logits(model, inputs: dict, times: int, prompt: int, labels: torch.Tensor) -> torch.Tensor:
    """(N, vocabulary) logits that predict the N labels that are not -100, in row order.

    inputs: of (images * times, prompt + L) rows along the text, and of the images once. prompt: its number of tokens.
    labels: (images * times, prompt + L), none of them in the prompt.
    """
    base = base_model(model)
    rows = family_of(base.config).text_inputs
    packed = {name: _packed(v, times, prompt) if name in rows else v for name, v in inputs.items()}
    packed["attention_mask"] = _masks(base, inputs, times, prompt)
    packed["position_ids"] = _positions(base, inputs, times, prompt)
    length = labels.shape[1] - prompt
    # Behind the prompt's last token, which predicts the first of every caption, and behind all that follow.
    logits = model(**packed, use_cache=False, logits_to_keep=times * length + 1).logits
    row, column = (labels[:, prompt:] != IGNORE).nonzero(as_tuple=True)
    return logits[row // times, torch.where(column == 0, 0, row % times * length + column)]


def _packed(value: torch.Tensor, times: int, prompt: int) -> torch.Tensor:
    """(images * times, prompt + L, ...) -> (images, prompt + times * L, ...)."""
    captions = value[:, prompt:].unflatten(0, (-1, times)).flatten(1, 2)
    return torch.cat([value[::times, :prompt], captions], dim=1)


def _masks(base, inputs: dict, times: int, prompt: int):
    """The additive 4-dimensional mask of the packed rows; or one for each type of layer, where types differ."""
    types = {name: inputs[name][::times] for name in TYPES if name in inputs}
    attended = inputs["attention_mask"][::times].clone()
    attended[:, prompt:] = 1  # what is behind a caption's end is seen by none of its tokens
    device = attended.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else base.dtype
    config = copy.deepcopy(base.config)
    config._attn_implementation = "eager"  # its masks are whole: others leave out what a kernel knows
    like = torch.empty(*attended.shape, 0, dtype=dtype, device=device)
    library = getattr(base, "create_masks_for_generate", create_masks_for_generate)
    masks = library(config, like, attended, None, None, is_first_iteration=True, **types)
    if isinstance(masks, dict):
        return {layers: _packed_mask(mask, times, prompt) for layers, mask in masks.items()}
    return _packed_mask(masks, times, prompt)


def _packed_mask(mask: torch.Tensor, times: int, prompt: int) -> torch.Tensor:
    """(images, 1, prompt + L, prompt + L) -> (images, 1, prompt + times * L, prompt + times * L)."""
    length = mask.shape[-1] - prompt
    size = prompt + times * length
    packed = mask.new_full((len(mask), 1, size, size), torch.finfo(mask.dtype).min)
    packed[:, :, :prompt, :prompt] = mask[:, :, :prompt, :prompt]
    packed[:, :, prompt:, :prompt] = mask[:, :, prompt:, :prompt].repeat(1, 1, times, 1)
    for start in range(prompt, size, length):
        packed[:, :, start : start + length, start : start + length] = mask[:, :, prompt:, prompt:]
    return packed


def _positions(base, inputs: dict, times: int, prompt: int) -> torch.Tensor:
    """Positions of the packed rows, (images, S): each caption counts on from the prompt. (3, images, S) where they are those
    of height, width and time (Qwen-VL)."""
    ids = inputs["input_ids"][::times]
    steps = torch.arange(ids.shape[1] - prompt, device=ids.device).repeat(times)
    if not hasattr(base.base_model, "get_rope_index"):
        return torch.cat([torch.arange(prompt, device=ids.device), prompt + steps]).repeat(len(ids), 1)
    rows, taken = family_of(base.config).text_inputs, inspect.signature(base.base_model.get_rope_index).parameters
    prompts = {n: v[::times, :prompt] if n in rows else v for n, v in inputs.items() if n in taken}
    before, _ = base.base_model.get_rope_index(**prompts)
    after = before.amax(dim=(0, 2))[:, None] + 1 + steps
    return torch.cat([before, after.expand(3, -1, -1)], dim=2)


def read_prompts(model, inputs: dict, beams: int = 0) -> dict:
    """Inputs of `generate` for `beams` beams or samples per image, with the prompt's keys and values in place of images; or
    `inputs`, those of the images and their prompts, if nothing is gained or the model cannot. With `beams` 0 they are kept
    for several calls, each of which takes such inputs, too."""

    def compared(base) -> bool:
        short = {"num_beams": 2, "do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}
        short |= {"return_dict_in_generate": True, "output_logits": True}
        theirs = generate(base, **inputs, **short).logits
        ours = generate(base, **_repeated(_read(base, inputs), 2), **short).logits
        return equal_logits(base, torch.stack(ours).float(), torch.stack(theirs).float())

    if CACHE in inputs:
        return _repeated(inputs, beams)
    if beams != 1 and may_share(model) and equal_once(model, "beams", compared, AGAIN):
        read = _read(base_model(model), inputs)
        return _repeated(read, beams) if beams else read
    return inputs


def _read(base, inputs: dict) -> dict:
    prompts = inputs
    if not hasattr(base.base_model, "get_rope_index"):  # else the model counts positions itself
        counted = inputs["attention_mask"].cumsum(dim=1) - 1  # as `generate` does, which leaves padding out
        prompts = inputs | {"position_ids": counted.clamp(min=0)}
    prompts = base.prepare_inputs_for_generation(**prompts, is_first_iteration=True, use_cache=True)
    cache = getattr(base(**prompts | {"use_cache": True, "logits_to_keep": 1}), CACHE)
    cache.crop(-1)  # `generate` reads the last token of the prompt again, for the logits behind it
    return inputs | {CACHE: cache}


def _repeated(read: dict, beams: int) -> dict:
    cache = copy.deepcopy(read[CACHE])
    cache.batch_repeat_interleave(beams)
    return {name: read[name] for name in ("input_ids", "attention_mask")} | {CACHE: cache}
