"""A captioner from ONNX graphs (models/onnx_export.py), run by ONNX Runtime: pip install onnxruntime.

The loop around the graphs is transformers' own `generate`, so beams, samples and penalties work as with torch.
"""

import copy
from pathlib import Path

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from common.errors import UserError
from models.decoding_step import CACHE

IMAGES, DECODER = "images.onnx", "decoder.onnx"
FAMILIES = ("blip", "git", "vision-encoder-decoder", "blip-2")
MISSING = "pip install onnx onnxruntime onnxscript"


class OnnxModel(PreTrainedModel, GenerationMixin):
    """What a Captioner needs of a model, for the graphs in `folder`.

    `config` is the captioner's. Prompts of one call are equally long: the captioner makes groups of them.
    """

    _supports_sdpa = True
    main_input_name = "input_ids"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, config, folder: Path):
        config = copy.deepcopy(config)
        config.is_encoder_decoder = False  # to `generate`, which would encode images itself
        super().__init__(config)
        self.precision = getattr(config, "onnx_precision", "float32")
        if (Path(folder) / "generation_config.json").is_file():  # the settings that the model captions with
            self.generation_config = GenerationConfig.from_pretrained(folder)
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{folder} holds ONNX graphs, which need onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.graphs = {
            name: onnxruntime.InferenceSession(folder / name, options, onnxruntime.get_available_providers())
            for name in (IMAGES, DECODER)
        }
        self.places = config.num_query_tokens if config.model_type == "blip-2" else 0  # of the image in the prompt

    def read(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The keys and values that (images, 3, height, width) pixels give, 2 * layers of (images, heads, patches, width)."""
        return self._run(IMAGES, [pixel_values.float()])

    def next_logits(self, tokens: torch.LongTensor, images: list, past: list) -> list[torch.Tensor]:
        """[logits (images, captions, vocabulary), *keys and values of all tokens]; `tokens` are (images, captions, L)."""
        return self._run(DECODER, [tokens, *images, *past])

    def _run(self, name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        graph = self.graphs[name]
        named = zip(graph.get_inputs(), inputs, strict=True)
        arrays = graph.run(None, {place.name: value.contiguous().numpy() for place, value in named})
        return [torch.from_numpy(array) for array in arrays]

    def generate(self, pixel_values, input_ids=None, decoder_input_ids=None, attention_mask=None, **settings):
        """What the captioner's own `generate` returns: (images * captions, L) ids, the prompt included."""
        prompt = input_ids if decoder_input_ids is None else decoder_input_ids
        if self.config.model_type == "blip":  # as its own generate: it starts with [DEC], and [SEP] is dropped
            text = self.config.text_config
            if prompt is None:
                prompt = torch.full((len(pixel_values), 2), text.sep_token_id)
            prompt = torch.cat([torch.full_like(prompt[:, :1], text.bos_token_id), prompt[:, 1:-1]], dim=1)
            settings = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id} | settings
        images = self.read(pixel_values)
        output = super().generate(input_ids=prompt[:, self.places :], images=images, **settings)
        if not self.places:
            return output
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        image = prompt[:, : self.places].repeat_interleave(len(ids) // len(prompt), dim=0)
        ids = torch.cat([image, ids], dim=1)
        if isinstance(output, torch.Tensor):
            return ids
        output.sequences = ids
        return output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the graphs' keys and values are the cache

    def _expand_inputs_for_generation(self, expand_size=1, images=None, **kwargs):
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, kwargs | {"images": images}

    def prepare_inputs_for_generation(self, input_ids, images=None, **kwargs):
        past = kwargs.get(CACHE)
        return {"input_ids": input_ids if past is None else input_ids[:, -1:], "images": images, CACHE: past}

    def forward(self, input_ids, images=None, return_dict=True, **kwargs) -> CausalLMOutputWithPast:
        number = len(images[0])
        tokens, past = input_ids.unflatten(0, (number, -1)), kwargs.get(CACHE)
        if past is None:
            past = [state.new_empty(number, tokens.shape[1], state.shape[1], 0, state.shape[3]) for state in images]
        else:
            past = [state.unflatten(0, (number, -1)) for state in past]
        logits, *states = self.next_logits(tokens, images, past)
        kept = [state.flatten(0, 1) for state in states]
        return CausalLMOutputWithPast(logits=logits.flatten(0, 1)[:, None], **{CACHE: kept})

    def _reorder_cache(self, past: list, beam_idx: torch.LongTensor) -> list:
        return [state.index_select(0, beam_idx) for state in past]
