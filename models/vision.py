"""Images that are encoded once for all their captions, in families whose library class encodes them once a caption.

BLIP has this, and more, in models/blip_attention.py.
"""

import inspect
import logging

import torch
import transformers
from transformers import Blip2VisionModel, GitVisionModel, InstructBlipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from models.blip_attention import VisionModel, check_nothing_asked
from models.families import vision_encoder

logger = logging.getLogger(__name__)


class TakesEncoded:
    """A vision encoder that hands back (images, 1, patches, hidden), what it had returned with a channel put in."""

    def forward(self, pixel_values, **kwargs):
        if pixel_values.dim() == 4 and pixel_values.shape[1] == 1:
            check_nothing_asked(kwargs)
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values[:, 0])
        return super().forward(pixel_values, **kwargs)


class Blip2Vision(TakesEncoded, Blip2VisionModel):
    pass


class InstructBlipVision(TakesEncoded, InstructBlipVisionModel):
    pass


class GitVision(TakesEncoded, GitVisionModel):
    pass


KINDS = {Blip2VisionModel: Blip2Vision, InstructBlipVisionModel: InstructBlipVision, GitVisionModel: GitVision}


def take_encoded_images(model):
    """Lets the model take (images, 1, patches, hidden) encoded images as `pixel_values`, where its family can.

    A vision encoder whose arguments are not those looked at stays the library's, with a warning."""
    for module in model.modules():
        if type(module) not in KINDS:
            continue
        found = tuple(inspect.signature(type(module).forward).parameters)
        if found == ("self", "pixel_values", "interpolate_pos_encoding", "kwargs"):
            module.__class__ = KINDS[type(module)]
        else:
            logger.warning(
                "Each image is encoded once per caption, since with transformers %s %s.forward takes (%s), which is new. "
                "Captions and losses are the same, but training on several captions per image takes longer.",
                transformers.__version__,
                type(module).__name__,
                ", ".join(found[1:]),
            )
    return model


def takes_encoded(vision) -> bool:
    """Whether a model with this vision encoder takes encoded images in place of pixels."""
    return isinstance(vision, TakesEncoded | VisionModel)


def encode_images(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encoded images, as the model takes them in place of `pixel_values` (images, 3, height, width).

    (images, patches + 1, hidden) for BLIP, (images, 1, patches + 1, hidden) for BLIP-2, InstructBLIP and GIT. Gradients
    flow if they are enabled. `model` is the captioner or its vision encoder.
    """
    vision = model if takes_encoded(model) else vision_encoder(model)
    encoded = vision(pixel_values=pixel_values).last_hidden_state
    return encoded[:, None] if isinstance(vision, TakesEncoded) else encoded
