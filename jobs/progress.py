"""Progress of a run: one line for all of its shards, in the run itself and, from the files alone, anywhere else."""

import contextlib
import functools
import logging
import sys
import time
from dataclasses import dataclass

from common.errors import Unreachable, UserError
from common.logs import duration
from jobs.journal import JournalInUse
from jobs.queue import Patient
from jobs.shards import REPORT, SETTINGS, Shard, ShardFolder, reachable, rows_of

logger = logging.getLogger(__name__)
FAILED = "_failed-"
QUIET = 20  # seconds without a file after which a run may be over


class Watch:
    """What the files of a folder say; each is opened once."""

    def __init__(self, folder: ShardFolder):
        self.folder, self.footers = folder, {}

    def update(self, keys: set[str] | None = None) -> dict:
        """{"shards", "rows", "errors", "last", "recent_shards", "recent_rows"}: finished shards (of `keys`, else all), their rows, those
        without a caption, the time of the last one, and the shards and rows finished since the run was last started."""
        names = [name for key, name in self.folder.outputs().items() if keys is None or key in keys]
        new = [name for name in names if name not in self.footers]
        self.footers |= {name: counts for name, (_, counts) in self.folder.footers(new).items()}
        found = [self.footers[name] for name in names if name in self.footers]
        started = (self.folder.read_json(SETTINGS) or {}).get("started", 0)
        recent = [counts for counts in found if counts.get("finished", 0) >= started]
        return {
            "shards": len(found),
            "rows": sum(counts.get("rows", 0) for counts in found),
            "errors": sum(counts.get("errors", 0) for counts in found),
            "last": max((counts["finished"] for counts in recent), default=None),
            "recent_shards": len(recent),
            "recent_rows": sum(counts.get("rows", 0) for counts in recent),
        }


def line(rows: int, total: int | None, shards: int, of: int, errors: int, failed: int, rate: float, unit: str) -> str:
    """The one line. `rate` is in rows per second, 0 where it is not known yet."""
    parts = [f"{rows:,}{f' of {total:,}' if total is not None else ''} {unit}, {shards:,} of {of:,} shards"]
    if rate:
        parts.append(f"{rate:,.1f} {unit}/s")
    parts += [f"{errors:,} without a result"] * bool(errors) + [f"{failed:,} shards failed"] * bool(failed)
    left = (total - rows if total is not None else (of - shards) * rows / shards if shards else 0) / rate if rate else 0
    if left > 0 and shards < of:
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


@dataclass
class Status:
    """What the files of a run say.

    state: finished; running; stopped, if nothing was written for several times as long as a shard takes; or failed, if a
    shard was given up.
    """

    state: str
    rows: int
    of_rows: int | None
    shards: int
    of_shards: int
    without_result: int
    failed: list[str]  # the error of each shard that was given up
    rows_per_second: float
    seconds_left: float | None
    seconds_since_last_write: float | None

    @property
    def exit_code(self) -> int:
        return int(self.state in ("failed", "stopped"))

    def lines(self, unit: str) -> str:
        rate = self.rows_per_second if self.state == "running" else 0.0
        numbers = (self.rows, self.of_rows, self.shards, self.of_shards, self.without_result, len(self.failed))
        parts = [line(*numbers, rate, unit)]
        if self.state == "finished":
            parts.append("finished")
        elif self.seconds_since_last_write is not None:
            parts.append(f"last written {duration(self.seconds_since_last_write)} ago")
        return "\n".join([", ".join(parts), *(f"failed: {error}" for error in self.failed)])


def status(name: str, unit: str) -> str:
    """Progress of the run that writes to --output `name`, and which shards failed, in lines."""
    return look(name).lines(unit)


def look(name: str) -> Status:
    """The status of the run that writes to --output `name`.

    Raises:
        UserError: there is no such run.
    """
    for single in (True, False):
        folder = ShardFolder(name, single)
        if about := folder.read_json(SETTINGS):
            break
    else:
        raise UserError(f"--status {name}: no run has written there.")
    found = Watch(folder).update()
    marks = [folder.read_json(file) for file in folder.files() if file.startswith(FAILED)]
    failed = [mark["error"] for mark in marks if mark]
    seconds = (found["last"] or 0) - about["started"]
    rate = found["recent_rows"] / seconds if seconds > 0 else 0.0
    since = max(0.0, time.time() - found["last"]) if found["last"] else None  # a worker's clock may be ahead
    left = about["shards"] - found["shards"]
    state = "running"
    if folder.read_json(REPORT) is not None and left <= 0:
        state = "finished"
    elif failed:
        state = "failed"
    elif since is not None and since > max(QUIET, 3 * seconds / max(1, found["recent_shards"])):
        state = "stopped"
    rows_left = (
        about["rows"] - found["rows"] if about["rows"] is not None else left * found["rows"] / max(1, found["shards"])
    )
    return Status(
        state, found["rows"], about["rows"], found["shards"], about["shards"], found["errors"], failed, rate,
        rows_left / rate if rate and state == "running" else None, since,
    )  # fmt: skip


def say_left(left: int, shards: int) -> None:
    logger.info("%d of %d shards are left, to other processes of this run or to the same command again", left, shards)


def begin(
    folder: ShardFolder, shards: list[Shard], size: int, unit: str, share: tuple[int, int], settings: dict, carried=None
):
    """(shards that are left for this process, Progress) of a run that begins, or resumes; `share` is (number, count) of
    this process, which takes every count-th shard. `carried(left)` is how many rows of the shards that are left have been
    done before all the same."""
    folder.begin(settings, shards, size)
    number, count = share
    folder.whole_files(list(folder.done(shards[number::count]).values()))
    # Of processes that torchrun started only the first one speaks (common.cli); those of a job array have a log each.
    progress = Progress(
        folder, shards, unit, others=count > 1, quiet=number > 0 and not logger.isEnabledFor(logging.INFO)
    )
    left = set(progress.left)
    mine = [shard for shard in shards[number::count] if shard in left]
    of_this = f"; process {number + 1} of {count} takes {len(mine)} of {len(left)} shards" if count > 1 else ""
    logger.info("%s%s", progress.begun(carried(progress.left) if carried else 0), of_this)
    now = {mark_of(shard): shard for shard in shards}
    for mark in [file for file in folder.files() if file.startswith(FAILED)]:  # tried again, or no longer in the source
        if (now[mark] in mine) if mark in now else number == 0:
            folder.remove(mark)
    return mine, progress


def mark_of(shard: Shard) -> str:
    """The file that says that a shard was given up."""
    return f"{FAILED}{shard.id}{shard.digest}.json"


def failures(folder: ShardFolder, shards: list[Shard]) -> list[str]:
    """What is wrong with each shard that was given up, if no shard is left to other processes: the last one reports it,
    since torchrun stops all processes as soon as one of them ends with an error."""
    done = folder.done(shards)
    marks = {mark_of(shard): shard in done for shard in shards}
    there = [mark for mark in folder.files() if mark in marks]
    failed = [mark for mark in there if not marks[mark]]
    for mark in set(there) - set(failed):  # another process has finished the shard
        folder.remove(mark)
    if len(done) + len(failed) < len(shards):
        return []
    for mark in failed:
        logger.error("failed: %s", (folder.read_json(mark) or {}).get("error"))
    if failed:
        logger.error("%d of %d shards failed; the same command tries them again", len(failed), len(shards))
    return failed


class Progress:
    """The line of a run, while it works.

    Args:
        others: other processes work on the same shards, so progress is read from the files.
        quiet: print nothing: another process does.
    """

    def __init__(self, folder: ShardFolder, shards: list[Shard], unit: str, others: bool = False, quiet: bool = False):
        self.folder, self.shards, self.unit, self.others, self.quiet = folder, shards, unit, others, quiet
        done = folder.done(shards)
        self.left = [shard for shard in shards if shard not in done]
        self.before, self.began = len(done), time.time()
        self.total = rows_of(shards)
        self.rows = self.rows_before = sum(shard.rows or 0 for shard in done)
        self.finished_shards, self.errors, self.failed, self.current = len(done), 0, 0, 0
        self.said, self.watched, self.watch = time.monotonic(), time.monotonic(), Watch(folder)
        self.keys = {shard.id + shard.digest for shard in shards}
        self.terminal = sys.stderr.isatty()

    def begun(self, carried: int) -> str:
        what = f"{self.total:,} {self.unit}" if self.total is not None else f"{len(self.shards):,} shards"
        before = f"{self.rows + carried:,}" if self.total is not None else f"{self.before:,} shards"
        return f"{what}, {before} of them done before"

    def tick(self, current: int) -> None:
        """`current` rows of the shards in progress are finished."""
        self.current = current
        if time.monotonic() - self.said > (0.5 if self.terminal else 30):
            self.say()

    def finished(self, outcome) -> None:
        """A shard is done, or given up, or left to another run."""
        if outcome.error and not isinstance(outcome.raised, JournalInUse):  # else it is the other run's
            self.failed += 1
            write = functools.partial(self.folder.write_json, mark_of(outcome.shard), {"error": str(outcome)})
            Patient(write, functools.partial(reachable, self.folder.name))()
        self.rows += outcome.counts.get("rows", 0)
        self.errors += outcome.counts.get("errors", 0)
        self.finished_shards += not outcome.error
        self.tick(0)

    def say(self) -> None:
        self.said = time.monotonic()
        if self.quiet:
            return
        if self.others and time.monotonic() - self.watched > 10:
            with contextlib.suppress(Unreachable):  # then the numbers are those of the last look
                found = self.watch.update(self.keys)
                self.rows, self.finished_shards, self.errors = found["rows"], found["shards"], found["errors"]
            self.watched = time.monotonic()
        rows = self.rows + self.current
        rate = max(0, rows - self.rows_before) / max(1e-3, time.time() - self.began)
        said = line(rows, self.total, self.finished_shards, len(self.shards), self.errors, self.failed, rate, self.unit)
        if self.terminal:
            print(f"\r{said}\033[K", end="", file=sys.stderr, flush=True)
        else:
            logger.info("%s", said)

    def close(self) -> None:
        if self.terminal and not self.quiet:
            self.say()
            print(file=sys.stderr)
