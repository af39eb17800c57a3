"""Fast attention for transformers' BLIP captioner, on the library's own modules and weights.

transformers' BLIP has eager attention only: it writes the whole (heads, queries, keys) matrix to memory in every
layer, encodes an image once for each of its captions, and beam search copies an image's cross-attention keys and
values for every beam and reorders the copies at every step. `use_fast_attention(model)` gives the same numbers with

- `scaled_dot_product_attention` in the vision encoder and in the text decoder (self- and cross-attention),
- one image encoding, and one set of cross-attention keys and values, for all captions, beams or samples of an image,
- `pixel_values` that may already be encoded images, so that frozen features can be kept and used again.

It changes the class of existing modules and adds no module, parameter, buffer or hook, so state dict, LoRA targets,
DDP, gradient checkpointing, torch.compile, deepcopy and pickle work as before.
Attention maps are never written out: `output_attentions=True` needs `use_fast_attention(model, False)`.

The overrides are correct for the releases that they were tested with (requirements.txt). So `use_fast_attention` checks
the signatures that it overrides, compares the model's logits for a few tokens with those of the library's own classes,
and keeps the library's attention, with a warning, if anything differs.
"""

import contextlib
import copy
import functools
import inspect
import logging

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipForConditionalGeneration, BlipVisionModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextSelfAttention

from models.decoding import SharedBeams

logger = logging.getLogger(__name__)


def use_fast_attention(model: BlipForConditionalGeneration, enabled: bool = True) -> BlipForConditionalGeneration:
    """Switches `model` to fast attention, in place, or with `enabled=False` back to the library's eager attention.

    Either way the model then takes

    - grouped captions: `model(pixel_values=(images, 3, height, width), input_ids=(images * captions, length), ...)`,
      where rows `i * captions` to `(i + 1) * captions - 1` are the captions of image `i`. With eager attention the image
      embeddings are repeated instead of shared;
    - `logits_to_keep`, a boolean (rows, length) tensor: logits are returned only for positions that are True, as
      (positions, vocabulary) in row order. Those of padding and prompt are never used, and a row of logits is 40 times
      as wide as BLIP-base's hidden states. `target_positions(labels)` makes it from labels;
    - encoded images, (images, patches + 1, hidden) as the vision encoder returned them, in place of `pixel_values`.

    Same weights, same state dict; float32 results equal eager ones to 1e-5, bfloat16 ones to its rounding.
    Dropout is applied to the same probabilities at the same rate, but with other random numbers.

    Fast attention is checked before it is used: see `why_not_fast` and `difference_from_library`. If it would not give
    the library's numbers, the library's attention is kept and one warning says why. RuntimeError if even then grouped
    captions or chosen logits differ: the scripts cannot be used with this release of transformers.
    """
    release = f"transformers {transformers.__version__}"
    if enabled:
        reason = why_not_fast(model)
        if reason is None:
            put_classes(FAST, model)
            reason = difference_from_library(model)
        if reason is None:
            return model
        logger.warning(
            "Fast attention is off, since with %s %s. Captions and losses are correct, with the library's attention, "
            "but captioning and training take several times as long. Releases that fast attention was tested with are "
            "in requirements.txt.",
            release,
            reason,
        )
    put_classes(EAGER, model)
    if reason := difference_from_library(model):
        raise RuntimeError(f"BLIP cannot be used with {release}: {reason}. requirements.txt has the releases that can.")
    return model


def why_not_fast(model) -> str | None:
    """Why the classes in `model` are not the ones that fast attention was written for; None if they are."""
    for module in model.modules():
        ours = next((fast for fast in FAST if isinstance(module, fast)), None)
        if ours is None or type(module) in PLAIN:
            continue
        if type(module) is not ours:
            return f"{type(module).__name__} is used in place of {ours.__name__}"
        parameters = tuple(inspect.signature(ours.forward).parameters)
        if parameters not in SIGNATURES[ours]:
            return f"{ours.__name__}.forward takes ({', '.join(parameters[1:])}), which is new"
    return None


def difference_from_library(model) -> str | None:
    """Where the BLIPs in `model` differ from the library's classes; None if nowhere.

    Three beams of two small random images are decoded with a cache from encoded images, then read again as grouped
    captions; both times the logits must be those of the library, without a cache and with an image per caption. First
    in a small float32 model of the same classes, then in the model itself with only the first and last layer of encoder
    and decoder (`_two_layers`): all 24 of BLIP-base take five times as long and are of the same classes. There, in half
    precision, on a GPU or with quantised weights, only large differences can be distinguished from rounding; weights on
    the meta device have no numbers at all. Random state, training mode and weights are left unchanged.
    """
    for blip in model.modules():
        if not isinstance(blip, BlipForConditionalGeneration):
            continue
        weights = list(blip.parameters())
        here = not any(weight.is_meta or weight.numel() == 0 for weight in weights)  # DeepSpeed's shards are empty
        exact = torch.get_float32_matmul_precision() == "highest" and not getattr(blip, "is_quantized", False)
        exact = exact and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
        try:
            with torch.device("cpu"):  # whatever the default device is while a model is loaded
                reason = _compare(_small(blip), 1e-3, length=8)
                if reason is None and here:
                    with _two_layers(blip):
                        reason = _compare(blip, 1e-3 if exact else 0.1, length=3)
            if reason is not None:
                return reason
        except Exception as error:  # whatever it is, it is the reason
            return f"decoding fails ({type(error).__name__}: {error})"
    return None


@torch.no_grad()
def _compare(blip: BlipForConditionalGeneration, tolerance: float, length: int) -> str | None:
    beams = 3
    training = {module: module.training for module in blip.modules()}
    side = 2 * blip.config.vision_config.patch_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(blip.device, blip.dtype)
    blip.eval()
    try:
        with torch.autocast(blip.device.type, enabled=False):
            encoded = blip.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
            lengths = {"max_new_tokens": length, "min_new_tokens": length}
            output = blip.generate(
                pixel_values=encoded, num_beams=beams, num_return_sequences=beams, do_sample=False, use_cache=True,
                output_logits=True, return_dict_in_generate=True, **lengths,
            )  # fmt: skip
            steps = [logits[rows] for logits, rows in zip(output.logits, output.beam_indices.T, strict=True)]
            captions = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
            captions["attention_mask"][::2, -1] = 0  # padding after some of them
            chosen = captions["attention_mask"].bool()
            grouped = blip(pixel_values=encoded, logits_to_keep=chosen, **captions).logits
            with _library(blip):
                images = blip.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
                images = images.repeat_interleave(beams, dim=0)
                expected = blip.text_decoder(encoder_hidden_states=images, use_cache=False, **captions).logits
    finally:
        for module, mode in training.items():
            module.training = mode
    for name, ours, theirs in (
        ("decoding with a cache and beams", torch.stack(steps, dim=1).flatten(0, 1), expected[:, :-1].flatten(0, 1)),
        ("reading grouped captions", grouped, expected[chosen]),
    ):
        ours, theirs = ours.float(), theirs.float()
        finite = theirs.isfinite()
        theirs = torch.where(finite, theirs, 0.0)
        error = torch.where(finite, ours - theirs, 0.0).square().mean(dim=1).sqrt().max()
        spread = theirs.std().clamp(min=1e-6)
        if not error <= tolerance * spread:
            return f"{name} gives logits {error / spread:.2g} standard deviations away from the library's"
    return None


@contextlib.contextmanager
def _two_layers(blip: BlipForConditionalGeneration):
    """Temporarily reduces `blip` to the first and last layer of its encoder and of its decoder."""
    places = [(blip.vision_model.encoder, "layers"), (blip.text_decoder.bert.encoder, "layer")]
    whole = [getattr(part, name) for part, name in places]
    try:
        for (part, name), layers in zip(places, whole, strict=True):
            setattr(part, name, torch.nn.ModuleList([layers[i] for i in sorted({0, len(layers) - 1})]))
        yield
    finally:
        for (part, name), layers in zip(places, whole, strict=True):
            setattr(part, name, layers)


def _small(blip: BlipForConditionalGeneration) -> BlipForConditionalGeneration:
    """A float32 BLIP of the same classes, 2 layers deep and 32 wide, with random weights."""
    config = copy.deepcopy(blip.config)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for part in (config.text_config, config.vision_config):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.encoder_hidden_size, config.text_config.max_position_embeddings = 32, 16
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        small = BlipForConditionalGeneration(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in small.parameters():
            if weight.dim() > 1:  # large ones, so that an error shows; norms and biases as they are
                weight.normal_(std=0.2, generator=generator)
    kinds = {type(module) for module in blip.modules()}
    put_classes({PLAIN[plain]: plain for plain in kinds if plain in PLAIN}, small)
    return small


def put_classes(classes: dict[type, type], model) -> None:
    for module in model.modules():
        plain = PLAIN.get(type(module), type(module))
        module.__class__ = classes.get(plain, plain)


@contextlib.contextmanager
def _library(model):
    """Temporarily restores the library's own classes in `model`."""
    classes = {module: type(module) for module in model.modules()}
    try:
        put_classes({}, model)
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


def target_positions(labels: torch.LongTensor) -> torch.BoolTensor:
    """The (rows, length) positions whose logits predict a target: those before a label that is not -100.

    A training objective computes its loss from them, through `model.forward` as DDP needs it:

        logits = model(pixel_values=..., input_ids=..., attention_mask=..., logits_to_keep=target_positions(labels)).logits
        targets = labels[:, 1:][labels[:, 1:] != -100]    # (positions,), as logits is (positions, vocabulary)
        loss = cross_entropy(logits, targets, label_smoothing=..., reduction="sum") / num_items_in_batch
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    return positions


class FastVisionAttention(BlipAttention):
    """BLIP's vision self-attention without the attention matrix in memory."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if kwargs:  # something that the library may handle
            return super().forward(hidden_states, **kwargs)
        images, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(images, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        context = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(context.transpose(1, 2).reshape(images, tokens, self.embed_dim)), None


class FastTextAttention(BlipTextSelfAttention):
    """BLIP's text self- and cross-attention without the attention matrix in memory.

    In cross-attention the (rows, length) queries of an image's captions or beams are laid out as one long query of
    that image, (images, rows / images * length): no key or value is ever copied for them.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache=None,
        past_key_values=None,  # what transformers called the cache before 5.24
    ) -> tuple[torch.Tensor, None]:
        is_cross_attention = encoder_hidden_states is not None
        # As in the library, whose callers never pass encoder_attention_mask: no image has padding.
        mask = encoder_attention_mask if is_cross_attention else attention_mask

        both = past_key_values if cache is None else cache
        part = both
        if isinstance(both, EncoderDecoderCache):
            part = both.cross_attention_cache if is_cross_attention else both.self_attention_cache
        if is_cross_attention and both is not None and both.is_updated.get(self.layer_idx):
            key, value = part.layers[self.layer_idx].keys, part.layers[self.layer_idx].values
        else:
            states = encoder_hidden_states if is_cross_attention else hidden_states
            key = self._split_heads(self.key(states), batch=states.shape[0])
            value = self._split_heads(self.value(states), batch=states.shape[0])
            if both is not None:
                key, value = part.update(key, value, self.layer_idx)
                if is_cross_attention:
                    both.is_updated[self.layer_idx] = True

        query = self._split_heads(self.query(hidden_states), batch=key.shape[0])
        if mask is not None:
            # A padding token before the caption has no key to attend to. With the dtype's lowest number in its whole
            # row, half precision gives NaN and the kernels' backward pass a wrong gradient; exp(-1e4) is 0 as well.
            mask = mask.clamp(min=-1e4).to(query.dtype)
        dropout = self.dropout.p if self.training else 0.0
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).reshape(*hidden_states.shape[:-1], self.all_head_size), None

    def _split_heads(self, states: torch.Tensor, batch: int) -> torch.Tensor:
        return states.view(batch, -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)


def check_nothing_asked(arguments: dict) -> None:
    """TypeError if a vision encoder gets arguments that do not apply to already encoded images."""
    done = ("interpolate_pos_encoding", "return_dict")
    asked = [name for name, value in arguments.items() if name not in done and value not in (None, False)]
    if asked:
        raise TypeError(f"Images that are already encoded cannot be given {', '.join(asked)}.")


def check_no_maps_asked(asked: bool) -> None:
    if asked:
        raise ValueError("Fast attention keeps no attention maps: call use_fast_attention(model, False) first.")


class VisionModel(BlipVisionModel):
    """BLIP's vision encoder, which returns already encoded images unchanged."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if pixel_values.dim() == 3 and pixel_values.shape[-1] == self.config.hidden_size:
            check_nothing_asked(kwargs)
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values)
        if isinstance(self.encoder.layers[0].self_attn, FastVisionAttention):
            check_no_maps_asked(kwargs.get("output_attentions"))
        return super().forward(pixel_values=pixel_values, **kwargs)


class TextDecoder(BlipTextLMHeadModel):
    """BLIP's text decoder with logits at chosen positions, and images repeated for their captions."""

    # generate() reads the names of the parameters, so they stay the library's.
    @functools.wraps(BlipTextLMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        if encoder_hidden_states is not None and input_ids is not None:
            images, rows = len(encoder_hidden_states), len(input_ids)
            if rows % images:
                raise ValueError(f"{rows} captions for {images} images: every image needs the same number of captions.")
            encoder_hidden_states = self.embeddings_for_rows(encoder_hidden_states, rows)
        if not (isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                labels=labels,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        # transformers 5.18 does not take boolean positions, 5.23 does: these lines work for both.
        if labels is not None or kwargs.pop("return_logits", False):
            raise ValueError(
                "Pass either labels or boolean logits_to_keep: the caller computes the loss of chosen logits."
            )
        kwargs.pop("reduction", None)  # of a loss that is not computed
        hidden_states = self.bert(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            **kwargs | {"is_decoder": True, "use_cache": False},
        ).last_hidden_state
        return CausalLMOutputWithCrossAttentions(logits=self.cls(hidden_states[logits_to_keep]))

    def embeddings_for_rows(self, image_embeds: torch.Tensor, rows: int) -> torch.Tensor:
        captions = rows // len(image_embeds)
        return image_embeds if captions == 1 else image_embeds.repeat_interleave(captions, dim=0)


class FastTextDecoder(SharedBeams, TextDecoder):
    """The decoder whose captions, beams and samples share their image's keys and values."""

    @functools.wraps(BlipTextLMHeadModel.forward)
    def forward(self, *args, **kwargs):
        check_no_maps_asked(kwargs.get("output_attentions"))
        return super().forward(*args, **kwargs)

    def embeddings_for_rows(self, image_embeds, rows):
        return image_embeds


# Replacements of the library's classes, and the arguments of their `forward` in every release checked.
FAST = {
    BlipAttention: FastVisionAttention,
    BlipTextSelfAttention: FastTextAttention,
    BlipVisionModel: VisionModel,
    BlipTextLMHeadModel: FastTextDecoder,
}
EAGER = {BlipVisionModel: VisionModel, BlipTextLMHeadModel: TextDecoder}
PLAIN = {ours: theirs for classes in (FAST, EAGER) for theirs, ours in classes.items()}
_DECODER = (
    "self input_ids attention_mask position_ids inputs_embeds encoder_hidden_states encoder_attention_mask labels {} "
    "use_cache return_logits is_decoder reduction logits_to_keep kwargs"
)
_TEXT = "self hidden_states attention_mask encoder_hidden_states encoder_attention_mask {} kwargs"
SIGNATURES = {
    BlipAttention: [("self", "hidden_states", "kwargs")],
    BlipTextSelfAttention: [tuple(_TEXT.format(cache).split()) for cache in ("past_key_values", "cache")],
    BlipVisionModel: [("self", "pixel_values", "interpolate_pos_encoding", "kwargs")],
    BlipTextLMHeadModel: [tuple(_DECODER.format(cache).split()) for cache in ("past_key_values", "cache")],
}
