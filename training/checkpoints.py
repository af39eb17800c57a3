"""The output folder of a training run: which run it holds, and where to resume."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list

from arguments import TRAIN_GROUPS, Free
from common.errors import UserError
from common.files import write_json
from common.locks import Busy, hold
from common.provenance import environment, hide_secrets
from common.sharding import strategy
from models.adapters import NEW
from objectives.own_reward import own_files

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
# Flags of transformers that may differ when a run is resumed. Those of this repo say so where they are declared.
LIBRARY_FREE = {
    "run_name", "project", "disable_tqdm", "skip_memory_metrics", "logging_strategy", "logging_first_step",
    "logging_nan_inf_filter", "log_level", "log_level_replica", "log_on_each_node", "push_to_hub", "hub_model_id",
    "hub_token", "hub_strategy", "hub_revision", "hub_private_repo", "hub_always_push", "local_rank", "ddp_timeout",
    "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "trackio_space_id",
    "deepspeed", "fsdp",
    "activation_checkpointing", "activation_checkpointing_kwargs",  # newer names of gradient_checkpointing's, which counts
}  # fmt: skip
FIELDS = [field for group in TRAIN_GROUPS for field in dataclasses.fields(group)]
FREE = LIBRARY_FREE | {field.name for field in FIELDS if isinstance(field.metadata.get("help"), Free)}
# Set by the data where they are left out (training.lengths).
FILLED_IN = ("max_txt_len", "max_new_tokens")
OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
OF_CLIP = ("clip_metrics", "clip_model", "pac_checkpoint")


@contextlib.contextmanager
def claimed(folder: Path, args):
    """Inside, this run is the only one that writes to `folder`. UserError in all its processes if another one does."""
    busy, file = [False], None
    if args.process_index == 0:
        try:
            file, locked = hold(folder / ".lock")
            if not locked:
                logger.warning(
                    "the file system of %s has no locks: start no second run there while this one runs", folder
                )
        except Busy:
            busy = [True]
    if broadcast_object_list(busy)[0]:
        raise UserError(
            f"output_dir {folder}: another run is writing there. Name another --output_dir, or stop that one first."
        )
    try:
        yield
    finally:
        if file:
            file.close()


def find_checkpoint(folder: Path, flags: dict, resume_from_checkpoint: str | None, processes: int = 1) -> str | None:
    """The checkpoint that a run in `processes` processes resumes from, or None to start from scratch.

    UserError if `folder` holds a run with other flags or of other processes, or if a checkpoint cannot be resumed from. One
    that a kill left unfinished is skipped.
    """
    if resume_from_checkpoint:
        checkpoint = Path(resume_from_checkpoint)
        if not _is_whole(checkpoint):
            raise UserError(f"resume_from_checkpoint: {checkpoint} is not a whole checkpoint of train.py.")
        _check_resumable(checkpoint)
        _check_processes(checkpoint, flags, processes)
        return resume_from_checkpoint
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if (folder / "run.json").is_file():
        _check_flags(folder, flags)
        _check_reward_files(folder, flags)
    elif checkpoints:
        raise UserError(
            f"output_dir {folder} holds {checkpoints[0].name}, but no run.json that says which run it belongs to. "
            f"Name another --output_dir, or pass --resume_from_checkpoint {checkpoints[0]} to resume from it anyway."
        )
    whole = [path for path in checkpoints if _is_whole(path)]
    for path in checkpoints:
        if path not in whole:
            logger.warning("%s is unfinished (the run was stopped while it was written) and is not used", path)
    if not whole:
        return None
    _check_resumable(whole[-1])
    _check_processes(whole[-1], flags, processes)
    logger.info("resuming from %s", whole[-1])
    return str(whole[-1])


def processes_by_step(folder: Path, checkpoint: str | None, processes: int) -> dict[str, int]:
    """{"from step N": the number of processes from there on}, for run.json, of a run that goes on from `checkpoint`."""
    before = _read(folder / "run.json").get("processes", {}) if checkpoint else {}
    if [*before.values()][-1:] == [processes]:
        return before
    step = _read(Path(checkpoint) / STATE)["global_step"] if checkpoint else 0
    return before | {f"from step {step}": processes}


def record_run(folder: Path, flags: dict, **facts) -> dict:
    """Write run.json, and return what it holds: the flags that define the run, its environment, and at its end
    the `facts` of reports.model_card.run_facts. Removes unfinished checkpoints."""
    before = _read(folder / "run.json")
    kept = {"processes": before.get("processes", {}), "lengths": before.get("lengths"), "sharding": strategy()}
    kept["reward_files"] = before.get("reward_files", {})
    run = {"flags": _binding(flags), "license": flags["license"], **kept, **environment(), **facts}
    write_json(folder / "run.json", run)
    for path in folder.glob("checkpoint-*"):
        if not _is_whole(path):
            shutil.rmtree(path)
    return run


def _check_flags(folder: Path, flags: dict) -> None:
    before, now = (_without_free(one, flags) for one in (_read(folder / "run.json")["flags"], _binding(flags)))
    differ = _differences(before, now)
    if differ:
        changes = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differ[:5])
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(
            f"output_dir {folder} holds another run: {changes}{more}. To continue from its model (more epochs, other settings), pass "
            f"--model_name_or_path {folder} and another --output_dir; to start anew, another --output_dir, or delete that one."
        )


def reward_files(flags: dict) -> dict[str, str | None]:
    """{file: SHA-256 of what is in it} of the files that the rewards are made of; None if it is not there."""
    files = own_files(flags["reward"]) + [flags["instances"]] * (
        "chair" in flags["reward"] and bool(flags["instances"])
    )
    return {
        file: hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else None for file in files
    }


def _check_reward_files(folder: Path, flags: dict) -> None:
    now = reward_files(flags)
    before = _read(folder / "run.json").get("reward_files", now)
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            raise UserError(
                f"reward: {file} is not as it was when the run in {folder} began, which would go on with another reward. Restore "
                "it, or name another --output_dir to start anew. To go on with the new one, pass --resume_from_checkpoint."
            )


def _check_resumable(checkpoint: Path) -> None:
    if not [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:  # global_step: DeepSpeed's
        raise UserError(
            f"{checkpoint} has weights and no optimizer (--save_only_model), so a run cannot be resumed from it. To train "
            f"its weights anew, pass --model_name_or_path {checkpoint} and another --output_dir."
        )


def _check_processes(checkpoint: Path, flags: dict, processes: int) -> None:
    """UserError if the run that wrote `checkpoint` has its images of a step, or its weights, on other processes."""
    run = _read(checkpoint.parent / "run.json")
    before, sharding = [*run.get("processes", {}).values()][-1:], run.get("sharding", strategy())
    if before and sharding != strategy():
        raise UserError(f"{checkpoint} was written with {sharding or 'no sharding'}. Launch the run as before.")
    if before in ([], [processes]):
        return
    step, now = (_images_of_a_step(f, n) for f, n in ((run["flags"], before[0]), (flags, processes)))
    line = f"{checkpoint} was written by {before[0]} process(es), and here are {processes}. Start as many"
    if sharding:
        raise UserError(f"{line}: weights are sharded.")
    if not flags["allow_other_processes"]:
        raise UserError(f"{line}, or pass --allow_other_processes true and keep {step} images a step.")
    if step != now:
        raise UserError(
            f"{line}, or keep {step} images a step, which are now {now}: set --per_device_train_batch_size and "
            "--gradient_accumulation_steps."
        )


def _images_of_a_step(flags: dict, processes: int) -> int:
    return flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] * processes


def _binding(flags: dict) -> dict:
    """The flags that define a run, as read back from JSON, without passwords: run.json is published."""
    return hide_secrets(json.loads(json.dumps({k: v for k, v in flags.items() if k not in FREE}, default=str)))


def _without_free(some: dict, flags: dict) -> dict:
    """`some` flags without those that may differ when a run with `flags` is resumed. One that is filled in where it is
    left out (FILLED_IN) goes on as it was recorded."""
    learnt_from = f"{flags['metric_for_best_model']} {flags['reward']}".lower()
    free = {*FREE, *(OF_A_STEP if flags["allow_other_processes"] else ())}
    free |= {name for name in FILLED_IN if flags[name] is None}
    free |= {*(OF_CLIP if not any(name in learnt_from for name in ("clip-s", "pac-s")) else ())}
    return {name: value for name, value in some.items() if name not in free}


def _differences(before: dict, now: dict) -> list[str]:
    """Names of the flags that differ. One that only the one release has, of this repo or of transformers, differs if it
    is set."""
    made = dataclasses.MISSING
    default = _binding({f.name: f.default if f.default_factory is made else f.default_factory() for f in FIELDS})
    default |= NEW
    differ = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    differ |= {name for name in now.keys() - before.keys() if now[name] != default.get(name)}
    return sorted(differ | {name for name in before.keys() - now.keys() if before[name]})


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last, so a checkpoint that has it in full has everything."""
    return "global_step" in _read(checkpoint / STATE)


def _read(file: Path) -> dict:
    """What a JSON file holds; nothing if it is not there, or was cut short by a kill."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
