"""A run of infer.py or rewrite.py: its shards are worked on, and its output is made, in any number of processes."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from common.text import counted
from jobs import queue
from jobs.progress import Progress
from jobs.shards import Shard, ShardFolder, reachable, rows_of

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """All shards of a run, and which process of it this is."""

    folder: ShardFolder
    shards: list[Shard]
    size: int  # rows per shard
    unit: str  # what a row is called
    share: tuple[int, int]  # (number, count) of this process, which takes every count-th shard
    # called with the shards that are left; how many of their rows have been done before all the same
    carried: Callable[[list[Shard]], int] = field(default=lambda left: 0)

    def complete(self, work, finish: Callable[[], object], args) -> list[str]:
        """Work on the shards that are left, then call `finish`, which makes the output once all are there. Returns the
        names of shards that failed, if this process is to report them."""
        answers = functools.partial(reachable, self.folder.name)
        queue.run(work, self.begin, answers, args, len(self.shards))
        queue.wait_for_servers(finish, answers)
        return queue.wait_for_servers(self.failures, answers)

    def begin(self, settings: dict) -> tuple[list[Shard], Progress]:
        """(shards that are left for this process, Progress) of a run that begins, or resumes."""
        self.folder.begin(settings, self.shards, self.size)
        number, count = self.share
        mine = self.shards[number::count]
        contents = self.folder.whole_files(list(self.folder.done(mine).values()))
        # Of processes that torchrun started only the first one speaks (common.cli); those of a job array have a log each.
        quiet = not logger.isEnabledFor(logging.INFO)
        progress = Progress(self.folder, self.shards, self.unit, contents, quiet=quiet)
        done = self.folder.done(self.shards)
        left = [shard for shard in mine if shard not in done]
        if not quiet:
            self._say_begun(done, left)
        not_here = {shard.mark for shard in self.shards} - {shard.mark for shard in left}
        for mark in self.folder.failed().keys() - not_here:  # tried again, or no longer in the source
            self.folder.remove(mark)
        return left, progress

    def _say_begun(self, done: dict, left_here: list[Shard]) -> None:
        left = [shard for shard in self.shards if shard not in done]
        rows, (number, count) = rows_of(self.shards), self.share
        if rows is None:
            text, before = counted(len(self.shards), "shards"), len(done)
        else:
            text, before = counted(rows, self.unit), rows - rows_of(left) + self.carried(left)
        text += f", {before:,} of them done before"
        if count > 1:
            text += f"; process {number + 1} of {count} takes {len(left_here)} of {counted(len(left), 'shards')}"
        logger.info("%s", text)

    def failures(self) -> list[str]:
        """What is wrong with each shard that was given up, if no shard is left to other processes: the last one reports
        it, since torchrun stops all processes as soon as one of them ends with an error."""
        done, errors = self.folder.done(self.shards), self.folder.failed()
        for mark in errors.keys() & {shard.mark for shard in done}:  # another process has finished the shard
            self.folder.remove(mark)
        failed = [shard.mark for shard in self.shards if shard.mark in errors and shard not in done]
        if len(done) + len(failed) < len(self.shards):
            return []
        for mark in failed:
            logger.error("failed: %s", errors[mark])
        if failed:
            total = len(self.shards)
            logger.error(
                "%d of %s failed; the same command tries again what failed", len(failed), counted(total, "shards")
            )
        return failed
