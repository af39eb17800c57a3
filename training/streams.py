"""A stream in training: pass after pass, in an order that is a function of the seed alone, whatever reads it."""

import itertools

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler


class AsTheyCome(torch.utils.data.Dataset):
    """The data set of a DataLoader whose sampler gives samples in place of their numbers."""

    def __getitem__(self, sample: dict) -> dict:
        return sample


class StreamBatches(BatchRebalanceSampler):
    """This process's batches of a stream, without end; they hold the samples themselves.

    They are read here, in the process that trains, and DataLoader workers only decode them. Each process reads the whole
    stream, and takes its part of what one process would take in a batch of their summed size. So the sequence is the same
    in any number of workers and processes, all processes have equally many batches, and those that a resumed run has had
    are passed over without an image being decoded. A batch may hold the end of a pass and the beginning of the next.

    Of the library's sampler it has only the class, like training.order.TrainingBatches.
    """

    __len__ = None  # unknown, which the Trainer finds out by the TypeError
    ends_with_a_repeated_sample = False

    def __init__(self, stream, args, batch_size: int):
        """stream: data.CaptionStream. args: TrainArguments. batch_size: of one process."""
        self.stream, self.together = stream, batch_size * args.world_size
        self.own = slice(batch_size * args.process_index, batch_size * (args.process_index + 1))

    def __iter__(self):
        samples = self.stream.passes()
        while True:
            yield list(itertools.islice(samples, self.together))[self.own]


class PassEnds(TrainerCallback):
    """What the Trainer does at the end of an epoch (log, evaluate, save), after the step in which a pass ends.

    The Trainer takes all steps of a stream for one epoch, and does the same at the end of the run.
    """

    def __init__(self, trainer):
        self.trainer, self.stream = trainer, trainer.train_dataset

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= state.max_steps  # a run that had ended, started again

    def on_step_end(self, args, state, control, **kwargs):
        before, now = self._samples_until(state.global_step - 1), self._samples_until(state.global_step)
        # The loader is one batch ahead, so a pass that begins right behind this step has begun.
        if state.global_step < state.max_steps and any(before < start <= now for start in self.stream.starts):
            self.on_pass_end(args, control)

    def on_pass_end(self, args, control):
        control.should_log |= args.logging_strategy == "epoch"
        control.should_evaluate |= args.eval_strategy == "epoch"
        control.should_save |= args.save_strategy == "epoch"

    def on_train_end(self, args, state, control, **kwargs):
        """Where the card reads how many passes there were."""
        state.epoch = self.stream.passes_in(self._samples_until(state.global_step))

    def _samples_until(self, step: int) -> int:
        return step * self.trainer.args.gradient_accumulation_steps * self.trainer.batches.together
