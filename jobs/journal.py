"""A journal: rows that a process appends as they are finished, so that a kill loses none."""

import json
from pathlib import Path

import xxhash

from common.caches import cache_folder
from common.errors import UserError
from common.locks import Busy, hold
from jobs.shards import Shard, ShardFolder

ANSWERS = "_answers"


class JournalInUse(UserError):
    of_one_shard = True


class Journal:
    """A file of JSON lines, opened to append to; `rows` are those that it had.

    Raises:
        JournalInUse: another run has it.
    """

    def __init__(self, path: Path):
        try:
            self.file, _ = hold(path)  # released when the process ends, however that happens
        except Busy:
            raise JournalInUse(f"{path}: another run is writing it. Let it finish, or stop it.") from None
        self.rows, end = [], 0
        with open(path, "r+b") as lines:
            for line in lines:
                try:
                    self.rows.append(json.loads(line[:-1]))  # a line that a kill cut short has no end to take away
                except ValueError:
                    break
                end += len(line)
            lines.truncate(end)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, row: dict) -> None:
        """Append one row, so that it survives this process."""
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()


def answers_of(folder: ShardFolder, shard: Shard) -> Path:
    """Where the journal of a shard's answers is: in the output's _answers folder; for a remote output in the local cache."""
    place = Path(folder.path) / ANSWERS
    if folder.remote:
        name = json.dumps({"folder": folder.name}, ensure_ascii=False)
        place = cache_folder() / "answers" / xxhash.xxh3_64_hexdigest(name.encode())
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{shard.id}.jsonl"
