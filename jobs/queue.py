"""Distributes shards: to this process and its peers (`local`), or to actors of a Ray cluster (`ray`).

`work(shard, tick)` makes the output of a shard, calls `tick(n)` when n of its rows are done, and returns its counts.
A shard that fails is retried once after all others are done, and then given up; an error that would affect every shard
ends the run.
"""

import errno
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
TRIES = 2
IN_A_ROW = 5  # consecutive unexpected errors that end a run: the shards are not the problem


@dataclass
class Outcome:
    shard: object
    counts: dict = field(default_factory=dict)
    error: str | None = None  # in one line
    ends_run: bool = False
    expected: bool = True
    lost: bool = False  # its worker died
    trace: str = ""
    raised: Exception | None = None  # the error itself, if it was raised in this process

    def __str__(self) -> str:
        return self.error if self.shard.label in self.error else f"{self.shard}: {self.error}"


def attempt(work: Callable, shard, tick: Callable[[int], None]) -> Outcome:
    """The outcome of a shard; errors are returned."""
    try:
        return Outcome(shard, work(shard, tick))
    except Exception as error:
        disk_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        ends_run = disk_full or (isinstance(error, UserError) and not error.of_one_shard)
        message = str(error).strip().splitlines()[-1:] or [""]
        text = message[0] if isinstance(error, UserError) else f"{type(error).__name__}: {message[0]}"
        expected = isinstance(error, UserError | OSError)
        trace = "" if expected else traceback.format_exc()
        return Outcome(shard, {}, text, ends_run, expected, trace=trace, raised=error)


class Queue:
    """The shards that are left, and the outcomes of the others."""

    def __init__(self, shards: list, report: Callable[[Outcome], None]):
        self.left, self.again = list(reversed(shards)), []
        self.tries: dict = {}
        self.report, self.failed, self.unexpected = report, [], 0

    def empty(self) -> bool:
        return not self.left and not self.again

    def take(self):
        """The next shard, or None."""
        if not self.left:
            self.left, self.again = list(reversed(self.again)), []
        return self.left.pop() if self.left else None

    def give(self, outcome: Outcome) -> None:
        """Record the outcome of a shard. Raises an error that ends the run."""
        if outcome.error is None:
            self.unexpected = 0
        else:
            self.unexpected += not outcome.expected
            if outcome.trace:
                logger.warning("%s: %s", outcome.shard, outcome.trace)
            if outcome.ends_run or self.unexpected == IN_A_ROW:
                raise outcome.raised or UserError(outcome.error)
            self.tries[outcome.shard] = self.tries.get(outcome.shard, 0) + 1
            if self.tries[outcome.shard] < (2 * TRIES if outcome.lost else TRIES):
                logger.warning("%s. It will be retried", str(outcome).rstrip("."))
                self.again.append(outcome.shard)
                return
            self.failed.append(outcome)
        self.report(outcome)


def run(work, begin: Callable, reachable: Callable, args, most: int) -> list[Outcome]:
    """Work on the shards of a run. Returns those that failed here.

    Args:
        work: has `start()`, which returns the settings of the run, and is called with (shard, tick).
        begin: called with the settings; returns (the shards that are left, Progress).
        reachable: whether the servers that a shard needs answer.
        args: --engine and its flags.
        most: the largest possible number of shards.
    """
    if args.engine == "ray":
        from jobs import ray_engine

        return ray_engine.run(work, begin, reachable, args, most)
    shards, progress = begin(work.start())
    queue = Queue(shards, progress.finished)
    patient = Patient(work, reachable)
    while (shard := queue.take()) is not None:
        queue.give(attempt(patient, shard, progress.tick))
    progress.close()
    return queue.failed


def sharing(args, share: tuple[int, int]) -> tuple[int, int]:
    """(number, count) of those who share the work; a Ray cluster may have more workers than that."""
    return (0, args.workers or 8) if args.engine == "ray" else share


class Patient:
    """Work that waits for a server that does not answer, up to ten minutes in all, instead of failing, and tries again
    if the server is back by then. Building the output from all shards is such work, too, without a shard:
    `Patient(finish, reachable)()`.

    Args:
        reachable: whether the servers that a shard needs answer; for None, those of the outputs.
    """

    def __init__(self, work: Callable, reachable: Callable[[object], bool], patience: float = 600):
        self.work, self.reachable, self.patience = work, reachable, patience

    def __call__(self, *args):
        shard, waited, again = args[0] if args else None, 0.0, 0
        while True:
            try:
                return self.work(*args)
            except Exception as error:
                if isinstance(error, UserError) and not error.of_one_shard:
                    raise
                pause = 2.0
                if self.reachable(shard):  # also if it came back while its client was still trying
                    if not isinstance(error, Unreachable) or again == TRIES:
                        raise
                    again += 1
                    logger.warning("%s: %s. Trying again", shard or "the output", str(error).strip().splitlines()[-1])
                    time.sleep(pause)
                    continue
                while not self.reachable(shard):
                    if waited >= self.patience:
                        raise
                    logger.warning("%s: %s. Waiting for it", shard or "the output", str(error).strip().splitlines()[-1])
                    time.sleep(pause)
                    waited, pause = waited + pause, min(60, 2 * pause)
