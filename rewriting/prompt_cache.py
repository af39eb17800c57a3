"""Beam search that reads each prompt once, where `generate` reads it once per beam."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class PromptLayer(DynamicLayer):
    """Keys and values of one layer: (rows * beams, heads, tokens, size), with room for all tokens to come.

    The beams of a row share its prompt, so reordering them moves only the tokens after it; and a new token is written
    in place, where the library copies everything before it.
    """

    def __init__(self, layer: DynamicLayer, beams: int, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.prompt, self.buffers = layer.keys.shape[-2], []
        for states in (layer.keys, layer.values):
            rows, heads, tokens, size = states.shape
            buffer = states.new_empty(rows * beams, heads, tokens + room, size)
            buffer[:, :, :tokens] = states.repeat_interleave(beams, dim=0)
            self.buffers.append(buffer)
        self._end_at(self.prompt)

    def _end_at(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._end_at(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for states in (self.keys, self.values):
            written = states[:, :, self.prompt :]
            written.copy_(written.index_select(0, beam_idx.to(states.device)))


def prompt_cache(model, inputs: dict, beams: int, room: int) -> Cache | None:
    """The `past_key_values` with which `model.generate(**inputs, num_beams=beams)` reads only the last token of each
    prompt. None for models with another kind of cache (encoder-decoders, sliding windows, states).

    Args:
        inputs: input_ids and attention_mask, (rows, tokens), padded on the left.
        room: maximum number of new tokens.
    """
    if model.config.is_encoder_decoder or inputs["input_ids"].shape[1] < 2:
        return None
    read = model.generate(
        **{name: value[:, :-1] for name, value in inputs.items()},
        do_sample=False,
        num_beams=1,
        max_new_tokens=1,
        return_dict_in_generate=True,
    ).past_key_values
    if any(type(layer) is not DynamicLayer for layer in getattr(read, "layers", [None])):
        return None
    return Cache(layers=[PromptLayer(layer, beams, room + 1) for layer in read.layers])
