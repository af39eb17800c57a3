"""The captioner as a policy: captions drawn from it, to be rewarded, and the network for their log-probabilities.

Shared by the objectives that learn from the model's own captions.
"""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    LogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from common.processes import fork_rng
from common.sharding import gathered
from metrics import ends_badly, repeated_bigrams, tokenize
from models.vision import has_gradients
from objectives.cross_entropy import target_logits

# Settings of generate for greedy decoding, and for sampling from the model's own distribution (the library's default
# top_k is 50).
GREEDY = {"num_beams": 1, "do_sample": False, "length_penalty": 1.0, "early_stopping": False}
SAMPLING = GREEDY | {
    "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "min_new_tokens": None,
}  # fmt: skip


@dataclass
class Candidates:
    """Captions of a batch's images, k per image. `tokens[i * k + j]` are the new token ids of image i's j-th, the end
    token included if it has one; `texts[i][j]` and `ended[i][j]` its text and whether it has one."""

    tokens: list[list[int]]
    texts: list[list[str]]
    ended: list[list[bool]]

    def first(self, count: int) -> "Candidates":
        """The first `count` of each image."""
        k = len(self.texts[0])
        tokens = [row for i, row in enumerate(self.tokens) if i % k < count]
        return Candidates(tokens, [group[:count] for group in self.texts], [group[:count] for group in self.ended])


class LastIsGreedy(LogitsProcessor):
    """Of every `k` rows that are sampled together, the last always takes the most likely token: the greedy caption,
    decoded with the samples instead of after them."""

    def __init__(self, k: int):
        self.k = k

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        last = scores[self.k - 1 :: self.k]
        scores[self.k - 1 :: self.k] = torch.full_like(last, -torch.inf).scatter(1, last.argmax(1, keepdim=True), 0.0)
        return scores


def draw(captioner, batch: dict, **settings) -> Candidates:
    """`num_return_sequences` captions of each image of `batch` (model inputs that end in a prompt, images encoded or
    not), decoded as in evaluation except for `settings`, without dropout or gradients."""
    model = captioner.model
    was_training = model.training
    seed = int(torch.randint(2**31, ()))  # of this process's own random state
    with fork_rng(model.device), gathered(model):
        torch.manual_seed(seed)
        model.eval()
        tokens = captioner.rows(captioner.generate_tokens(batch, **settings))
        model.train(was_training)
    ended = [row[-1:] == [captioner.collator.end] for row in tokens]
    texts = captioner.texts(tokens)
    k = settings.get("num_return_sequences", 1)
    starts = range(0, len(tokens), k)
    return Candidates(tokens, [texts[i : i + k] for i in starts], [ended[i : i + k] for i in starts])


class Distribution:
    """What captions are sampled from: the model's own distribution, changed by temperature and top-p, without the
    placeholders of images. `settings` are those of `draw`."""

    def __init__(self, captioner, temperature: float = 1.0, top_p: float = 1.0):
        self.settings = SAMPLING | {"temperature": temperature, "top_p": top_p}
        self.warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        if captioner.collator.placeholders:  # never drawn
            self.warpers.append(SuppressTokensLogitsProcessor(captioner.collator.placeholders, captioner.model.device))

    def log_probs(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target under the distribution that was drawn from, and the entropy of that, in nats:
        two (tokens,) tensors, from logits (tokens, vocabulary)."""
        warped = logits
        for warper in self.warpers:
            warped = warper(None, warped)
        if self.warpers:
            # A drawn token was in the nucleus, even if the two passes round to different sides of its edge.
            target_logits = logits.gather(1, targets[:, None]) / self.settings["temperature"]
            warped = warped.scatter(1, targets[:, None], target_logits)
        log_probs = warped.log_softmax(dim=-1)
        entropy = torch.special.entr(log_probs.detach().exp()).sum(dim=-1)
        return log_probs.gather(1, targets[:, None])[:, 0], entropy


class StartingModel:
    """The model as it was when this object was made. Only trained weights are copied, and swapped in for its pass: with a
    new adapter it is the network without one, and the whole network is never copied."""

    def __init__(self, captioner):
        self.captioner = captioner
        self.trained = [parameter for parameter in captioner.model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach().clone() for parameter in self.trained]

    @torch.no_grad()
    def logits(self, batch: dict, encoded: dict, rows: list[list[int]]) -> torch.Tensor:
        """(targets, vocabulary) float32 logits of `rows` of token ids, equally many for each image of `batch`, which is also
        given `encoded`: images whose encoder is trained are encoded again."""
        passed = self.captioner.training_batch(batch if has_gradients(encoded) else encoded, rows)
        device, dtype = passed["input_ids"].device.type, self.captioner.autocast
        self._exchange_weights()
        try:
            with gathered(self.captioner.model), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                logits, _ = target_logits(self.captioner.model, passed)
        finally:
            self._exchange_weights()
        return logits.float()

    def _exchange_weights(self) -> None:
        for i, parameter in enumerate(self.trained):
            if isinstance(parameter, DTensor):  # FSDP keeps the address of a shard
                local, other = parameter.to_local(), self.weights[i].to_local()
                kept = local.clone()
                local.copy_(other), other.copy_(kept)
            else:
                parameter.data, self.weights[i] = self.weights[i].to(parameter.device), parameter.data


def facts(candidates: Candidates) -> dict[str, torch.Tensor]:
    """Values to log for drawn captions: mean length in tokens, without the end token; shares that end in a word such as
    "a" or "with", and that were cut at the maximum length; share of repeated pairs of words."""
    ended = [end for group in candidates.ended for end in group]
    words = tokenize(text for group in candidates.texts for text in group)
    values = {
        "sample_length": [len(tokens) - end for tokens, end in zip(candidates.tokens, ended, strict=True)],
        "bad_endings": list(map(ends_badly, words)),
        "repeated_bigrams": list(map(repeated_bigrams, words)),
        "unended": [not end for end in ended],
    }
    return {name: torch.tensor(value).float().mean() for name, value in values.items()}


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of the network to 0, in place; its config, and so its checkpoints, keep theirs.

    Not `model.eval()`: gradient checkpointing works in training mode only.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
