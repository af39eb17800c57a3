"""SIGTERM, SIGUSR1 and Ctrl-C in the middle of training: spot machines and batch systems (Slurm's --signal=USR1@120) send one
some time before they kill a job."""

import contextlib
import logging
import signal
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
EVALUATION_DUE = "evaluation_due"  # a file in a checkpoint that was saved before the evaluation of its step


class Stopped(KeyboardInterrupt):
    """The end of a run that a signal has stopped, for common.cli, which makes it the exit code."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = number


class EvaluationStopped(BaseException):
    """Raised by the signal handler in the middle of an evaluation. No `except Exception` on the way may catch it."""


class StopOnSignal(TrainerCallback):
    """On one of SIGNALS the step in progress is finished, a checkpoint saved, and the run ended: the same command resumes from
    there, to the same weights. A second Ctrl-C ends it at once. In a thread, as of a notebook, signals are not heard.

    Several processes stop after the same step. An evaluation that is due first is left to the next start, which finds
    EVALUATION_DUE in the checkpoint. One in progress is interrupted too, but only of a single process: several cannot
    leave a collective operation together, and finish it first.
    """

    def __init__(self):
        self.stopping = self.may_break_off = False
        self.asked = 0  # the number of the signal
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs):
        heard = SIGNALS if threading.current_thread() is threading.main_thread() else []
        self.before = {number: signal.signal(number, self._ask) for number in heard}
        if args.world_size > 1:  # on the host: asking through the GPU would make every step wait for it
            self.group = torch.distributed.new_group(backend="gloo")

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch != int(state.epoch):  # else on_epoch_end, which knows whether an evaluation is due, comes next
            self._stop_if_asked(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_if_asked(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        if not self.stopping:
            return
        logger.warning("%s: saved checkpoint-%d", signal.Signals(self.asked).name, state.global_step)
        if self.group is not None:
            torch.distributed.barrier(self.group)  # until the checkpoint is written
            torch.distributed.destroy_process_group()
        raise Stopped(self.asked)

    @contextlib.contextmanager
    def breaking_off(self):
        """Inside, a signal raises EvaluationStopped, at once if it came before."""
        self.may_break_off = signal.getsignal(signal.SIGTERM) == self._ask and self.group is None
        try:
            if self.may_break_off and self.asked:
                raise EvaluationStopped
            yield
        finally:
            self.may_break_off = False

    def _ask(self, number, _):
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if number == signal.SIGINT and not self.may_break_off:
            logger.warning("stopping: a checkpoint is saved after this step. Ctrl-C again stops at once")
        if self.may_break_off:
            self.may_break_off = False
            raise EvaluationStopped

    def _stop_if_asked(self, args, state, control):
        asked = torch.tensor(self.asked)
        if self.group is not None:
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self.group)
        self.asked = int(asked)
        if self.asked:
            self.stop(args, state, control, evaluation_due=control.should_evaluate)

    def stop(self, args, state, control, *, evaluation_due: bool) -> None:
        """Makes the Trainer save, and nothing else; on_save then ends the run."""
        self.stopping, control.should_evaluate, control.should_save = True, False, True
        if evaluation_due and args.should_save:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / EVALUATION_DUE).touch()
