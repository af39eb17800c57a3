"""GRPO: group relative policy optimization (Shao et al., arXiv 2402.03300), as TRL's GRPOTrainer defines it (1.16).

Of each image several captions are drawn. By how much a caption's reward exceeds the mean of its image's is its advantage, and
weights the probability of each of its tokens. With one update per caption and rewards that are not scaled the gradient is
that of SCST with leave_one_out, but for a constant. Names, defaults and log keys are TRL's. Of its variants are left out:

- weights and clips of other kinds: ratios of whole captions (GSPO), cispo, sapo, vespo, luspo, delta, off-policy masks;
- bnpo, whose loss depends on how a step is accumulated; bonuses and masks by entropy; DoRA's and MoE's extra losses;
- temperature, top-p and other warpers: captions are of the model's own distribution; a starting model that moves along;
- policies behind vLLM (it would need the weights of every step, and its log-probabilities differ by rounding), tools, turns.
"""

from dataclasses import dataclass

import torch

from objectives.cross_entropy import images_that_count, target_logits
from objectives.policy import Candidates, Distribution, StartingModel, draw, facts, switch_off_dropout


def clipped_loss(log_probs, old_log_probs, advantages, epsilon: float = 0.2, epsilon_high: float | None = None):
    """(loss, ratio) of each token: two tensors of the shape of `log_probs`, which all arguments have.

    The loss is -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A), where the ratio is of the token's probability
    to that when it was drawn: it has no gradient once it is out of these bounds on the side that A leads to.
    """
    ratio = (log_probs - old_log_probs).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    return -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages), ratio


def divergence(log_probs, reference_log_probs) -> torch.Tensor:
    """An unbiased estimate of the KL divergence from the reference at each token that the model drew, never below 0."""
    difference = reference_log_probs - log_probs
    return difference.exp() - difference - 1


def moments(values: torch.Tensor, dim=None, total=lambda tensor: tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation with n - 1) of the values that are not NaN, in tensors with as many dimensions; `total` adds
    up tensors of several processes."""
    count = total((~values.isnan()).sum(dim=dim, keepdim=True))
    mean = total(values.nansum(dim=dim, keepdim=True)) / count
    return mean, (total((values - mean).square().nansum(dim=dim, keepdim=True)) / (count - 1)).sqrt()


@dataclass
class Group:
    """The captions drawn of one image, and what is known of each of them: tensors of (captions,), None until they are rewarded.
    Of all their tokens, one after the other: `old`, the log-probabilities when they were drawn, and `reference`, those of the
    starting model."""

    tokens: list[list[int]]
    texts: list[str]
    ended: list[bool]
    rewards: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None
    advantages: torch.Tensor | None = None
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Grpo:
    """The objective of GRPO: `begin_step(batches)` before each optimizer step, then `(model, batch) -> {"loss": scalar, name:
    scalar, ...}` for each of its batches. The loss is that of the whole step in all processes.

    `num_generations` captions of each image of a step are drawn before its first pass, with the weights that the whole step
    is computed with: only then it is known how many tokens the loss is a mean over. The images of the first batch are encoded
    once, those of later ones once more with gradients if the encoder is trained. Dropout is off. A server's rewards are waited for
    when all is drawn and the first batch has passed.

    - scale_rewards: advantages are divided by the standard deviation of the rewards of the image (group) or of the step
      (batch), plus 1e-4; or not at all (none).
    - loss_type: each token counts alike (dapo); each caption does (grpo); or the sum is divided by what all tokens would be
      if every caption had the longest length (dr_grpo).
    - num_iterations: steps in a row that learn from the same captions (training.order repeats their batches). From the second
      on, epsilon and epsilon_high clip. `state_dict` holds the captions for a checkpoint between them.
    - beta: weight of the divergence from the starting model, which is computed once per caption.
    - mask_truncated_completions: captions without an end do not count.
    - multi_objective_aggregation: normalize_then_sum makes each reward's mean 0 and deviation 1 within an image before they
      are weighted and summed, and the sum's within the step (GDPO, arXiv 2601.05242).

    A caption that all rewards have no opinion of (None) has the advantage 0. Logged are TRL's keys, and `bad_endings` and
    `repeated_bigrams` of objectives.policy.facts; each is a mean over batches.
    """

    prompts_only = True  # it draws the captions that it learns from

    def __init__(
        self,
        captioner,
        rewards,
        *,
        num_generations: int = 8,
        num_iterations: int = 1,
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        scale_rewards: str = "group",
        loss_type: str = "dapo",
        mask_truncated_completions: bool = False,
        multi_objective_aggregation: str = "sum_then_normalize",
    ):
        self.captioner, self.rewards, self.num_iterations = captioner, rewards, num_iterations
        self.beta, self.epsilon, self.epsilon_high = beta, epsilon, epsilon_high
        self.scale_rewards, self.loss_type = scale_rewards, loss_type
        self.mask_truncated, self.normalize_first = (
            mask_truncated_completions,
            multi_objective_aggregation != "sum_then_normalize",
        )
        self.distribution = Distribution(captioner)
        self.sampling = self.distribution.settings | {"num_return_sequences": num_generations}
        self.start = StartingModel(captioner) if beta else None
        self.groups: dict[str, Group] = {}
        self.pending: list = []  # of each batch that was drawn, what waits for its rewards
        switch_off_dropout(captioner.model)

    def begin_step(self, batches: list[dict], again: bool = False, total=lambda tensor: tensor) -> None:
        """`batches` of this process are next. `again`: they are those of the step before, and so are their captions. `total`
        adds up tensors of all processes."""
        self.due, self.total = [] if again else batches, total

    def __call__(self, model, batch: dict, num_items_in_batch=None) -> dict:
        encoded = self.captioner.encode(batch)
        if self.due:
            self._draw(encoded)
        groups = [self.groups[image_id] for image_id in batch["image_ids"]]
        rows = [tokens for group in groups for tokens in group.tokens]
        passed = self.captioner.training_batch(encoded, rows)
        logits, targets = target_logits(model, passed)
        log_probs, entropy = self.distribution.log_probs(logits.float(), targets)
        if groups[0].old is None:
            self._remember(groups, log_probs.detach(), batch, encoded, rows, targets)
        if self.pending:
            self._reward()
        return self.loss(groups, log_probs, entropy) | self._facts(groups)

    def loss(self, groups: list[Group], log_probs: torch.Tensor, entropy: torch.Tensor) -> dict:
        """{"loss": the part of `groups` in the loss of the step, and means of tokens to log}, from the (tokens,) log-probabilities
        of all their captions, one after the other, and the entropies there."""
        device = log_probs.device
        lengths = torch.tensor([len(tokens) for group in groups for tokens in group.tokens], device=device)
        counted = torch.tensor(
            [end or not self.mask_truncated for group in groups for end in group.ended], device=device
        )
        row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        advantages = torch.cat([group.advantages for group in groups]).to(device)[row]
        old = torch.cat([group.old for group in groups]).to(device)
        losses, ratio = clipped_loss(log_probs, old, advantages, self.epsilon, self.epsilon_high)
        of_tokens = {"entropy": entropy} | self._clipped(ratio.detach(), advantages)
        if self.beta:
            kl = divergence(log_probs, torch.cat([group.reference for group in groups]).to(device))
            losses, of_tokens["kl"] = losses + self.beta * kl, kl.detach()
        loss = (losses * (counted * self._weights(lengths))[row]).sum()
        of_tokens = {name: (values * counted[row]).sum() for name, values in of_tokens.items()}
        return {"loss": loss} | {name: total / counted[row].sum().clamp(min=1) for name, total in of_tokens.items()}

    def _draw(self, encoded: dict) -> None:
        """Draws the captions of the step, and begins to reward them; `encoded` are the images of its first batch."""
        k, self.groups, self.drawn, self.pending = self.sampling["num_return_sequences"], {}, [], []
        for number, batch in enumerate(self.due):
            with torch.no_grad():
                drawn = draw(self.captioner, self.captioner.encode(batch) if number else encoded, **self.sampling)
            image_ids, counts = batch["image_ids"], images_that_count(batch) > 0
            self.pending.append(self.rewards.begin(image_ids, drawn.texts, drawn.ended))
            for i, (image_id, texts, ended) in enumerate(zip(image_ids, drawn.texts, drawn.ended, strict=True)):
                self.groups[image_id] = Group(drawn.tokens[i * k : (i + 1) * k], texts, ended)
                self.drawn.append((self.groups[image_id], counts))
        self.due = []

    def _reward(self) -> None:
        """Waits for the rewards of the captions that were drawn."""
        of_batches = [wait() for wait in self.pending]
        rewards = torch.cat([rewards for rewards, _ in of_batches])
        parts = {name: torch.cat([parts[name] for _, parts in of_batches]) for name in of_batches[0][1]}
        device, self.pending = self.captioner.model.device, []
        no_opinion = torch.stack([part.isnan() for part in parts.values()]).all(dim=0)
        rewards = rewards.masked_fill(no_opinion, torch.nan).to(device)
        left_out = ~torch.tensor([counts for _, counts in self.drawn], device=device)[:, None]
        advantages = self.advantages(rewards.masked_fill(left_out, torch.nan), parts)
        for i, (group, _) in enumerate(self.drawn):
            of_image = {name: part[i] for name, part in parts.items()}
            group.rewards, group.parts, group.advantages = rewards[i].cpu(), of_image, advantages[i]
        counted = [group for group, counts in self.drawn if counts]
        tokens = sum(
            len(row)
            for group in counted
            for row, end in zip(group.tokens, group.ended, strict=True)
            if end or not self.mask_truncated
        )
        captions = sum(len(group.tokens) for group in counted)
        self.captions, self.tokens = self.total(torch.tensor([captions, tokens], device=device)).tolist()

    def advantages(self, rewards: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """(images, captions), from rewards of this shape, in which NaN does not count, and their parts."""
        if self.normalize_first:
            scaled = {}
            for name, part in parts.items():
                mean, deviation = moments(part.to(rewards.device), dim=1)
                scaled[name] = (part.to(rewards.device) - mean) / (deviation + 1e-4)
            rewards = self.rewards.weighted(scaled).masked_fill(rewards.isnan(), torch.nan)
            mean, deviation = moments(rewards, total=self.total)
        else:
            mean, deviation = moments(rewards, dim=1)
            if self.scale_rewards == "batch":
                _, deviation = moments(rewards, total=self.total)
        scale = 1.0 if self.scale_rewards == "none" and not self.normalize_first else deviation + 1e-4
        return ((rewards - mean) / scale).nan_to_num()

    def _remember(self, groups, log_probs, batch, encoded, rows, targets) -> None:
        """Sets the log-probabilities that later ones are compared with, of groups that were just drawn."""
        sizes = [sum(map(len, group.tokens)) for group in groups]
        for group, old in zip(groups, log_probs.split(sizes), strict=True):
            group.old = old
        if self.beta:
            reference, _ = self.distribution.log_probs(self.start.logits(batch, encoded, rows), targets)
            for group, values in zip(groups, reference.split(sizes), strict=True):
                group.reference = values

    def _weights(self, lengths: torch.Tensor) -> torch.Tensor:
        """What each token of captions of these lengths counts in the loss of the step."""
        if self.loss_type == "grpo":
            return 1 / (lengths * self.captions)
        every = (
            self.captions * self.captioner.settings["max_new_tokens"] if self.loss_type == "dr_grpo" else self.tokens
        )
        return torch.full_like(lengths, 1 / max(1, every), dtype=torch.float32)

    def _clipped(self, ratio, advantages) -> dict[str, torch.Tensor]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        below, above = (ratio < 1 - self.epsilon) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
        return {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below | above}

    def _facts(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        rewards = torch.stack([group.rewards for group in groups])
        _, deviation = moments(rewards, dim=1)
        logged = {"reward": rewards.nanmean(), "reward_std": moments(rewards)[1].squeeze()}
        for name in groups[0].parts:
            part = torch.stack([group.parts[name] for group in groups])
            logged |= {f"rewards/{name}/mean": part.nanmean(), f"rewards/{name}/std": moments(part)[1].squeeze()}
        drawn = [tokens for group in groups for tokens in group.tokens]
        of_texts = facts(Candidates(drawn, [group.texts for group in groups], [group.ended for group in groups]))
        return logged | {
            "frac_reward_zero_std": deviation.isclose(torch.zeros(())).float().mean(),
            "completions/mean_length": torch.tensor(list(map(len, drawn))).float().mean(),
            "completions/clipped_ratio": of_texts["unended"],
            "bad_endings": of_texts["bad_endings"],
            "repeated_bigrams": of_texts["repeated_bigrams"],
        }

    def state_dict(self) -> dict:
        """The captions of this process's step, for torch.save."""
        groups = {image_id: vars(group) for image_id, group in self.groups.items()}
        return {"captions": self.captions, "tokens": self.tokens, "groups": groups}

    def load_state_dicts(self, states: list[dict]) -> None:
        """Takes the captions of all processes, as their images may be others' now."""
        self.captions, self.tokens = states[0]["captions"], states[0]["tokens"]
        self.groups = {image_id: Group(**group) for state in states for image_id, group in state["groups"].items()}
