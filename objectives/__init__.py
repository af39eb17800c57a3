"""Training objectives, and the one trainer that runs them."""

from objectives.cross_entropy import CrossEntropy, caption_loss, token_log_probs
from objectives.trainer import CaptionTrainer

__all__ = ["CaptionTrainer", "CrossEntropy", "caption_loss", "token_log_probs"]
