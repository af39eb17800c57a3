"""The one trainer: transformers' Seq2SeqTrainer, with an objective as its loss and captioning as its evaluation."""

import functools
import logging
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainer, set_seed

from collator import IGNORE
from common import logs as log_lines
from common.errors import UserError
from common.files import share_weights
from common.loaders import TIMEOUT, data_loader, fit_workers
from common.processes import fork_rng, peak_memory
from common.publish import files_to_upload, upload
from common.sharding import gathered, strategy
from data import CaptionPairs, CaptionStream
from metrics import score
from metrics.clip_scores import clip_scores
from metrics.names import QUICK, SCORES, score_named
from models.families import base_model
from models.loading import load_weights
from objectives.cross_entropy import caption_loss, images_that_count
from objectives.own_reward import RewardFailed
from training.order import TrainingBatches
from training.sharding import adopt, fill_in_states, whole_state
from training.signals import EVALUATION_DUE, EvaluationStopped, StopOnSignal
from training.special_tokens import KeepSpecialTokens
from training.streams import AsTheyCome, PassEnds, StreamBatches
from training.tracker_images import log_samples

logger = logging.getLogger(__name__)


quick_score = functools.partial(score, **QUICK)


class CaptionTrainer(Seq2SeqTrainer):
    """Trains by `objective(model, batch, num_items_in_batch) -> {"loss": scalar, name: scalar, ...}`. The loss is a mean
    over target tokens, or over what the objective's `items(batch)` counts, if it has that.

    An evaluation captions the records of `validation` (a datasets.Dataset, or data.EncodedRecords of one) through
    `captioner` and scores them against all their references (`eval_sacrebleu`, `eval_CIDEr`, and of `scorers`, which look
    at the images, `eval_CLIP-S`, `eval_RefCLIP-S` and the like); `eval_loss` is the unsmoothed cross-entropy of their
    pairs of image and caption, not augmented. In several processes each captions its share, and all get the same scores.
    The captions of the first 8 records are logged to the trackers as images.

    `score(predictions, references, language=...)` returns the scores and anything else; those that metrics.names has as
    `in_training` are taken.
    """

    def __init__(
        self, *, objective, captioner, validation=None, scorers=(), caption_language="en", score=quick_score, **kwargs
    ):
        per_image = kwargs["train_dataset"].captions_per_image
        pairs = None if validation is None else CaptionPairs(validation, per_image)
        super().__init__(eval_dataset=pairs, **kwargs)
        self.objective, self.captioner, self.validation, self.scorers = objective, captioner, validation, scorers
        self.caption_language, self.score = caption_language, score
        self.eval_collator = self.data_collator.for_evaluation()
        self.validation_records = getattr(validation, "source", validation)  # with their images
        # The loss is a mean over the target tokens of the whole effective batch, so the Trainer must count them.
        self.model_accepts_loss_kwargs = True
        if self.args.gradient_checkpointing and not base_model(self.model).supports_gradient_checkpointing:
            name = type(base_model(self.model)).__name__
            raise UserError(f"gradient_checkpointing: the library's {name} does not support it. Leave it out.")
        self.label_smoother = None  # the objective's own
        self._waited, self._logged_at = 0.0, time.perf_counter()
        self._scalars: dict[str, list] = {}
        self._random: torch.Tensor | None = None  # random numbers' state at the beginning of the step
        self.batches: TrainingBatches | StreamBatches | None = None
        self.args.logging_nan_inf_filter = False  # it would hide NaN from the log; here NaN stops the run
        self._stopping, self._late = StopOnSignal(), False
        if isinstance(self.train_dataset, CaptionStream):
            self.add_callback(PassEnds(self))
        if log_lines.log_format == "json":
            for prints in (PrinterCallback, ProgressCallback):
                self.remove_callback(prints)
        self.add_callback(self._stopping)  # behind it: whether an evaluation is due is known by then
        self.add_callback(KeepSpecialTokens(self.model))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = adopt(self.accelerator)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        # The library makes generate gather sharded weights and release them. Here they are gathered beforehand.
        vars(self.model).pop("generate", None)
        if strategy() == "ZeRO-3":
            self.model.zero3_offload = lambda: self.deepspeed.optimizer.parameter_offload
        return prepared

    def train(self, resume_from_checkpoint=None, **kwargs):
        # The checkpoint of a run that was stopped before the evaluation of its last step: evaluate now.
        self._late = Path(resume_from_checkpoint or "", EVALUATION_DUE).is_file()
        self.args.eval_on_start |= self._late
        if (
            self.args.process_index
        ):  # weights were made of the same random numbers everywhere; noise is each process's own
            set_seed(self.args.seed + self.args.process_index)
        outcome = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.load_best_model_at_end and self._replicated():
            for tensor in self.model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        return outcome

    def get_train_dataloader(self):
        args = self.args
        args.dataloader_num_workers, args.dataloader_prefetch_factor = fit_workers(
            self.train_dataset, self.data_collator, self._train_batch_size, args.dataloader_num_workers,
            args.dataloader_prefetch_factor, held=2 * args.gradient_accumulation_steps + 1,  # a step's, the last one's, the next
        )  # fmt: skip
        args.dataloader_persistent_workers &= args.dataloader_num_workers > 0
        samples = AsTheyCome() if isinstance(self.train_dataset, CaptionStream) else self.train_dataset
        batches = lambda _: self._get_train_sampler()  # noqa: E731
        loader = self._get_dataloader(samples, "Training", self._train_batch_size, batches, is_training=True)
        inner = loader.base_dataloader  # what accelerate's asks for batches
        inner.timeout = TIMEOUT if args.dataloader_num_workers else 0
        # Workers are seeded by it. From the global one, persistent workers would take other numbers than none.
        inner.generator = torch.Generator().manual_seed(args.seed)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        if isinstance(self.train_dataset, CaptionStream):
            self.batches = StreamBatches(self.train_dataset, self.args, self._train_batch_size)
        else:
            iterations = getattr(self.objective, "num_iterations", 1)
            self.batches = TrainingBatches(self.train_dataset, self.args, self._train_batch_size, iterations)
        return self.batches

    def _run_epoch(self, *, epoch, **kwargs):
        # Not left to accelerate, which tells the data set only where it finds no sampler to tell.
        self.train_dataset.set_epoch(epoch)
        if not self.control.should_training_stop:  # the library looks after a step
            super()._run_epoch(epoch=epoch, **kwargs)

    def _load_best_model(self):
        # With several machines, only the first one's disk has checkpoints (transformers 5 writes them in process 0
        # only, whatever save_on_each_node says). train() broadcasts its weights to the others.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif not self._replicated() or self.args.process_index == self.args.local_process_index:
            best = self.state.best_model_checkpoint
            name = self.args.metric_for_best_model.removeprefix("eval_")
            logger.info(
                "loading the best checkpoint, %s: validation %s %.4f",
                best,
                score_named(name).label,
                self.state.best_metric,
            )
            load_weights(self.model, best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # The library's own matches names in the file with those of the modules, which differ in most chat families.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _replicated(self) -> bool:
        """Whether there are several processes, each with the whole model."""
        return self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._random is None:
            self._random = torch.get_rng_state()
        try:
            result = self.objective(model, inputs, num_items_in_batch)
        except RewardFailed as failure:
            self._save_begun_step()
            if not str(failure):
                sys.exit(failure.exit_code)
            raise
        images = images_that_count(inputs)
        loss = result["loss"] * (images > 0)
        for name, value in result.items():
            if name != "loss":
                value = torch.as_tensor(value, device=loss.device, dtype=torch.float32).detach()
                self._scalars.setdefault(name, []).append(
                    torch.stack([images * value.nan_to_num(), value.new_tensor(images)])
                )
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the images "
                f"{', '.join(inputs['image_ids'])}. Checkpoints before it are kept. Look at these samples; if they are "
                "sound, lower learning_rate or max_grad_norm, or train in bf16 or float32 instead of fp16."
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients; the sum is wanted
        return (loss, result) if return_outputs else loss

    def _save_begun_step(self) -> None:
        """Saves a checkpoint in the middle of a step, as it was at the step's beginning, in all processes. Not of sharded models,
        whose engines may be in the middle of a pass."""
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        (due,) = broadcast_object_list([self.state.global_step > 0 and not checkpoint.exists()])
        if due and not strategy():
            torch.set_rng_state(self._random)
            self._save_checkpoint(self.model, trial=None)
            if self.is_world_process_zero():
                logger.warning("saved %s: the same command resumes from there", checkpoint)

    def get_batch_samples(self, *args, **kwargs):
        start, self._random = time.perf_counter(), None
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - start
        if self.batches.ends_with_a_repeated_sample and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1]["labels"].fill_(IGNORE)
        if items is not None:
            # The Trainer skips each row's first label, which is a target if a decoder has no prompt (T5).
            count = getattr(self.objective, "items", lambda batch: int(batch["labels"].ne(-100).sum()))
            items = self._total(torch.tensor(sum(map(count, batches)), device=self.args.device))
        if hasattr(self.objective, "begin_step"):
            self.objective.begin_step(batches, self.batches.is_repeated(self.state.global_step), self._total)
        return batches, items

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that a loss is a mean over."""
        return self.accelerator.reduce(tensor, "sum") if self.args.average_tokens_across_devices else tensor

    def log(self, logs, start_time=None):
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait"] = round(self._waited / (now - self._logged_at), 4)
            self._waited, self._logged_at = 0.0, now
            for name, values in self._scalars.items():
                total, images = self.accelerator.reduce(torch.stack(values).sum(dim=0), "sum").tolist()
                logs[name] = total / images
            self._scalars = {}
        super().log(logs, start_time)
        if log_lines.log_format == "json" and self.is_world_process_zero():
            logger.info("step %d", self.state.global_step, extra={"fields": {"metrics": logs}})

    def peak_memory(self) -> dict:
        """Peak memory of this process in GiB: of its GPU where it has one, and of the host."""
        peak = {"train_peak_host_memory_gib": peak_memory() / 2**30}
        if self.args.device.type == "cuda":
            peak["train_peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return {name: round(value, 2) for name, value in peak.items()}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        start = time.perf_counter()
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        try:
            # Random numbers in training (dropout, samples) are the same with or without an evaluation in between.
            with fork_rng(self.args.device), self._stopping.breaking_off():
                metrics, predictions = self._evaluate_now(pairs)
        except EvaluationStopped:
            self._stopping.stop(self.args, self.state, self.control, evaluation_due=True)
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        if self.is_world_process_zero():
            for image_id, caption in list(predictions.items())[:3]:
                logger.info("validation %s: %s", image_id, caption)
            shown_records = self.validation_records.select(range(min(8, len(self.validation_records))))
            log_samples(self.callback_handler.callbacks, shown_records, predictions, self.state.global_step)
        metrics["runtime"] = round(time.perf_counter() - start, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._late:
            self._late = False
            if self._determine_best_metric(metrics, trial=None):
                checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
                self.state.best_model_checkpoint = str(checkpoint)
        self.model.train()
        self._logged_at = time.perf_counter()
        return metrics

    def _evaluate_now(self, pairs) -> tuple[dict, dict[str, str]]:
        """(loss and scores, captions) of the validation split."""
        self.model.eval()
        with gathered(self.model), self.compute_loss_context_manager():
            loss = self._pairs_loss(pairs)
            predictions = self.captioner.caption_split(
                self.validation,
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
            )
        references = dict(zip(self.validation["image_id"], self.validation["captions"], strict=True))
        scores, _ = self.score(predictions, references, language=self.caption_language)
        metrics = {"loss": loss} | {name: scores[name] for name, of in SCORES.items() if of.in_training}
        if self.scorers:
            more_scores, _ = clip_scores(
                self.scorers,
                predictions,
                references,
                self.validation_records["image"],
                bootstrap_samples=0,
                seed=0,
                split="validation",
                num_workers=self.args.dataloader_num_workers,
            )
            metrics |= {name: value for name, value in more_scores.items() if isinstance(value, float)}
        return metrics, predictions

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_fsdp_enabled:
            fill_in_states(self.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            state = whole_state(self.model)
            if self.args.should_save:  # before 5.23 the library's _save writes in every process that calls it
                self._save(output_dir, state)
        else:
            # The library writes a checkpoint's shards later. Before that each process checks whether the folder of the
            # best one exists: one that checked too early would wait forever for the others, which load it.
            Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if getattr(self.objective, "num_iterations", 1) > 1:
            torch.save(self.objective.state_dict(), Path(output_dir, f"drawn_{self.args.process_index}.pt"))
        # Next, the first process writes what marks the checkpoint as complete (training.checkpoints).
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        # Called when the batches of the first step are there, as random numbers that they took would count.
        super()._load_rng_state(checkpoint)
        drawn = [torch.load(file, "cpu", weights_only=True) for file in sorted(Path(checkpoint).glob("drawn_*.pt"))]
        if drawn:
            self.objective.load_state_dicts(drawn)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if isinstance(self.model, PeftModel):  # its prompt and generation settings, which an adapter's own files lack
            base = base_model(self.model)
            base.config.save_pretrained(output_dir or self.args.output_dir)
            base.generation_config.save_pretrained(output_dir or self.args.output_dir)
        share_weights(output_dir or self.args.output_dir)
        # A pickle of all flags, including the Hub token, that nothing reads: run.json records the run.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def push_to_hub(self, *args, **kwargs):
        """Uploads only those files of the output folder that common.publish lists."""
        if self.is_world_process_zero():
            self._upload(Path(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder):
        # The library's own uploads the whole output folder, including the trackers' images.
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._upload(Path(checkpoint_folder))

    def _upload(self, folder: Path) -> None:
        args = self.args
        options = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        upload(files_to_upload(folder), args.hub_model_id or Path(args.output_dir).resolve().name, **options)

    def create_model_card(self, *args, **kwargs):
        """Does nothing: train.py writes the card (reports/model_card.py), which the Trainer's must not overwrite."""

    @torch.no_grad()
    def _pairs_loss(self, pairs) -> float:
        """Mean unsmoothed cross-entropy over all target tokens of `pairs`."""
        total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens; on the CPU, as MPS has no float64
        # Not the Trainer's loader: it repeats samples until all processes have equally many.
        share = torch.utils.data.Subset(pairs, range(self.args.process_index, len(pairs), self.args.world_size))
        loader = data_loader(
            share,
            self.eval_collator,
            batch_size=self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )
        for batch in loader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                loss = caption_loss(self.model, batch, num_items_in_batch=1)
            total += torch.stack([loss.float(), batch["labels"].ne(-100).sum()]).cpu()
        if self.accelerator.num_processes > 1:
            total = sum(gather_object([total]))
        return (total[0] / total[1]).item()


# The Trainer's methods that are overridden above: if one were renamed, its override would silently not be called.
_OVERRIDDEN = (
    "_get_train_sampler", "_run_epoch", "_load_best_model", "_save_optimizer_and_scheduler", "_prepare_for_training", "create_accelerator_and_postprocess", "_load_from_checkpoint", "_push_from_checkpoint", "_save",
    "create_model_card", "get_batch_samples", "_save_rng_state", "_load_rng_state",
)  # fmt: skip
if missing := [name for name in _OVERRIDDEN if not hasattr(Seq2SeqTrainer, name)]:
    raise ImportError(
        f"transformers {transformers.__version__}: its Trainer has no {', '.join(missing)}. Releases that the scripts were "
        "tested with are in requirements.txt."
    )
