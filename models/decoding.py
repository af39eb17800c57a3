"""Decoding BLIP with the image's keys and values shared by its beams, samples and candidates.

The loop is transformers' own `generate`, so every option works as it does there, scores included. Three things change, for
decoders with fast attention (`models.blip_attention`): the image embeddings are no longer copied for every beam, a step
reorders only the self-attention cache, and on a GPU it is one CUDA graph (`models.decoding_step`). benchmarks/NOTES.md has the
measurements behind this.
"""

import copy
import functools

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
from transformers.utils import ModelOutput

from models.decoding_step import CACHE, next_logits, take_over
from models.families import ENCODED

# Generation settings that apply if neither a flag nor the checkpoint's generation_config.json sets them.
DEFAULTS = {
    "num_beams": 5,
    "max_new_tokens": 30,
    "min_new_tokens": None,
    "length_penalty": 1.0,
    "early_stopping": True,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
# Those that have no effect without beams, and their values then: about any other `generate` warns.
WITHOUT_BEAMS = {"length_penalty": 1.0, "early_stopping": False}
# What else of that file counts: the tokens that a caption starts with, ends with and is padded with.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def drop_leftovers(model: PreTrainedModel) -> None:
    """Leave nothing in the generation configs of `model` and its parts but TOKENS and the settings of DEFAULTS, in place.

    `generate` takes from there all that it is not told: published checkpoints sample (do_sample, temperature, top_k,
    typical_p), force or forbid words, or count a minimum length with the prompt. A forced first word is not kept for any
    family: what a decoder starts with is part of its prompt (models.families.decoder_prompt, Florence-2's too), and the
    model has learnt to write the rest. A forced end would close captions that were cut, which the model did not end.
    """
    for module in model.modules():
        settings = getattr(module, "generation_config", None)
        if settings is not None:
            kept = {name: getattr(settings, name) for name in (*TOKENS, *DEFAULTS)}
            if settings.num_beams == 1:
                kept |= dict.fromkeys(WITHOUT_BEAMS)
            module.generation_config = GenerationConfig(**kept)


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
        generation_kwargs[ENCODED] = {
            modality: copy.copy(encoded) for modality, encoded in generation_kwargs[ENCODED].items()
        }
    if input_ids is not None:
        generation_kwargs["input_ids"] = input_ids.clone()  # the library writes its start token into them
    inputs = {"pixel_values": pixel_values, "attention_mask": attention_mask}
    # A process with a sharded model has all weights here (common.sharding.gathered), and its own number of images:
    # the library would make it wait for the others at each token.
    generation_kwargs.setdefault("synced_gpus", False)
    return model.generate(**{name: value for name, value in inputs.items() if value is not None}, **generation_kwargs)


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

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        cache = model_kwargs.get(CACHE)
        speculative = "num_new_tokens" in kwargs  # it reads several tokens at once, and takes some back
        if cache is None or _step_of(cache) or self.training or speculative or outputs.hidden_states:
            return model_kwargs
        if length := cache.get_seq_length():
            mask = model_kwargs.get("attention_mask")
            take_over(self, cache, mask if mask is None else mask[:, :length])
        return model_kwargs

    # generate() reads the names of the parameters of both, so they stay the library's.
    @functools.wraps(BlipTextLMHeadModel.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        if _step_of(cache := kwargs.get(CACHE)):
            positions = kwargs.get("position_ids")
            positions = {} if positions is None else {"position_ids": positions[:, -1:]}
            return {"input_ids": input_ids[:, -1:], CACHE: cache, **positions}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @functools.wraps(BlipTextLMHeadModel.forward)
    def forward(self, *args, **kwargs):
        if _step_of(cache := kwargs.get(CACHE)):
            logits = next_logits(self, cache, kwargs["input_ids"], kwargs.get("position_ids"))
            return CausalLMOutputWithCrossAttentions(logits=logits, **{CACHE: cache})
        return super().forward(*args, **kwargs)

    def _reorder_cache(self, past_key_values, beam_idx):
        # A beam only ever continues another of the same image, so the image's keys and values stay where they are.
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


def _step_of(cache):
    return getattr(cache, "step", None)
