"""The shards that are left to this process, or to a Ray cluster: which is next, which is tried again, what ends the run.

Each process of torchrun or of a job array takes every n-th shard (jobs.run): those of a process that died are left until the same
command is started again. Ray replaces a dead worker (jobs.ray_engine), and a dead worker of the DataLoader is an error of its shard.

`work(shard, tick)` makes the output of a shard, calls `tick(n)` when n of its rows are done, and returns its counts.
A shard that fails is retried once after all others are done, and then given up; an error that would affect every shard
ends the run.
"""

import errno
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import Unreachable, UserError
from jobs.journal import JournalInUse

logger = logging.getLogger(__name__)
TRIES = 2
IN_A_ROW = 5  # consecutive unexpected errors that end a run: the shards are not the problem
PAUSE, LONGEST_PAUSE, LONGEST_WAIT = 2.0, 60.0, 600.0  # seconds between questions to a server that does not answer


@dataclass
class Outcome:
    shard: object
    counts: dict = field(default_factory=dict)
    error: str | None = None  # in one line
    ends_run: bool = False
    expected: bool = True
    lost: bool = False  # its worker died
    in_use: bool = False  # another run is working on it
    trace: str = ""
    raised: Exception | None = None  # the error itself, if it was raised in this process

    def __str__(self) -> str:
        return self.error if self.shard.label in self.error else f"{self.shard}: {self.error}"


def attempt(call: Callable[[], dict], shard) -> Outcome:
    """The outcome of a shard, whose counts `call()` returns; errors are returned."""
    try:
        return Outcome(shard, call())
    except Exception as error:
        expected = isinstance(error, UserError | OSError)
        return Outcome(
            shard,
            error=_last_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_last_line(error)}",
            ends_run=_ends_run(error),
            expected=expected,
            in_use=isinstance(error, JournalInUse),
            trace="" if expected else traceback.format_exc(),
            raised=error,
        )


def work_on(work: Callable, shard, tick: Callable[[int], None], reachable: Callable) -> Outcome:
    return attempt(lambda: wait_for_servers(lambda: work(shard, tick), reachable, shard), shard)


def wait_for_servers(call: Callable, reachable: Callable, shard=None):
    """`call()`, again after an error if a server was away meanwhile. It is waited for, up to ten minutes in all.

    Args:
        reachable: called with the shard; whether the servers that it needs answer, without a shard those of the outputs.
    """
    waited, tries = 0.0, 0
    while True:
        try:
            return call()
        except Exception as error:
            if _ends_run(error):
                raise
            pause, trouble = PAUSE, f"{shard or 'the output'}: {_last_line(error)}"
            while not reachable(shard):
                if waited >= LONGEST_WAIT:
                    raise
                logger.warning("%s. Waiting for it", trouble)
                time.sleep(pause)
                waited, pause = waited + pause, min(LONGEST_PAUSE, 2 * pause)
            if pause == PAUSE:  # it answers; maybe it came back while its client was still trying
                if not isinstance(error, Unreachable) or tries == TRIES:
                    raise
                tries += 1
                logger.warning("%s. Trying again", trouble)
                time.sleep(pause)


def _ends_run(error: Exception) -> bool:
    """Whether it would affect every shard: a full disk, or a mistake of the user's."""
    disk_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return disk_full or not getattr(error, "of_one_shard", True)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


class Queue:
    """The shards that are left, and the outcomes of the others."""

    def __init__(self, shards: list, report: Callable[[Outcome], None]):
        self.left, self.tries = deque(shards), Counter()
        self.report, self.failed, self.unexpected = report, [], 0

    def empty(self) -> bool:
        return not self.left

    def take(self):
        """The next shard."""
        return self.left.popleft()

    def give(self, outcome: Outcome) -> None:
        """Record the outcome of a shard. Raises an error that ends the run."""
        if outcome.error is None:
            self.unexpected = 0
            self.report(outcome)
            return
        self.unexpected += not outcome.expected
        if outcome.trace:
            logger.warning("%s: %s", outcome.shard, outcome.trace)
        if outcome.ends_run or self.unexpected == IN_A_ROW:
            raise outcome.raised or UserError(outcome.error)
        self.tries[outcome.shard] += 1
        if self.tries[outcome.shard] < (2 * TRIES if outcome.lost else TRIES):
            logger.warning("%s. It will be retried", str(outcome).rstrip("."))
            self.left.append(outcome.shard)
        else:
            self.failed.append(outcome)
            self.report(outcome)


def run(work, begin: Callable, reachable: Callable, args, max_shards: int) -> list[Outcome]:
    """Work on the shards of a run. Returns those that failed here.

    Args:
        work: has `start()`, which returns the settings of the run, and is called with (shard, tick).
        begin: called with the settings; returns (the shards that are left, Progress).
        reachable: whether the servers that a shard needs answer.
        args: --engine and its flags.
        max_shards: the largest possible number of shards.
    """
    if args.engine == "ray":
        from jobs import ray_engine

        return ray_engine.run(work, begin, reachable, args, max_shards)
    shards, progress = begin(work.start())
    queue = Queue(shards, progress.finished)
    while not queue.empty():
        queue.give(work_on(work, queue.take(), progress.tick, reachable))
    progress.close()
    return queue.failed


def sharing(args, share: tuple[int, int]) -> tuple[int, int]:
    """(number, count) of those who share the work; a Ray cluster may have more workers than that."""
    return (0, args.workers or 8) if args.engine == "ray" else share
