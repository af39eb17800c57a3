"""Sampled captions that depend on the seed, the image and their number alone, not on batches, shards, processes or kills.

The largest of logits with Gumbel noise added is a sample of their softmax, exactly (Maddison et al., arXiv 1411.0030). The noise
of a token is a hash of (seed, image, number of the caption, step, token): it is drawn nowhere, so nothing else can change it.
Two batches of an image differ in the last bits of its logits; that changes a token only where two of them are that close.
"""

import torch
import xxhash
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# What is left of generate's own sampling: the one token that is possible.
TAKE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GOLDEN, FIRST, SECOND = (
    int.from_bytes(constant.to_bytes(8, "big"), "big", signed=True)
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
)


def seeded(seed: int, images: list[int], settings: dict) -> dict:
    """`settings` of generate that sample, with seeded noise in place of the library's: for one call of generate, of `images`,
    a number each that tells an image's content."""
    number = settings.get("num_return_sequences") or 1
    rows = [f"{seed} {image} {caption}" for image in images for caption in range(number)]
    return settings | TAKE | {"logits_processor": LogitsProcessorList([SeededSample(rows, warpers(settings))])}


def warpers(settings: dict) -> LogitsProcessorList:
    """temperature, top_k and top_p, in the library's order."""
    chosen = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    chosen += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    chosen += [TopPLogitsWarper(settings["top_p"])] if settings["top_p"] < 1 else []
    return chosen


class SeededSample(LogitsProcessor):
    """Leaves one token possible in each row: the sample that the row's name and the step decide.

    Args:
        rows: a name of each row of a batch.
        warpers: of the logits, before the noise.
    """

    def __init__(self, rows: list[str], warpers: LogitsProcessorList):
        self.rows, self.warpers, self.step = rows, warpers, -1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.step += 1
        device = torch.device("cpu") if scores.device.type == "mps" else scores.device  # which has no float64
        noise = gumbel([f"{row} {self.step}" for row in self.rows], scores.shape[1], device)
        sample = (self.warpers(input_ids, scores).to(device).double() + noise).argmax(dim=1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, sample.to(scores.device), 0.0)


def gumbel(names: list[str], length: int, device) -> torch.DoubleTensor:
    """(names, length) Gumbel noise: row by row splitmix64, from the hash of the row's name on."""
    first = [xxhash.xxh3_64_intdigest(name.encode()) - 2**63 for name in names]
    state = torch.arange(1, length + 1, device=device) * GOLDEN + torch.tensor(first, device=device)[:, None]
    state = (state ^ _shifted(state, 30)) * FIRST
    state = (state ^ _shifted(state, 27)) * SECOND
    state = state ^ _shifted(state, 31)
    uniform = (_shifted(state, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _shifted(state: torch.LongTensor, bits: int) -> torch.LongTensor:
    """To the right, without the sign."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
