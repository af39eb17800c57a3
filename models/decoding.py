"""Decoding BLIP with the image's keys and values shared by its beams, samples and candidates.

The loop is transformers' own `generate`, so every option means what it means there, scores included. Only two of its
habits change, for decoders with fast attention (`models.blip_attention`): it no longer copies the image embeddings for
every beam, and a step reorders the self-attention cache alone. benchmarks/NOTES.md has the measurements behind this.
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
    """What `model.generate` returns for the same arguments; sooner from a BLIP that `use_fast_attention` has seen.

    Args:
        pixel_values: (images, 3, height, width), or what `models.vision.encode_images` made of them: one encoding can
            then serve several decodings (SCST's sample and its greedy baseline, DiCO's candidates). None where a
            family has them in another form, among `generation_kwargs`.
        input_ids: (images, length) prompt tokens. For BLIP as its processor makes them: the last one, [SEP], is dropped
            and the first becomes the decoder's start token. Left as they are for the caller.
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
    # A process that shares the model has all weights here (common.sharding.gathered), and images of its own number:
    # the library would have it wait at each token for the others.
    generation_kwargs.setdefault("synced_gpus", False)
    return model.generate(**{name: value for name, value in given.items() if value is not None}, **generation_kwargs)


class SharedBeams:
    """What a text decoder needs for `generate` to keep one set of image keys and values an image.

    Its cross-attention must take (images, ...) keys and values for (images * beams, ...) queries.
    """

    def _expand_inputs_for_generation(
        self, expand_size=1, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ):
        # The mask is all ones and BLIP's attention never reads it; its (images * beams) copy would not fit the images.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, {**model_kwargs, "encoder_hidden_states": encoder_hidden_states}

    def _reorder_cache(self, past_key_values, beam_idx):
        # A beam only ever follows another of its image, so the image's keys and values stay where they are.
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values
