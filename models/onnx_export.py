"""A captioner as two ONNX graphs: what an image gives, and the next token of a caption.

- images.onnx: pixel_values (images, 3, height, width) -> keys and values of the image, 2 * layers of (images, heads, patches,
  width). In BLIP and ViT-GPT2 those are cross-attention's; GIT and BLIP-2 have the image before the text, in self-attention.
- decoder.onnx: input_ids (images, captions, tokens), these keys and values, and those of earlier tokens, 2 * layers of
  (images, captions, heads, past, width) -> logits (images, captions, vocabulary) behind the last token, and the keys and
  values of all tokens. An image's are never copied for its captions in BLIP.

All sizes but those of pixels, heads and layers are free, so that one pair serves every batch, beam and prompt; prompts of a
call are equally long, without padding (models.onnx_model). With int8, weights of linear layers are whole numbers with a
scale per output channel, and activations are rounded as they come (ONNX Runtime's dynamic quantisation).
"""

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from common.errors import UserError
from models.decoding_step import CACHE
from models.families import takes
from models.onnx_model import DECODER, FAMILIES, IMAGES, MISSING, OnnxModel

TOKEN = 0  # any: what it gives is left out, or compared
HIDDEN = -1e4  # as in FastTextAttention


def write_graphs(model, folder: Path, int8: bool = False) -> None:
    """Write images.onnx and decoder.onnx of a captioner to `folder`, and compare their logits with the model's.

    UserError if its family cannot be written, if a package is missing, or if the logits are others (float32: by more than
    1e-3 of their spread; int8 is not compared, since it rounds).
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES or getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        raise UserError(
            f"--format onnx writes {', '.join(FAMILIES)} (with OPT), not {model_type}. Servers such as vLLM take chat models as they are."
        )
    try:
        import onnxruntime.quantization as quantization
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: {MISSING}") from None
    model = model.float().eval()
    images, decoder = _Images(model), _Decoder(model)
    size = _image_size(model)
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        states = images(pixels)
    heads, width = states[0].shape[1], states[0].shape[3]
    past = [torch.rand(2, 3, heads, 4, width) for _ in states]
    tokens = torch.full((2, 3, 2), TOKEN)
    sizes = {name: torch.export.Dim(name) for name in ("images", "captions", "tokens", "past")}
    of_image, of_caption = {0: sizes["images"]}, {0: sizes["images"], 1: sizes["captions"]}
    shapes = (
        of_caption | {2: sizes["tokens"]},
        [of_image] * len(states),
        [of_caption | {3: sizes["past"]}] * len(past),
    )
    _export(images, (pixels,), (of_image,), folder / IMAGES)
    _export(decoder, (tokens, [*states], past), shapes, folder / DECODER)
    _check(OnnxModel(model.config, folder), images, decoder, pixels)
    if int8:
        for name in (IMAGES, DECODER):
            whole = folder / f"float32-{name}"
            (folder / name).rename(whole)
            quantization.quantize_dynamic(whole, folder / name, ["MatMul", "Gemm"], per_channel=True)
            whole.unlink()


def _export(module: nn.Module, inputs: tuple, shapes: tuple, path: Path) -> None:
    noise = io.StringIO()  # the exporter prints its steps
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        large = sum(p.numel() for p in module.parameters()) > 2**28  # a file of the format holds 2 GiB at most
        program.save(path, external_data=large)


def _check(exported: OnnxModel, images: nn.Module, decoder: nn.Module, pixels: torch.Tensor) -> None:
    """UserError unless both give the same logits for one image with one caption and for two with three."""
    for number, captions in ((1, 1), (2, 3)):
        tokens = torch.full((number, captions, 1), TOKEN)
        with torch.no_grad():
            states = images(pixels[:number])
            past = [state.new_empty(number, captions, state.shape[1], 0, state.shape[3]) for state in states]
            expected = decoder(tokens, [*states], past)[0]
        logits = exported.next_logits(tokens, exported.read(pixels[:number]), past)[0]
        if (logits - expected).abs().max() > 1e-3 * expected.std():
            raise UserError(
                f"The graphs' logits differ from the model's by {(logits - expected).abs().max():.3g}: {MISSING}"
            )


def _image_size(model) -> int:
    vision = getattr(model.config, "vision_config", None) or model.config.encoder
    return vision.image_size


class _Images(nn.Module):
    """pixel_values -> keys and values in turn, of each layer."""

    def __init__(self, model):
        super().__init__()
        self.model, self.kind = model, model.config.model_type

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, start = self.model, torch.full((pixel_values.shape[0], 1), TOKEN)
        if self.kind == "blip":
            encoded = model.vision_model(pixel_values).last_hidden_state
            layers = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
            states = [linear(encoded) for layer in layers for linear in (layer.key, layer.value)]
            heads, width = layers[0].num_attention_heads, layers[0].attention_head_size
            return tuple(state.unflatten(2, (heads, width)).transpose(1, 2) for state in states)
        if self.kind == "vision-encoder-decoder":
            outputs = model(pixel_values=pixel_values, decoder_input_ids=start, use_cache=True)
        elif self.kind == "git":
            outputs = model(pixel_values=pixel_values, input_ids=start, use_cache=True)
        else:
            places = torch.full((pixel_values.shape[0], model.config.num_query_tokens), model.config.image_token_index)
            ids = torch.cat([places, start], dim=1)
            outputs = model(pixel_values=pixel_values, input_ids=ids, use_cache=True).language_model_outputs
        cache = getattr(outputs, CACHE)
        if isinstance(cache, EncoderDecoderCache):
            return tuple(_states(cache.cross_attention_cache))
        return tuple(state[:, :, :-1] for state in _states(cache))  # without the token


class _Decoder(nn.Module):
    """Tokens of captions, what their images give, and earlier keys and values -> logits, and keys and values."""

    def __init__(self, model):
        super().__init__()
        self.model, self.kind = model, model.config.model_type

    def forward(self, input_ids: torch.LongTensor, images: list, past: list) -> tuple[torch.Tensor, ...]:
        groups, (before, tokens) = input_ids.shape[:2], (past[0].shape[3], input_ids.shape[2])
        positions = before + torch.arange(tokens)
        mask = torch.where(torch.arange(before + tokens) <= positions[:, None], 0.0, HIDDEN)[None, None]
        past_states = [state.flatten(0, 1) for state in past]
        if self.kind == "blip":
            cache = _cache(past_states, images)
            logits = self._blip(input_ids.flatten(0, 1), positions, mask, cache)
        else:
            repeated = [state[:, None].expand(-1, groups[1], -1, -1, -1).flatten(0, 1) for state in images]
            crossed = self.kind == "vision-encoder-decoder"
            if not crossed:  # the image comes before the text
                past_states = [torch.cat(both, dim=2) for both in zip(repeated, past_states, strict=True)]
                mask = nn.functional.pad(mask, (images[0].shape[2], 0))
            cache = _cache(past_states, repeated if crossed else None)
            logits = self._library(input_ids.flatten(0, 1), positions, mask, cache, repeated[0])
        kept = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        states = [state[:, :, -(before + tokens) :] for state in _states(kept)]
        return logits.unflatten(0, groups), *[state.unflatten(0, groups) for state in states]

    def _blip(self, input_ids, positions, mask, cache) -> torch.Tensor:
        decoder = self.model.text_decoder
        hidden = decoder.bert.embeddings(input_ids=input_ids, position_ids=positions[None])
        # Encoded images are not read again, as the cache says, but without any a layer has no cross-attention.
        options = {"attention_mask": mask, "encoder_hidden_states": hidden, "use_cache": True, CACHE: cache}
        return decoder.cls(decoder.bert.encoder(hidden, **options)[0][:, -1])

    def _library(self, input_ids, positions, mask, cache, of_image) -> torch.Tensor:
        decoder = {"vision-encoder-decoder": "decoder", "blip-2": "language_model"}.get(self.kind)
        decoder = getattr(self.model, decoder) if decoder else self.model
        options = {"attention_mask": mask, "use_cache": True, CACHE: cache}
        if self.kind == "vision-encoder-decoder":
            rows, places = input_ids.shape[0], of_image.shape[2]
            options["encoder_hidden_states"] = of_image.new_zeros(rows, places, decoder.config.hidden_size)  # not read
        if takes(decoder, "position_ids"):
            before = of_image.shape[2] if self.kind == "blip-2" else 0  # where the text's positions start
            options["position_ids"] = (positions + before)[None]
        return decoder(input_ids=input_ids, **options).logits[:, -1]


def _cache(own: list, of_images: list | None):
    """The library's cache of these keys and values, in turn."""
    caches = []
    for states in (own, of_images or []):
        caches.append(DynamicCache())
        for layer in range(len(states) // 2):
            caches[-1].update(states[2 * layer], states[2 * layer + 1], layer)
    if of_images is None:
        return caches[0]
    both = EncoderDecoderCache(*caches)
    both.is_updated = dict.fromkeys(range(len(of_images) // 2), True)
    return both


def _states(cache: DynamicCache) -> list[torch.Tensor]:
    return [state for layer in cache.layers for state in (layer.keys, layer.values)]
