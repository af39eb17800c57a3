"""The Trainer's arguments: the flags of arguments.TrainFlags, with defaults for this machine and transformers."""

import os
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.integrations import get_available_reporting_integrations

from arguments import BEST, REPLACED, TrainFlags
from common.errors import UserError
from common.processes import check_gpus, default_workers, on_accelerator, use_device


@dataclass
class TrainArguments(TrainFlags, Seq2SeqTrainingArguments):
    REPLACED: ClassVar[dict[str, str]] = REPLACED

    def __post_init__(self):
        TrainFlags.__post_init__(self)
        self._choose_device()
        if self.metric_for_best_model is None:
            self.metric_for_best_model = BEST[self.objective]
        if self.eval_strategy == "no":
            self.load_best_model_at_end, self.metric_for_best_model = False, None
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a log file gets lines, not a bar
        # The collator reads columns that no model's forward has.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}  # each process reads its own batches
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # all are constants; autograd takes a broadcast for a change
        if self.ddp_find_unused_parameters is None:
            # With the library's default with checkpointing, False, DDP fails at the second step of families that never
            # read some weights, such as the last norm of LLaVA's encoder.
            self.ddp_find_unused_parameters = True
        self._choose_checkpointing()
        self._choose_trackers()
        if self.torch_compile and torch.__version__ < "2.7":
            raise UserError(f"torch_compile needs torch 2.7 or later, and this is {torch.__version__}. Leave it out.")
        Seq2SeqTrainingArguments.__post_init__(self)
        # One process drives one device. Several devices are driven by torchrun or accelerate launch.
        self._n_gpu = min(self.n_gpu, 1)

    def _choose_device(self) -> None:
        """And what is best on it: the precision, the workers."""
        if self.use_cpu:
            use_device("cpu")
        check_gpus()
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
        if tasks > 1 and "RANK" not in os.environ:
            raise UserError(
                f"srun started {tasks} tasks, and each would train all of it in the same folder. Start one per machine, "
                "and torchrun in it: srun --ntasks-per-node 1 torchrun ... train.py ..."
            )
        self.use_cpu = self.use_cpu or not on_accelerator()  # else torchrun on CPUs runs unconnected processes
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None and self.fp16 is None:
            self.bf16 = cuda and torch.cuda.is_bf16_supported()
            self.fp16 = cuda and not self.bf16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers() if cuda else 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and cuda

    def _choose_checkpointing(self) -> None:
        if self.gradient_checkpointing:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        if hasattr(self, "activation_checkpointing"):  # its name from transformers 5.20 on
            if self.activation_checkpointing is None:
                self.activation_checkpointing = bool(self.gradient_checkpointing)
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing = self.gradient_checkpointing_kwargs = None

    def _choose_trackers(self) -> None:
        trackers = get_available_reporting_integrations()
        if not self.report_to:
            self.report_to = ["tensorboard"] if "tensorboard" in trackers else ["none"]
        for name in self.report_to:
            if name not in (*trackers, "all", "none"):
                raise UserError(
                    f"report_to: {name} is not installed, or not a tracker. Here: {', '.join(trackers) or 'none'}."
                )

    def samples_drawn(self, epoch_length: int) -> float:
        """Samples that training sees in all, from a dataset of `epoch_length`."""
        a_step = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return self.max_steps * a_step if self.max_steps > 0 else self.num_train_epochs * epoch_length

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
