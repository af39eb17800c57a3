"""Training objectives."""

import logging

from common.errors import UserError
from metrics.chair import read_instances
from metrics.clip_scores import NAMES
from objectives.cross_entropy import CrossEntropy, caption_loss, token_log_probs
from objectives.dico import Dico
from objectives.grpo import Grpo
from objectives.rewards import RecordRows, Rewards, check_java, clip_metrics_of, parse_rewards
from objectives.scst import SelfCritical

logger = logging.getLogger(__name__)
REWARDED = ("scst", "dico", "grpo")  # learn from rewards of the model's own captions

__all__ = ["CrossEntropy", "build_objective", "caption_loss", "check_objective", "token_log_probs"]


def check_objective(args, objective_args, metric_args, scratch_args, data_args) -> list[str]:
    """The CLIP-based scores that the objective's rewards need. ValueError, before anything is loaded, if these flags do
    not fit `args.objective`."""
    if args.objective not in REWARDED:
        return []
    weights = parse_rewards(objective_args.reward)
    check_java(weights, metric_args.caption_language)
    needed = clip_metrics_of(weights)
    metrics, best = [*needed, *metric_args.clip_metrics], args.metric_for_best_model
    if best == "RefPAC-S" and "pac-s" not in metrics:
        args.metric_for_best_model = f"Ref{NAMES[metrics[0]]}" if metrics else "CIDEr"
        logger.info("without PAC-S the best checkpoint is chosen by %s", args.metric_for_best_model)
    if scratch_args.model_config:
        raise UserError(
            f"--objective {args.objective} starts from a trained captioner: rewards of a random model's captions are "
            "all alike and teach nothing. Train with --objective cross_entropy first, then pass its folder as "
            "--model_name_or_path, without --model_config."
        )
    if data_args.streaming:
        raise UserError(
            f"--objective {args.objective} needs the references of the whole training split, for the rewards' document "
            "frequencies: leave out --streaming."
        )
    return needed


def build_objective(args, objective_args, captioner, train, scorers, metric_args):
    """The objective that `args.objective` names. `train` are the training records: rewards use their references, and
    `scorers` (ClipScorer) their images."""
    if args.objective == "cross_entropy":
        return CrossEntropy(args.label_smoothing_factor)
    references = dict(zip(train["image_id"], train["captions"], strict=True))
    weights, objects = parse_rewards(objective_args.reward), None
    if "chair" in weights and metric_args.instances:
        objects = read_instances(metric_args.instances)
    rewards = Rewards(
        weights, references, RecordRows(train), scorers, metric_args.caption_language, objects, args.output_dir
    )
    if args.objective == "dico":
        return Dico(
            captioner,
            rewards,
            candidates=objective_args.dico_candidates,
            sampled=objective_args.dico_sampled,
            beta=objective_args.dico_beta,
            tau=objective_args.dico_tau,
        )
    if args.objective == "grpo":
        return Grpo(
            captioner,
            rewards,
            num_generations=objective_args.num_generations,
            num_iterations=objective_args.num_iterations,
            beta=objective_args.beta,
            epsilon=objective_args.epsilon,
            epsilon_high=objective_args.epsilon_high,
            scale_rewards=objective_args.scale_rewards,
            loss_type=objective_args.loss_type,
            mask_truncated_completions=objective_args.mask_truncated_completions,
            multi_objective_aggregation=objective_args.multi_objective_aggregation,
        )
    return SelfCritical(
        captioner,
        rewards,
        samples=objective_args.scst_samples,
        baseline=objective_args.scst_baseline,
        temperature=objective_args.scst_temperature,
        top_p=objective_args.scst_top_p,
        ce_weight=objective_args.ce_weight,
        label_smoothing=args.label_smoothing_factor,
    )
