"""Self-critical sequence training (Rennie et al., arXiv 1612.00563): REINFORCE on sampled captions with a baseline.

The reward of each sampled caption, minus a baseline that does not depend on it, weights the gradient of the caption's
log-probability. The baseline is the mean reward of the image's other samples (Luo, "A Better Variant of Self-Critical
Sequence Training", arXiv 2003.09971, equation 3) or that of the greedy caption, as first published.

What the gradient is of. The policy is exactly the distribution that captions are drawn from:
- Dropout is off (`switch_off_dropout`), both in sampling and in the pass with gradients. With it the two would be
  different networks, and the gradient that of neither. The network without it is also the one that is evaluated.
- Temperature and top-p change that distribution, so the log-probabilities are those of the changed one: the same
  warpers are applied to the logits of both passes. At 1 and 1, the defaults, it is the model's own. With top-p below 1
  the gradient is exact except for words that enter or leave the nucleus.
- A caption's log-probability is the sum over its tokens, the end token included. A mean over them would weight short
  captions more than the expected reward does.
- Under autocast both passes round to bfloat16, in a different order; the gradient is correct up to that rounding.
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessorList

from collator import IGNORE
from objectives.cross_entropy import target_logits
from objectives.policy import Distribution, LastIsGreedy, draw, facts, switch_off_dropout


class SelfCritical:
    """The objective of SCST: `(model, batch, num_items_in_batch) -> {"loss": scalar, name: scalar, ...}`.

    The batch is CaptionCollator's with `prompts_only`, and all captions of each image. The images are encoded once,
    with gradients if the encoder is trained; sampling, the greedy baseline and the pass with gradients all use that
    encoding. That is exact: the encoding depends on the weights only. Families that cannot take encoded images
    (models/vision.py) run the encoder each time.

    With `ce_weight` w the loss of an image is w x cross-entropy of its references + (1 - w) x the SCST loss. Both are
    summed over a caption's tokens and averaged over captions; the whole is divided by the references' mean number of
    tokens, so that the cross-entropy part is the usual mean over tokens, and the scale does not depend on what was
    sampled. `num_items_in_batch` (target tokens of the references in the whole effective batch) makes that exact under
    gradient accumulation and in several processes.

    Logged: `reward` (mean of the samples) and `reward_NAME` of its parts, `reward_baseline`, `advantage` (mean of its
    absolute value), `sample_length` (tokens, without the end), `bad_endings` and `unended` (shares of the samples
    that end in a word such as "a" or "with", and that were cut at the maximum length), `entropy` (nats per token).
    """

    prompts_only = True  # it draws the captions that it learns from

    def __init__(
        self,
        captioner,
        rewards,
        *,
        samples: int = 5,
        baseline: str = "leave_one_out",
        temperature: float = 1.0,
        top_p: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        self.captioner, self.rewards = captioner, rewards
        self.samples, self.baseline = samples, baseline
        self.distribution = Distribution(captioner, temperature, top_p)
        self.sampling = self.distribution.settings | {"num_return_sequences": samples}
        if baseline == "greedy":
            together = LogitsProcessorList([LastIsGreedy(samples + 1)])
            self.sampling |= {"num_return_sequences": samples + 1, "logits_processor": together}
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing
        switch_off_dropout(captioner.model)

    def __call__(self, model, batch: dict, num_items_in_batch=None) -> dict:
        image_ids, labels = batch["image_ids"], batch["labels"]
        images = len(image_ids)
        encoded = self.captioner.encode(batch)
        drawn = draw(self.captioner, encoded, **self.sampling)
        rewards, parts = self.rewards(image_ids, drawn.texts, drawn.ended)
        if self.baseline == "greedy":
            rewards, baseline = rewards[:, :-1], rewards[:, -1:]
        else:
            baseline = (rewards.sum(dim=1, keepdim=True) - rewards) / (self.samples - 1)
        sampled = drawn.first(self.samples)
        advantage = (rewards - baseline).to(labels.device)

        # One pass over the samples of each image and, if they are wanted, its references.
        references = labels.view(images, -1, labels.shape[-1])
        rows, is_sample = [], []
        for i in range(images):
            rows += sampled.tokens[i * self.samples : (i + 1) * self.samples]
            is_sample += [True] * self.samples
            if self.ce_weight:
                rows += [row[row != IGNORE].tolist() for row in references[i]]
                is_sample += [False] * len(references[i])
        is_sample = torch.tensor(is_sample, device=labels.device)
        passed = self.captioner.training_batch(encoded, rows)
        logits, targets = target_logits(model, passed)
        logits, row = logits.float(), (passed["labels"] != IGNORE).nonzero()[:, 0]
        of_sample = is_sample[row]
        log_probs, entropy = self.distribution.log_probs(logits[of_sample], targets[of_sample])
        log_probs = torch.zeros(len(is_sample), device=labels.device).index_add(0, row[of_sample], log_probs)
        log_probs = log_probs[is_sample].view(images, self.samples)

        captions = references[:, :, 1:].ne(IGNORE).any(dim=2).sum(dim=1)  # (images,)
        items = labels[:, 1:].ne(IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(captions * (advantage * log_probs).mean(dim=1)).sum() / items
        logged = {
            "reward": rewards.mean(),
            **{f"reward_{name}": part[:, : self.samples].nanmean() for name, part in parts.items()},
            "reward_baseline": baseline.mean(),
            "advantage": advantage.abs().mean(),
            **facts(sampled),
            "entropy": entropy.mean(),
        }
        if self.ce_weight:
            summed = cross_entropy(
                logits[~of_sample], targets[~of_sample], reduction="sum", label_smoothing=self.label_smoothing
            )
            logged["ce_loss"] = summed / (~of_sample).sum()
            loss = self.ce_weight * summed / items + (1 - self.ce_weight) * loss
        return {"loss": loss, **logged}
