"""Teacher-forced cross-entropy on the reference captions."""

import torch
from torch.nn.functional import cross_entropy

from models.blip_attention import target_positions


def caption_loss(model, batch: dict, *, label_smoothing: float = 0.0, num_items_in_batch=None) -> torch.Tensor:
    """Summed cross-entropy of the target tokens over `num_items_in_batch` (default: the target tokens of the batch).

    batch: pixel_values (I, 3, H, W); input_ids, attention_mask and labels (I * K, L). Labels stand at their own token;
    the shift to the logits that predict them is made here.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    targets = labels[labels != -100]
    # Logits are computed where there is a target to predict, and nowhere else.
    logits = model(**inputs, logits_to_keep=target_positions(batch["labels"])).logits
    total = cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    return total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


class CrossEntropy:
    """The objective of supervised fine-tuning."""

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, model, batch: dict, num_items_in_batch=None) -> dict:
        """`{"loss": scalar}`: the mean over the target tokens of the whole effective batch, if their number is given."""
        loss = caption_loss(model, batch, label_smoothing=self.label_smoothing, num_items_in_batch=num_items_in_batch)
        return {"loss": loss}
