"""DiCO: Direct CLIP-based Optimization (Moratelli et al., arXiv 2408.14547; github.com/aimagelab/DiCO at 7a2f740).

Of an image's k candidate captions, the one with the highest reward is the winner. The model learns to prefer it to the
others, most of all to the worst, and is held close to the model that it started from: as in DPO (arXiv 2305.18290),
what counts is by how much its preference exceeds the starting model's.
"""

import torch
from torch.nn.functional import logsigmoid

from collator import IGNORE
from objectives.cross_entropy import images_that_count, target_logits
from objectives.policy import SAMPLING, StartingModel, draw, facts, switch_off_dropout


def dico_loss(
    policy_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    rewards: torch.Tensor,
    beta: float = 0.2,
    tau: float = 300.0,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean over images of -log sigmoid(beta m), a scalar.

    m is the winner's log-ratio less those of the losers i, weighted by gamma = softmax(tau (r_winner - r_i)), where a
    log-ratio is log p_policy - log p_reference (section 3.2 of the paper; dico_trainer.py multiplies by tau). If
    several are best, the first is the winner.

    Args:
        policy_logps, reference_logps: (images, candidates) summed log-probabilities of the candidates' tokens.
        rewards: (images, candidates).
        counted: (images, candidates), False for candidates that are left out. An image with only one candidate left has
            m = 0: nothing is learnt from it.
    """
    margin, _, _ = preferences(policy_logps - reference_logps, rewards, tau, counted)
    return -logsigmoid(beta * margin).mean()


def preferences(log_ratios, rewards, tau, counted=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(margin, winner's log-ratio, weighted log-ratio of the losers) per image: three (images,) tensors."""
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    rewards = rewards.masked_fill(~counted, -torch.inf)
    best, winner = rewards.max(dim=1, keepdim=True)
    losers = counted.scatter(1, winner, False)
    weights = (tau * (best - rewards)).masked_fill(~losers, -torch.inf).softmax(dim=1)
    weights = torch.where(losers, weights, 0).to(log_ratios.dtype)  # with no loser at all, the softmax is nan
    chosen = log_ratios.gather(1, winner)[:, 0] * losers.any(dim=1)
    rejected = (weights * log_ratios).sum(dim=1)
    return chosen - rejected, chosen, rejected


class Dico:
    """The objective of DiCO: `(model, batch, num_items_in_batch) -> {"loss": scalar, name: scalar, ...}`.

    The candidates are the k beams of one beam search, or k samples, of the current model. Those with the same text
    count as one candidate, the first: two beams may tokenize a word differently, two samples may be equal.

    The reference is the model as it was when this object was made (StartingModel). If the vision encoder is not trained,
    an image is encoded once for decoding, policy and reference; else the reference encodes it again. Dropout is off: it
    would be most of the difference between two passes.

    Logged: `reward` (mean over candidates), `reward_best`, and `reward_NAME` of its parts; `chosen`, `rejected` and
    `margin` (beta times the log-ratios of `preferences`); `kl` (nats per caption: the divergence of the next-token
    distribution from the reference's, summed over a candidate's tokens); `distinct` (share of the candidates that count);
    and objectives.policy.facts.
    """

    prompts_only = True  # it draws the captions that it learns from

    def __init__(self, captioner, rewards, *, candidates=5, sampled=False, beta: float = 0.2, tau: float = 300.0):
        self.captioner, self.rewards, self.beta, self.tau = captioner, rewards, beta, tau
        self.decoding = SAMPLING if sampled else {"do_sample": False, "num_beams": candidates}
        self.decoding = self.decoding | {"num_return_sequences": candidates}
        switch_off_dropout(captioner.model)
        self.start = StartingModel(captioner)

    def items(self, batch: dict) -> int:
        """The number of items that the loss is a mean over: images, instead of target tokens."""
        return images_that_count(batch)

    def __call__(self, model, batch: dict, num_items_in_batch=None) -> dict:
        encoded = self.captioner.encode(batch)
        candidates = draw(self.captioner, encoded, **self.decoding)
        rewards, parts = self.rewards(batch["image_ids"], candidates.texts, candidates.ended)
        device = self.captioner.model.device
        rewards = rewards.to(device)
        counted = [[text not in group[:i] for i, text in enumerate(group)] for group in candidates.texts]
        counted = torch.tensor(counted, device=device)

        passed = self.captioner.training_batch(encoded, candidates.tokens)
        row = (passed["labels"] != IGNORE).nonzero()[:, 0]
        reference = self.start.logits(batch, encoded, candidates.tokens).log_softmax(dim=-1)
        logits, targets = target_logits(model, passed)
        policy = logits.float().log_softmax(dim=-1)

        def summed(log_probs):
            of_targets = log_probs.gather(1, targets[:, None])[:, 0]
            return torch.zeros(rewards.numel(), device=device).index_add(0, row, of_targets).view(rewards.shape)

        policy_logps, reference_logps = summed(policy), summed(reference)
        loss = dico_loss(policy_logps, reference_logps, rewards, self.beta, self.tau, counted)
        if num_items_in_batch is not None:
            loss = loss * (len(rewards) / num_items_in_batch)
        with torch.no_grad():
            margin, chosen, rejected = preferences(policy_logps - reference_logps, rewards, self.tau, counted)
            kl = (policy.exp() * (policy - reference)).sum() / rewards.numel()
        return {
            "loss": loss,
            "reward": rewards.mean(),
            "reward_best": rewards.amax(dim=1).mean(),
            **{f"reward_{name}": part.nanmean() for name, part in parts.items()},
            "chosen": self.beta * chosen.mean(),
            "rejected": self.beta * rejected.mean(),
            "margin": self.beta * margin.mean(),
            "kl": kl,
            "distinct": counted.float().mean(),
            **facts(candidates),
        }
