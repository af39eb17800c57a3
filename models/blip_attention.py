"""Fast attention for transformers' BLIP captioner, on the library's own modules and weights.

transformers' BLIP knows eager attention only: it writes the whole (heads, queries, keys) matrix to memory in every
layer, encodes an image once for each of its captions, and beam search copies an image's cross-attention keys and
values for every beam and reorders the copies at every step. `use_fast_attention(model)` gives the same numbers with

- `scaled_dot_product_attention` in the vision encoder and in the text decoder (self- and cross-attention),
- one image encoding, and one set of cross-attention keys and values, for all captions, beams or samples of an image,
- `pixel_values` that may already be encoded images, so that frozen features can be kept and used again.

It changes the class of modules that exist already and adds no module, parameter, buffer or hook, so state dict, LoRA
targets, DDP, gradient checkpointing, torch.compile, deepcopy and pickle see the model they know.
Attention maps are never written out: `output_attentions=True` needs `use_fast_attention(model, False)`.
"""

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipForConditionalGeneration, BlipVisionModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextSelfAttention

from models.decoding import SharedBeams


def use_fast_attention(model: BlipForConditionalGeneration, enabled: bool = True) -> BlipForConditionalGeneration:
    """Switches `model` to fast attention, in place, or with `enabled=False` back to the library's eager attention.

    Either way the model then takes

    - grouped captions: `model(pixel_values=(images, 3, height, width), input_ids=(images * captions, length), ...)`,
      where rows `i * captions` to `(i + 1) * captions - 1` are the captions of image `i`. With eager attention the image
      embeddings are repeated instead of shared;
    - `logits_to_keep`, a boolean (rows, length) tensor: logits come for the positions that are True only, as
      (positions, vocabulary) in row order. Those of padding and prompt are never used, and a row of logits is 40 times
      as wide as BLIP-base's hidden states. `target_positions(labels)` makes it from labels;
    - encoded images, (images, patches + 1, hidden) as the vision encoder returned them, in place of `pixel_values`.

    Same weights, same state dict; float32 results equal eager ones to 1e-5, bfloat16 ones to its rounding.
    Dropout falls on the same probabilities at the same rate, but from other random numbers.
    """
    for module in model.modules():
        if isinstance(module, BlipAttention):
            module.__class__ = FastVisionAttention if enabled else BlipAttention
        elif isinstance(module, BlipTextSelfAttention):
            module.__class__ = FastTextAttention if enabled else BlipTextSelfAttention
        elif isinstance(module, BlipVisionModel):
            module.__class__ = VisionModel
        elif isinstance(module, BlipTextLMHeadModel):
            module.__class__ = FastTextDecoder if enabled else TextDecoder
    return model


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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
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
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        is_cross_attention = encoder_hidden_states is not None
        # As in the library, whose callers never pass encoder_attention_mask: no image has padding.
        mask = encoder_attention_mask if is_cross_attention else attention_mask

        cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = (
                past_key_values.cross_attention_cache if is_cross_attention else past_key_values.self_attention_cache
            )
        if is_cross_attention and cache is not None and past_key_values.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            states = encoder_hidden_states if is_cross_attention else hidden_states
            key = self._split_heads(self.key(states), batch=states.shape[0])
            value = self._split_heads(self.value(states), batch=states.shape[0])
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross_attention:
                    past_key_values.is_updated[self.layer_idx] = True

        query = self._split_heads(self.query(hidden_states), batch=key.shape[0])
        if mask is not None:
            # A padding token before the caption has no key at all to look at. With the dtype's lowest number in all its
            # row, half precision gives NaN and the kernels' backward pass a wrong gradient; exp(-1e4) is 0 as well.
            mask = mask.clamp(min=-1e4).to(query.dtype)
        dropout = self.dropout.p if self.training else 0.0
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).reshape(*hidden_states.shape[:-1], self.all_head_size), None

    def _split_heads(self, states: torch.Tensor, batch: int) -> torch.Tensor:
        return states.view(batch, -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)


class VisionModel(BlipVisionModel):
    """BLIP's vision encoder, which hands back images that come already encoded."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if pixel_values.dim() == 3 and pixel_values.shape[-1] == self.config.hidden_size:
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values)
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
        # transformers 5.6 does not know boolean positions, 5.23 does: the same lines for both.
        if labels is not None:
            raise ValueError(
                "Pass either labels or boolean logits_to_keep: the caller computes the loss of chosen logits."
            )
        hidden_states = self.bert(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            is_decoder=True,
            use_cache=False,
        ).last_hidden_state
        return CausalLMOutputWithCrossAttentions(logits=self.cls(hidden_states[logits_to_keep]))

    def embeddings_for_rows(self, image_embeds: torch.Tensor, rows: int) -> torch.Tensor:
        captions = rows // len(image_embeds)
        return image_embeds if captions == 1 else image_embeds.repeat_interleave(captions, dim=0)


class FastTextDecoder(SharedBeams, TextDecoder):
    """The decoder whose captions, beams and samples share their image's keys and values."""

    def embeddings_for_rows(self, image_embeds, rows):
        return image_embeds
