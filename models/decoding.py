"""Decoding BLIP with the image's keys and values shared by its beams, samples and candidates.

The loop is transformers' own `generate`, so every option works as it does there, scores included. Only two things
change, for decoders with fast attention (`models.blip_attention`): the image embeddings are no longer copied for every
beam, and a step reorders only the self-attention cache. benchmarks/NOTES.md has the measurements behind this.
"""

import copy

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from models.families import ENCODED


def generate(
    model: PreTrainedModel,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    **generation_kwargs,
) -> torch.LongTensor | ModelOutput:
    """What `model.generate` returns for the same arguments; faster for a BLIP with `use_fast_attention`.

    Args:
        pixel_values: (images, 3, height, width), or the output of `models.vision.encode_images`: one encoding can
            then serve several decodings (SCST's sample and its greedy baseline, DiCO's candidates). None if a family
            has them in another form, among `generation_kwargs`.
        input_ids: (images, length) prompt tokens. For BLIP as its processor makes them: the last one, [SEP], is dropped
            and the first becomes the decoder's start token. The caller's tensor is not changed.
        attention_mask: (images, length), 0 at the prompt's padding, which must be on the left.
        generation_kwargs: anything transformers' `generate` takes (num_beams, do_sample, num_return_sequences, ...).

    Returns:
        (images * num_return_sequences, length) token ids, start token and prompt included, or with
        `return_dict_in_generate=True` transformers' output object. BLIP's cache holds the cross-attention keys and
        values once per image.
    """
    if ENCODED in generation_kwargs:  # the library repeats them for every beam in place
        generation_kwargs[ENCODED] = {kind: copy.copy(found) for kind, found in generation_kwargs[ENCODED].items()}
    if input_ids is not None:
        generation_kwargs["input_ids"] = input_ids.clone()  # the library writes its start token into them
    given = {"pixel_values": pixel_values, "attention_mask": attention_mask}
    # A process with a sharded model has all weights here (common.sharding.gathered), and its own number of images:
    # the library would make it wait for the others at each token.
    generation_kwargs.setdefault("synced_gpus", False)
    return model.generate(**{name: value for name, value in given.items() if value is not None}, **generation_kwargs)


class SharedBeams:
    """What a text decoder needs for `generate` to keep one set of keys and values per image.

    Its cross-attention must take (images, ...) keys and values for (images * beams, ...) queries.
    """

    def _expand_inputs_for_generation(
        self, expand_size=1, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ):
        # The mask is all ones and BLIP's attention never reads it; its (images * beams) copy would not fit the images.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, {**model_kwargs, "encoder_hidden_states": encoder_hidden_states}

    def _reorder_cache(self, past_key_values, beam_idx):
        # A beam only ever continues another of the same image, so the image's keys and values stay where they are.
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values
