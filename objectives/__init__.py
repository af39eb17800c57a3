"""Training objectives, and the one trainer that runs them."""

from objectives.cross_entropy import CrossEntropy, caption_loss, token_log_probs
from objectives.rewards import Rewards, parse_rewards
from objectives.scst import SelfCritical
from objectives.trainer import CaptionTrainer

__all__ = ["CaptionTrainer", "CrossEntropy", "build_objective", "caption_loss", "check_objective", "token_log_probs"]


def check_objective(args, objective_args, scratch_args, data_args) -> None:
    """ValueError, before anything is loaded, if these flags do not go with `args.objective`."""
    if args.objective == "cross_entropy":
        return
    parse_rewards(objective_args.reward)
    if scratch_args.model_config:
        raise ValueError(
            f"--objective {args.objective} goes on from a trained captioner: rewards of a random model's captions are "
            "all alike and teach nothing. Train with --objective cross_entropy first, then pass its folder as "
            "--model_name_or_path, without --model_config."
        )
    if data_args.streaming:
        raise ValueError(
            f"--objective {args.objective} needs the references of the whole training split, for the rewards' document "
            "frequencies: leave out --streaming."
        )


def build_objective(args, objective_args, captioner, train):
    """The objective that `args.objective` names. `train` are the training records, whose references rewards look at."""
    if args.objective == "cross_entropy":
        return CrossEntropy(args.label_smoothing_factor)
    references = dict(zip(train["image_id"], train["captions"], strict=True))
    return SelfCritical(
        captioner,
        Rewards(parse_rewards(objective_args.reward), references),
        samples=objective_args.scst_samples,
        baseline=objective_args.scst_baseline,
        temperature=objective_args.scst_temperature,
        top_p=objective_args.scst_top_p,
        ce_weight=objective_args.ce_weight,
        label_smoothing=args.label_smoothing_factor,
    )
