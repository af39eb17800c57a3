"""Encoding each image once for all its captions.

BLIP has this, and more, in models/blip_attention.py. Families with their own row get it here, in the vision encoder's
class (Family.vision_takes_encoded). Chat families have it in the library: `get_image_features` encodes images, and the
model takes the result as `mm_encoder_outputs` (transformers >= 5.23). That it gives the same is checked once per model.
"""

import dataclasses
import functools
import inspect
import logging
import weakref

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from common.errors import UserError
from common.sharding import gathered
from models.blip_attention import VisionModel, check_nothing_asked
from models.families import ENCODED, base_model, family_of, takes, vision_encoder
from models.onnx_model import OnnxModel

logger = logging.getLogger(__name__)

# Arguments of vision encoders that do not apply to encoded images, or that say what to return.
KNOWN = {
    "interpolate_pos_encoding", "bool_masked_pos", "attention_mask", "output_attentions", "output_hidden_states",
    "return_dict", "kwargs",
}  # fmt: skip


FEATURES, LAYERS = "image_features", "deepstack_features"  # in a batch: of its images, one after the other


@dataclasses.dataclass
class Features(ModelOutput):
    """What chat models read of the result of `get_image_features`, for features that were kept."""

    pooler_output: torch.Tensor | tuple | None = None
    deepstack_features: list | None = None


class TakesEncoded:
    """A vision encoder that passes encoded images through, (images, 1, ...): its earlier output, a channel inserted."""


@functools.cache
def _taking_encoded(kind: type) -> type:
    """The class of a vision encoder that also takes encoded images."""
    first = next(name for name in inspect.signature(kind.forward).parameters if name != "self")

    @functools.wraps(kind.forward)  # generate() reads the names of its parameters
    def forward(self, *args, **kwargs):
        pixels, *others = args or [kwargs.pop(first)]
        if pixels.dim() < 4 or pixels.shape[1] > 1:  # of 3: rows of patches
            return kind.forward(self, pixels, *others, **kwargs)
        # Kosmos-2's generate hands its own settings on: as little as the library's encoder looks at others than these.
        # A mask of patches has done its part.
        check_nothing_asked({name: value for name, value in kwargs.items() if name in KNOWN - {"attention_mask"}})
        return BaseModelOutputWithPooling(last_hidden_state=pixels[:, 0])

    return type(kind.__name__, (TakesEncoded, kind), {"forward": forward})


def take_encoded_images(model):
    """Lets the model take (images, 1, ...) encoded images as `pixel_values`, if its family can.

    A vision encoder with other arguments than those checked stays the library's, with a warning."""
    if not family_of(model.config).vision_takes_encoded or takes_encoded(vision := vision_encoder(model)):
        return model
    first, *others = list(inspect.signature(type(vision).forward).parameters)[1:]
    if first not in ("pixel_values", "hidden_states", "flattened_patches") or not KNOWN.issuperset(others):
        logger.warning(
            "Each image is encoded once per caption, since with transformers %s %s.forward takes (%s), which is new. "
            "Captions and losses are the same, but training on several captions per image takes longer.",
            transformers.__version__,
            type(vision).__name__,
            ", ".join([first, *others]),
        )
    elif getattr(vision.config, "num_channels", 3) > 1:  # an image with one channel looks like an encoded one
        vision.__class__ = _taking_encoded(type(vision))
    return model


def takes_encoded(vision) -> bool:
    """Whether a model with this vision encoder takes encoded images in place of pixels."""
    return isinstance(vision, TakesEncoded | VisionModel)


def encode_images(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encoded images, as the model takes them in place of `pixel_values` (images, 3, height, width).

    (images, patches + 1, hidden) for BLIP, (images, 1, ...) for others. Gradients flow if they are enabled. `model` is
    the captioner or its vision encoder.
    """
    vision = model if takes_encoded(model) else vision_encoder(model)
    encoded = vision(pixel_values).last_hidden_state
    return encoded[:, None] if isinstance(vision, TakesEncoded) else encoded


def encodes_once(model) -> bool:
    """Whether a model takes encoded images in place of pixels."""
    model = base_model(model)
    if isinstance(model, OnnxModel):
        return False
    if takes_encoded(vision_encoder(model)):
        return True
    return hasattr(model.base_model, "get_image_features") and takes(model, ENCODED)


_EQUAL = weakref.WeakKeyDictionary()  # model: {comparison: whether a faster way gave the library's numbers}


@torch.no_grad()
def equal_once(model, comparison: str, compare, otherwise: str) -> bool:
    """The answer of `compare(model)`, asked once per model, without dropout and with all weights of a sharded model. If it is
    no, or fails, `otherwise` is what the log says."""
    base = base_model(model)
    answers = _EQUAL.setdefault(base, {})
    if comparison not in answers:
        was_training, reason = base.training, ""
        base.eval()
        try:
            with gathered(model):
                answers[comparison] = compare(base)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            answers[comparison], reason = False, f" ({error})"
        finally:
            base.train(was_training)
        if not answers[comparison]:
            logger.warning("%s%s%s", type(base).__name__, otherwise, reason)
    return answers[comparison]


def encode_once(model, inputs: dict, times: int = 1) -> dict:
    """`inputs` of I images and I * `times` rows of text, with the images encoded if the family can; else unchanged.

    Gradients flow if they are enabled. The first images that a chat model encodes here are also passed as pixels: if that
    gives other logits, this model's images are not encoded here, and a warning says so.
    """
    base = base_model(model)
    pixels = family_of(base.config).pixels
    if pixels not in inputs or not encodes_once(base):
        return inputs
    if takes_encoded(vision_encoder(base)):
        return inputs | {pixels: encode_images(base, inputs[pixels])}
    rows = family_of(base.config).text_inputs
    first = {name: value[::times] if name in rows else value for name, value in inputs.items()}
    return _encode_for_chat(base, inputs) if takes_library_features(model, first) else inputs


def takes_library_features(model, inputs: dict) -> bool:
    """Whether a chat model gives the same logits for what `get_image_features` makes of these images. Looked at once."""
    otherwise = (
        " gives other logits for encoded images than for pixels with this release of transformers: images are encoded again "
        "for every caption, which costs time."
    )
    return equal_once(model, "images", lambda base: _agrees(base, inputs), otherwise)


def image_features(model, inputs: dict) -> dict[str, torch.Tensor]:
    """The inputs of a chat model for one image and its prompt, without pixels, as tensors that can be kept.

    FEATURES are (tokens, hidden), or (tiles, tokens, hidden) if the model takes them so; LAYERS are those that Qwen3-VL adds
    behind its first layers, (layers, tokens, hidden)."""
    encoded = _encode_for_chat(model, inputs)
    features = encoded.pop(ENCODED)["image"]
    encoded[FEATURES] = _joined(features.pooler_output)
    if features.get("deepstack_features") is not None:
        encoded[LAYERS] = torch.stack([_joined(layer) for layer in features.deepstack_features])
    return encoded


def _image_tokens(model, inputs: dict, times: int) -> list[int]:
    """How many of the tokens of each image's text, one of `times` rows, stand for the image."""
    return (inputs["input_ids"][::times] == model.config.image_token_id).sum(dim=1).tolist()


def _joined(features) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))


def with_image_features(model, inputs: dict, times: int = 1) -> dict:
    """`inputs` that hold image_features of I images, joined, as the model takes them; others unchanged. Their text has I *
    `times` rows."""
    if FEATURES not in inputs:
        return inputs
    inputs = dict(inputs)
    features, layers = inputs.pop(FEATURES), inputs.pop(LAYERS, ())
    counts = _image_tokens(base_model(model), inputs, times)
    kept = Features(features if features.dim() == 3 else features.split(counts))
    if len(layers):
        kept["deepstack_features"] = [layer.split(counts) for layer in layers]
    return inputs | {ENCODED: {"image": kept}}


def _encode_for_chat(model, inputs: dict) -> dict:
    encoder = model.base_model.get_image_features
    taken = {name: inputs[name] for name in inspect.signature(encoder).parameters if name in inputs}
    features = encoder(**taken, return_dict=True)
    kept = {name: features[name] for name in ("pooler_output", "deepstack_features") if features.get(name) is not None}
    others = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    return {**others, ENCODED: {"image": type(features)(**kept)}}


def _agrees(model, inputs: dict) -> bool:
    """Whether two copies of each row of text have the same last logits as that row with the image's pixels."""
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name != "labels"}
    rows = family_of(model.config).text_inputs
    expected = model(**inputs).logits[:, -1].float()
    encoded = _encode_for_chat(model, inputs)
    twice = {n: v.repeat_interleave(2, dim=0) if n in rows else v for n, v in encoded.items()}
    logits = model(**repeat_images(model, twice, 2)).logits[:, -1].float()
    return equal_logits(model, logits.view(-1, 2, logits.shape[-1]), expected[:, None])


def equal_logits(model, ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are those expected, as far as the precision that the model computes in can tell."""
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(expected.device.type)
    return bool((ours - expected).abs().max() <= (1e-3 if exact else 0.1) * expected.std())


def repeat_images(model, inputs: dict, times: int) -> dict:
    """`inputs` whose text has `times` rows for each image, with every image repeated for its rows.

    ValueError if it is unknown which rows of an input belong to which image.
    """
    model = base_model(model)
    rows, images = family_of(model.config).text_inputs, len(inputs["input_ids"]) // times
    check_repeatable(model, inputs, images)
    repeated = {
        name: value.repeat_interleave(times, dim=0) if isinstance(value, torch.Tensor) and name not in rows else value
        for name, value in inputs.items()
    }
    if ENCODED in inputs:
        counts = _image_tokens(model, inputs, times)
        encoded = inputs[ENCODED]["image"]
        features = {"pooler_output": _repeat(encoded.pooler_output, counts, times)}
        if encoded.get("deepstack_features") is not None:
            features["deepstack_features"] = [_repeat(layer, counts, times) for layer in encoded.deepstack_features]
        repeated[ENCODED] = {"image": type(encoded)(**features)}
    return repeated


def _repeat(features, counts: list[int], times: int):
    """The features of images' tiles, those of each image `times` times. counts: (images,) placeholders in the text."""
    tiles, repeated = iter(features), []
    for count in counts:
        group = []
        while sum(map(len, group)) < count:
            group.append(next(tiles, torch.empty(count + 1)))
        if sum(map(len, group)) != count:
            raise ValueError("the features of an image are not as many as its placeholders")
        repeated += group * times
    return torch.stack(repeated) if isinstance(features, torch.Tensor) else repeated


def check_repeatable(model, inputs: dict, images: int) -> None:
    """ValueError if several captions per image would mix up the images: if pixels are rows of patches or tiles, several
    per image, and the library repeats rows before it encodes them."""
    model = base_model(model)
    if ENCODED not in inputs and encodes_once(model):
        return  # generate encodes them itself
    rows = family_of(model.config).text_inputs
    for name, value in inputs.items():
        # An image has at least one row, so as many rows as images means one each.
        if isinstance(value, torch.Tensor) and name not in rows and len(value) != images:
            raise UserError(
                f"{type(model).__name__} has {len(value)} rows of {name} for {images} images, and they cannot be repeated "
                "for several captions per image with this release of transformers: 5.23 or newer is needed, or num_beams "
                "1 and captions_per_image 1."
            )


def has_gradients(inputs: dict) -> bool:
    """Whether the images among model inputs were encoded by an encoder that is trained."""
    features = inputs[ENCODED]["image"].pooler_output if ENCODED in inputs else inputs.values()
    return any(getattr(tensor, "requires_grad", False) for tensor in features)
