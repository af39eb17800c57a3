"""The output folder of a training run: which run it holds, and where to resume."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

from arguments import TRAIN_GROUPS
from common.errors import UserError
from common.files import write_json
from common.provenance import environment

logger = logging.getLogger(__name__)

# Flags that may differ when a run is resumed: they do not change what is learnt.
FREE = {
    "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "disable_tqdm", "skip_memory_metrics",
    "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level", "save_total_limit",
    "log_level_replica", "log_on_each_node", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_revision",
    "hub_private_repo", "hub_always_push", "local_rank", "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "license", "meteor",
    "spice", "spice_samples", "java_timeout", "bootstrap_samples", "trackio_space_id", "deepspeed", "fsdp", "dry_run",
    "per_device_eval_batch_size", "report_maps", "max_test_samples", "feature_cache", "clip_metrics", "device",
    "caption_language", "instances", "subset_column",
    "activation_checkpointing", "activation_checkpointing_kwargs",  # newer names of gradient_checkpointing's, which counts
}  # fmt: skip


def find_checkpoint(folder: Path, flags: dict, resume_from_checkpoint: str | None) -> str | None:
    """The checkpoint to resume from, or None to start from scratch.

    ValueError if `folder` holds a run with other flags, or if a named checkpoint is not complete. A checkpoint that a
    kill left unfinished is skipped.
    """
    if resume_from_checkpoint:
        if not _is_whole(Path(resume_from_checkpoint)):
            raise UserError(f"resume_from_checkpoint: {resume_from_checkpoint} is not a whole checkpoint of train.py.")
        return resume_from_checkpoint
    flags = _binding(flags)
    if (folder / "run.json").is_file():
        before = _binding(json.loads((folder / "run.json").read_text(encoding="utf-8"))["flags"])
        differ = _differences(before, flags)
        if differ:
            what = "; ".join(f"{name} was {before.get(name)!r}, is {flags.get(name)!r}" for name in differ[:5])
            more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"output_dir {folder} holds another run: {what}{more}. Name another --output_dir, or delete that one."
            )
    elif stray := sorted(folder.glob("checkpoint-*")):
        raise UserError(
            f"output_dir {folder} holds {stray[0].name}, but no run.json that says which run it belongs to. "
            f"Name another --output_dir, or pass --resume_from_checkpoint {stray[0]} to resume from it anyway."
        )
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in checkpoints if _is_whole(path)]
    for path in checkpoints:
        if path not in whole:
            logger.warning("%s is unfinished (the run was stopped while it was written) and is not used", path)
    if whole:
        logger.info("resuming from %s", whole[-1])
    return str(whole[-1]) if whole else None


def record_run(folder: Path, flags: dict, **facts) -> dict:
    """Write run.json, and return what it holds: the flags that define the run, its environment, and at its end
    the `facts` of reports.model_card.run_facts. Removes unfinished checkpoints."""
    run = {"flags": _binding(flags), "license": flags["license"], **environment(), **facts}
    write_json(folder / "run.json", run)
    for path in folder.glob("checkpoint-*"):
        if not _is_whole(path):
            shutil.rmtree(path)
    return run


def _binding(flags: dict) -> dict:
    """The flags that must be the same to resume, as read back from JSON."""
    return json.loads(json.dumps({k: v for k, v in flags.items() if k not in FREE}, default=str))


def _differences(before: dict, now: dict) -> list[str]:
    """Names of the flags that differ. One that only the one release has, of this repo or of transformers, differs if it
    is set."""
    fields = [field for group in TRAIN_GROUPS for field in dataclasses.fields(group)]
    made = dataclasses.MISSING
    default = _binding({f.name: f.default if f.default_factory is made else f.default_factory() for f in fields})
    differ = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    differ |= {name for name in now.keys() - before.keys() if now[name] != default.get(name)}
    return sorted(differ | {name for name in before.keys() - now.keys() if before[name]})


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last, so a checkpoint that has it in full has everything."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
