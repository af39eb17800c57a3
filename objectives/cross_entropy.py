"""Teacher-forced cross-entropy on the reference captions."""

import torch
from torch.nn.functional import cross_entropy

from collator import IGNORE
from common.sharding import strategy
from models.blip_attention import target_positions
from models.families import ENCODED, base_model, model_inputs, takes
from models.prefix import shared_logits, shares_prompt
from models.vision import encode_once, repeat_images, with_image_features


def target_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """((N, vocabulary) logits, (N,) target ids) of all N labels that are not -100, in row order.

    batch: as CaptionCollator or Captioner.training_batch makes it. Labels are aligned with their own token; they are
    shifted here to the logits that predict them. If images are fewer than rows, each is encoded once for its rows.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels" and isinstance(value, torch.Tensor)}
    captioner = base_model(model)
    if captioner.config.model_type == "blip":
        # Logits are computed only where there is a target to predict.
        return model(**inputs, logits_to_keep=target_positions(labels)).logits, labels[:, 1:][labels[:, 1:] != IGNORE]
    if ENCODED in batch:
        inputs[ENCODED] = batch[ENCODED]
    times, prompt = batch.get("rows_per_image", 1), batch.get("prompt_length")
    inputs = with_image_features(captioner, inputs, times)
    if times > 1 or strategy():  # processes with a sharded model compare together, whatever their own captions are
        inputs = encode_once(model, inputs, times)
        if prompt and shares_prompt(model, inputs, times, prompt):
            return shared_logits(model, inputs, times, prompt, labels), labels[labels != IGNORE]
        inputs = repeat_images(model, inputs, times)
    if prompt and takes(captioner, "logits_to_keep"):
        inputs["logits_to_keep"] = labels.shape[1] - prompt + 1
    logits = model(**model_inputs(captioner.config, inputs)).logits
    if prompt:
        # The last of the prompt predicts the caption's first token. Image tokens before the text (GIT) have logits too.
        labels = labels[:, prompt:]
        logits = logits[:, -labels.shape[1] - 1 : -1]
    return logits[labels != IGNORE], labels[labels != IGNORE]


def caption_loss(model, batch: dict, *, label_smoothing: float = 0.0, num_items_in_batch=None) -> torch.Tensor:
    """Summed cross-entropy of the target tokens over `num_items_in_batch` (default: the target tokens of the batch)."""
    logits, targets = target_logits(model, batch)
    total = cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    return total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


def token_log_probs(model, batch: dict) -> torch.Tensor:
    """(rows, L) float32 log-probability of each label, at its own position; 0 where the label is -100."""
    logits, targets = target_logits(model, batch)
    chosen = -cross_entropy(logits.float(), targets, reduction="none")
    return torch.zeros(batch["labels"].shape, device=chosen.device).masked_scatter(batch["labels"] != IGNORE, chosen)


def mean_log_probs(model, batch: dict) -> torch.Tensor:
    """(rows,) float32 mean log-probability of a row's labels: a caption's score; 0 is the best."""
    return token_log_probs(model, batch).sum(dim=1) / (batch["labels"] != IGNORE).sum(dim=1)


def images_that_count(batch: dict) -> int:
    """Images of a training batch with captions to learn from: all, but for one that only keeps a process busy."""
    return int(batch["labels"].ne(IGNORE).view(len(batch["image_ids"]), -1).any(dim=1).sum())


class CrossEntropy:
    """The objective of supervised fine-tuning."""

    prompts_only = False  # batches hold the references as labels

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, model, batch: dict, num_items_in_batch=None) -> dict:
        """`{"loss": scalar}`: the mean over the target tokens of the whole effective batch, if their number is given."""
        loss = caption_loss(model, batch, label_smoothing=self.label_smoothing, num_items_in_batch=num_items_in_batch)
        return {"loss": loss}
