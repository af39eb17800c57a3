"""On a GPU, one decoding step of a BLIP with fast attention as one CUDA graph.

A step is some 300 operations on a few rows. A GPU does each in 3 microseconds, and Python takes 30 to start it. A CUDA graph
starts all of them at once, but only for tensors at the addresses that it was captured with, so keys and values are written
into tensors with room for words to come, not appended to others. On a CPU that would take 2 to 6 % longer.
"""

import collections
import inspect
import logging
import weakref
from types import SimpleNamespace

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

logger = logging.getLogger(__name__)
CACHE = "cache" if "cache" in inspect.signature(BlipTextLMHeadModel.forward).parameters else "past_key_values"
DEVICES = {"cuda"}
ROOM = 32  # tokens; a longer caption moves to twice the room
KEPT = 2  # graphs per decoder: of a full batch, and of a smaller last one
MASKED = -1e4  # as in FastTextAttention
# Modules that only start kernels, by the start of their class's module.
PLAIN = ("torch.nn.modules.", "transformers.models.blip.", "transformers.activations", "models.")


def take_over(decoder, cache: EncoderDecoderCache, mask: torch.Tensor | None) -> None:
    """From here on `cache` is read and written by `cache.step`, if a graph is possible here. `mask`: (rows, length) of its
    tokens, 0 at padding."""
    if decoder.device.type in DEVICES and _can_capture and _is_plain(decoder):
        with torch.inference_mode(False), torch.no_grad():  # a graph's tensors outlive the mode
            _start(decoder, cache, mask, ROOM)


def next_logits(decoder, cache: EncoderDecoderCache, tokens, position_ids) -> torch.Tensor:
    """Logits (rows, 1, vocabulary) after `tokens`, (rows, 1), for a cache that was taken over. `position_ids`: of the same
    shape, or None if all tokens before count."""
    with torch.inference_mode(False), torch.no_grad():
        fixed = cache.self_attention_cache
        if fixed.length == fixed.room:
            _start(decoder, cache, fixed.mask[:, 0, 0] == 0, 2 * fixed.room)
        return cache.step(decoder, tokens, position_ids)


class FixedCache:
    """Self-attention keys and values of all layers, (2 * layers, rows, heads, room, width), of which `length` are used.

    Attention reads all of the room: `mask`, (rows, 1, 1, room), is 0 where there is a token, else MASKED.
    """

    def __init__(self, layers, rows: int, heads: int, room: int, width: int, **kind):
        self.room, self.length = room, 0
        self.states = torch.zeros(2 * len(layers), rows, heads, room, width, **kind)
        self.mask = torch.full((rows, 1, 1, room), MASKED, **kind)
        self.position = torch.zeros(1, dtype=torch.long, device=self.states.device)
        self.numbers = {layer: 2 * i for i, layer in enumerate(layers)}

    def start(self, states: list[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Hold `states`, keys and values in turn, (rows, heads, length, width), and nothing else."""
        self.length = states[0].shape[2]
        self.states.zero_()  # what is masked does not count, unless it is NaN
        for place, state in zip(self.states, states, strict=True):
            place[:, :, : self.length] = state
        self.mask.fill_(MASKED)
        seen = self.mask[:, 0, 0, : self.length]
        seen.zero_() if mask is None else seen.masked_fill_(mask.bool(), 0)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.states[self.numbers[layer]], self.states[self.numbers[layer] + 1]
        return keys.index_copy_(2, self.position, key), values.index_copy_(2, self.position, value)

    def reorder_cache(self, rows: torch.LongTensor) -> None:
        used = self.states[..., : self.length, :]
        used.copy_(used.index_select(1, rows))

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    @property
    def layers(self) -> dict:
        return dict(zip(self.numbers, _layers(self.states[..., : self.length, :]), strict=True))


class Step:
    """The next token's logits for each of `rows` captions, with keys and values like those of `cache`, of its own."""

    def __init__(self, cache: EncoderDecoderCache, room: int):
        of_text, of_images = (_states(part) for part in (cache.self_attention_cache, cache.cross_attention_cache))
        (rows, heads, _, width), like = of_text[0].shape, {"dtype": of_text[0].dtype, "device": of_text[0].device}
        layers = list(_used(cache.self_attention_cache))
        self.own = FixedCache(layers, rows, heads, room, width, **like)
        self.of_images = torch.empty(len(of_images), *of_images[0].shape, **like)
        self.tokens, self.position_ids = torch.zeros(2, rows, 1, dtype=torch.long, device=like["device"])
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.cache.self_attention_cache, self.cache.is_updated = self.own, dict.fromkeys(layers, True)
        places = dict(zip(layers, _layers(self.of_images), strict=True))
        self.cache.cross_attention_cache = SimpleNamespace(layers=places)
        self.graph = self.logits = None

    def start(self, cache: EncoderDecoderCache, mask: torch.Tensor | None) -> None:
        self.own.start(_states(cache.self_attention_cache), mask)
        for place, state in zip(self.of_images, _states(cache.cross_attention_cache), strict=True):
            place.copy_(state)

    def __call__(self, decoder, tokens: torch.LongTensor, position_ids: torch.LongTensor | None) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.own.position.fill_(self.own.length)
        self.position_ids.copy_(self.own.position if position_ids is None else position_ids)
        self.own.length += 1
        if self.graph is None and _can_capture and tokens.is_cuda:
            self._capture(decoder)
        if self.graph is None:
            return self._run(decoder)
        self.graph.replay()
        return self.logits.clone()

    def _run(self, decoder) -> torch.Tensor:
        fixed, bert = self.own, decoder.bert
        fixed.mask.index_fill_(3, fixed.position, 0)
        hidden = bert.embeddings(input_ids=self.tokens, position_ids=self.position_ids)
        # Encoded images are not read again, as `is_updated` says, but without any a layer has no cross-attention.
        options = {"attention_mask": fixed.mask, "encoder_hidden_states": hidden, "use_cache": True, CACHE: self.cache}
        return decoder.cls(bert.encoder(hidden, **options)[0])

    def _capture(self, decoder) -> None:
        global _can_capture
        device = self.tokens.device
        # Weights that autocast has cast are kept until it ends, which a graph outlives.
        settings = {"dtype": torch.get_autocast_dtype("cuda"), "enabled": torch.is_autocast_enabled("cuda")}
        with torch.autocast("cuda", cache_enabled=False, **settings), torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up at their first call
                self._run(decoder)
            torch.cuda.current_stream().wait_stream(stream)
            graph, randomness = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state(device)
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads pin batches meanwhile
                    self.logits = self._run(decoder)
                self.graph = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("Decoding is not captured as a CUDA graph (%s): captions take 3 times as long.", reason)
                _can_capture = False
                # The generator still believes that a graph is captured: dropout would fail from here on.
                fresh = torch.Generator(device)
                fresh.set_state(randomness)
                torch.cuda.default_generators[device.index].graphsafe_set_state(fresh.graphsafe_get_state())


def release_graphs() -> None:
    """Free the GPU memory of graphs that no generation uses."""
    for free in _free.values():
        free.clear()


_can_capture = True
_free = weakref.WeakKeyDictionary()  # decoder: {what a graph was captured for: its step, while no generation uses it}


def _start(decoder, cache: EncoderDecoderCache, mask: torch.Tensor | None, room: int) -> None:
    key, of_image = (_states(part)[0] for part in (cache.self_attention_cache, cache.cross_attention_cache))
    autocast = torch.is_autocast_enabled(key.device.type) and torch.get_autocast_dtype(key.device.type)
    addresses = tuple(weight.data_ptr() for weight in decoder.parameters())
    made_for = (key.dtype, len(key), tuple(of_image.shape), room, autocast, addresses)
    free = _free.setdefault(decoder, collections.OrderedDict())
    step = free.pop(made_for, None) or Step(cache, room)
    weakref.finalize(cache, _put_back, free, made_for, step).atexit = False
    step.start(cache, mask)
    cache.step, cache.self_attention_cache = step, step.own


def _put_back(free: collections.OrderedDict, made_for: tuple, step: Step) -> None:
    if step.graph is not None:
        free[made_for] = step
        while len(free) > KEPT:
            free.popitem(last=False)


def _is_plain(decoder) -> bool:
    """Whether a step is nothing but kernels on weights that stay where they are: no adapters, shards, quantised weights or
    hooks."""
    return all(
        weight.device == decoder.device and weight.is_floating_point() and weight.numel()
        for weight in decoder.parameters()
    ) and all(
        type(module).__module__.startswith(PLAIN)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module in decoder.modules()
    )


def _used(cache) -> dict:
    """The layers that hold something, by number: not all of them, while fast attention is checked."""
    layers = cache.layers if isinstance(cache.layers, dict) else dict(enumerate(cache.layers))
    return {number: layer for number, layer in layers.items() if layer.keys is not None}


def _states(cache) -> list[torch.Tensor]:
    return [state for layer in _used(cache).values() for state in (layer.keys, layer.values)]


def _layers(states: torch.Tensor) -> list:
    """Keys and values in turn as the layers of a cache."""
    return [SimpleNamespace(keys=k, values=v) for k, v in zip(states[::2], states[1::2], strict=True)]
