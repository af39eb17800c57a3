"""Progress of a run: one line for all of its shards, in the run itself and, from the files alone, anywhere else."""

import contextlib
import functools
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import Unreachable, UserError
from common.logs import duration
from common.text import counted
from jobs.queue import wait_for_servers
from jobs.shards import REPORT, SETTINGS, Shard, ShardFolder, reachable, rows_of

logger = logging.getLogger(__name__)
QUIET = 20  # seconds without a file after which a run may be over
LOOK_AGAIN = 10  # seconds until other processes' files are looked for again


def total_of(counts: Iterable[dict], names: tuple[str, ...] = ("rows", "errors")) -> Counter:
    """The number of finished "shards", and what they have together, by these names, of the counts of each."""
    total = Counter()
    for shard in counts:
        total.update({name: shard.get(name, 0) for name in names}, shards=1)
    return total


def line(done: Counter, rows: int | None, shards: int, failed: int, rate: float, unit: str) -> str:
    """The one line about the shards that are `done`, of `shards` with `rows` rows, if these are known. `rate` is in rows
    per second, 0 where it is not known."""
    seconds = seconds_left(done, rows, shards, rate)
    parts = [
        f"{done['rows']:,} of {counted(rows, unit)}" if rows is not None else counted(done["rows"], unit),
        f"{done['shards']:,} of {counted(shards, 'shards')}",
        rate and f"{rate:,.1f} {unit}/s",
        done["errors"] and f"{done['errors']:,} without a result",
        failed and f"{counted(failed, 'shards')} failed",
        seconds and done["shards"] < shards and f"about {duration(seconds)} left",
    ]
    return ", ".join(filter(None, parts))


def seconds_left(done: Counter, rows: int | None, shards: int, rate: float) -> float | None:
    """None where the rate is not known; where the number of rows is not, shards are taken for equally long."""
    if not rate:
        return None
    of_shards = (shards - done["shards"]) * done["rows"] / max(1, done["shards"])
    return max(0.0, of_shards if rows is None else rows - done["rows"]) / rate


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
        done = Counter(rows=self.rows, shards=self.shards, errors=self.without_result)
        text = line(done, self.of_rows, self.of_shards, len(self.failed), rate, unit)
        if self.state == "finished":
            text += ", finished"
        elif self.seconds_since_last_write is not None:
            text += f", last written {duration(self.seconds_since_last_write)} ago"
        return "\n".join([text, *(f"failed: {error}" for error in self.failed)])


def status(output: str, unit: str) -> str:
    """Progress of the run that writes to --output, and which shards failed, in lines."""
    return look(output).lines(unit)


def look(output: str) -> Status:
    """The status of the run that writes to --output.

    Raises:
        UserError: there is no such run.
    """
    folder = ShardFolder(output, single=True)
    about = folder.read_json(SETTINGS)
    if about is None:
        folder = ShardFolder(output, single=False)
        about = folder.read_json(SETTINGS)
    if about is None:
        raise UserError(f"--status {output}: no run has written there.")
    counts = [counts for _, counts in folder.footers(list(folder.outputs().values())).values()]
    done, rows, shards, started = total_of(counts), about["rows"], about["shards"], about["started"]
    recent = [shard for shard in counts if shard.get("finished", 0) >= started]
    last = max((shard["finished"] for shard in recent), default=started)
    rate = total_of(recent)["rows"] / max(1e-3, last - started)
    since = max(0.0, time.time() - last) if recent else None  # a worker's clock may be ahead
    failed = list(folder.failed().values())
    if done["shards"] >= shards and folder.read_json(REPORT) is not None:
        state = "finished"
    elif failed:
        state = "failed"
    elif recent and since > max(QUIET, 3 * (last - started) / len(recent)):
        state = "stopped"
    else:
        state = "running"
    left = seconds_left(done, rows, shards, rate) if state == "running" else None
    return Status(state, done["rows"], rows, done["shards"], shards, done["errors"], failed, rate, left, since)


class Progress:
    """The line of a run, while it works: what the files say, and what this process has finished since they were read.

    Args:
        contents: those of files that were opened before, as ShardFolder.footers returns them.
        quiet: print nothing: another process does.
    """

    def __init__(self, folder: ShardFolder, shards: list[Shard], unit: str, contents=(), quiet: bool = False):
        self.folder, self.shards, self.unit, self.contents, self.quiet = folder, shards, unit, dict(contents), quiet
        self.rows = rows_of(shards)
        done = folder.done(shards)
        self.done = Counter(shards=len(done), rows=sum(shard.rows or 0 for shard in done))
        self.rows_before, self.failed, self.rows_of_current = self.done["rows"], 0, 0
        self.began = self.said = self.looked = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def tick(self, rows: int) -> None:
        """`rows` of the shards in progress are finished."""
        self.rows_of_current = rows
        if time.monotonic() - self.said > (0.5 if self.terminal else 30):
            self.say()

    def finished(self, outcome) -> None:
        """A shard is done, or given up, or left to another run."""
        if not outcome.error:
            self.done += total_of([outcome.counts])
        elif not outcome.in_use:
            self.failed += 1
            mark = functools.partial(self.folder.write_json, outcome.shard.mark, {"error": str(outcome)})
            wait_for_servers(mark, functools.partial(reachable, self.folder.name))
        self.tick(0)

    def say(self) -> None:
        self.said = time.monotonic()
        if self.quiet:
            return
        if self.said - self.looked > LOOK_AGAIN:
            with contextlib.suppress(Unreachable):  # then the numbers are those of the last look
                files = set(self.folder.done(self.shards).values())
                self.contents |= self.folder.footers(list(files - self.contents.keys()))
                self.done = total_of(counts for _, counts in self.contents.values())
            self.looked = time.monotonic()
        done = self.done + Counter(rows=self.rows_of_current)
        rate = max(0, done["rows"] - self.rows_before) / max(1e-3, self.said - self.began)
        text = line(done, self.rows, len(self.shards), self.failed, rate, self.unit)
        if self.terminal:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        else:
            logger.info("%s", text)

    def close(self) -> None:
        if self.terminal and not self.quiet:
            self.say()
            print(file=sys.stderr)
