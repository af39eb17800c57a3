"""Which captions may be wrong, listed at the end of a run, and infer.py --only: listed images are captioned again."""

import functools
import json
import logging
import re
import time
from collections import Counter

from captioning.shards import identity
from common.errors import UserError
from common.remote import open_binary
from jobs import queue
from jobs.progress import Progress
from jobs.shards import Shard, ShardFolder, digest_of, reachable
from jobs.tables import table_of
from metrics.coco_caption.text_checks import REFUSAL, repetition

logger = logging.getLogger(__name__)
FLAGGED = "_flagged.txt"
OUTCOME = ("caption", "captions", "error")  # columns of a shard's file


def list_flagged(folder: ShardFolder, contents: dict) -> None:
    """List the images whose captions may be wrong in a file of the folder, and say how many they are. `contents` are the files
    of shards, as ShardFolder.assembling gives them."""
    found, keys, total = Counter(), [], 0
    for name, (schema, counts) in contents.items():
        cut, columns = set(counts.get("cut_rows", ())), ["key", *(set(OUTCOME) & set(schema.names))]
        for number, row in enumerate(folder.rows(name, columns)):
            total += 1
            if fault := fault_of(row, number in cut):
                found[fault] += 1
                keys.append(row["key"])
    if not keys:
        folder.remove(FLAGGED)
        return
    with folder.whole(FLAGGED) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{key}\n" for key in keys)
    logger.info(
        "%d of %d images are flagged (%s): look at them, and ask again with another --prompt and --only %s",
        *(
            len(keys),
            total,
            ", ".join(f"{number} {fault}" for fault, number in found.items()),
            f"{folder.name}/{FLAGGED}",
        ),
    )


def fault_of(row: dict, cut: bool) -> str | None:
    """What may be wrong with the captions of a row."""
    texts = row.get("captions") or [row.get("caption")]
    if row.get("error") is not None:
        return "without a caption"
    if cut:
        return "cut short"
    if not all(text and text.strip() for text in texts):
        return "empty"
    if any(map(repetition, texts)):
        return "repeating themselves"
    return "refusing" if any(map(REFUSAL.search, texts)) else None


def ends_of(name: str) -> set[str]:
    """Of a path, what is left without its first folders: evaluate.py's ids, where a source has none, are such."""
    parts = re.split(r"[/\\]", name)
    return {"/".join(parts[first:]) for first in range(1, len(parts))}


class Again:
    """The images that a list names, among those of a finished run: by their name, the end of it, key or image_id, a line each.

    Raises:
        UserError: a line names no image, or is the end of two names, or the run is not finished.
    """

    def __init__(self, file: str, folder: ShardFolder, shards: list[Shard]):
        with open_binary(file) as lines:
            left = set(filter(None, map(str.strip, lines.read().decode("utf-8-sig").splitlines())))
        done, self.folder, self.name = folder.done(shards), folder, file
        if len(done) < len(shards) or not shards:
            raise UserError(
                f"--only captions images of a finished run again, and {len(shards) - len(done)} of {len(shards)} shards of "
                f"{folder.output} are not there as the source, and columns in prompts, are now: run the command without --only."
            )
        self.id, self.rows, named = digest_of(sorted(left)), {}, set(left)
        by_end: dict[str, list] = {}
        for shard in done:
            for number, row in enumerate(folder.rows(shard.file)):
                columns = json.loads(row["columns"]) if folder.single else row
                names = {row["key"], row["image"], str(columns.get("image_id"))}
                if names & named:
                    left -= names
                    self.rows.setdefault(shard, {})[identity(row)] = number
                for end in ends_of(row["image"]) & named:
                    by_end.setdefault(end, []).append((shard, identity(row), number, row["image"]))
        for end in left & by_end.keys():  # those that are no whole name
            (shard, image, number, name), *others = by_end[end]
            if others:
                raise UserError(f"--only {file}: {end!r} may be {name} or {others[0][3]}: write the whole name.")
            self.rows.setdefault(shard, {})[image] = number
        left -= by_end.keys()
        if left:
            others = f" and {len(left) - 1} other lines" if len(left) > 1 else ""
            raise UserError(f"--only {file}: {min(left)!r}{others} name no image of {folder.output}.")

    def begin(self, settings: dict) -> tuple[list[Shard], Progress]:
        """(shards that are left, Progress), as jobs.queue.run asks for them."""
        footers = self.folder.footers([shard.file for shard in self.rows])
        several = settings.get("num_return_sequences", 1) > 1
        if any(several == ("caption" in schema.names) for schema, _ in footers.values()):
            raise UserError("--only writes as many captions per image as the run did: one, or several.")
        left = [shard for shard in self.rows if not self._is_done(footers[shard.file][1], settings)]
        images = sum(len(self.rows[shard]) for shard in left)
        logger.info("%d images are captioned again, in %d shards", images, len(left))
        return left, Progress(self.folder, left, "images", quiet=True)

    def _is_done(self, counts: dict, settings: dict) -> bool:
        return (self.id, settings) in [(earlier["list"], earlier["settings"]) for earlier in counts.get("again", ())]

    def write(self, shard: Shard, outcomes: dict[int, dict], seconds: float, settings: dict, counted: dict) -> dict:
        """Write a shard's file with the new captions of `outcomes`, {identity: outcome}; returns the counts of its footer."""
        schema, counts = self.folder.footers([shard.file])[shard.file]
        rows, cut = list(self.folder.rows(shard.file)), set(counts.get("cut_rows", ()))
        for image, outcome in outcomes.items():
            number = self.rows[shard][image]
            cut = cut | {number} if outcome.get("cut") else cut - {number}
            rows[number] |= {name: outcome.get(name) for name in OUTCOME if name in schema.names}
        for name in ("tokens_in", "tokens_out"):
            counts[name] = counts.get(name, 0) + counted.get(name, 0)
        counts |= {"errors": sum(row["error"] is not None for row in rows), "cut": len(cut), "cut_rows": sorted(cut)}
        counts |= {"seconds": round(counts["seconds"] + seconds, 3), "finished": time.time()}
        counts["again"] = [*counts.get("again", ()), {"list": self.id, "images": len(outcomes), "settings": settings}]
        self.folder.write(shard.file, iter([table_of(rows, schema.remove_metadata())]), lambda: counts)
        return counts

    def complete(self, work, finish, args) -> list[str]:
        """Caption the images, and then call `finish`, which makes the output anew. Returns the shards that failed."""
        answers = functools.partial(reachable, self.folder.name)
        failed = queue.run(work, self.begin, answers, args, len(self.rows))
        for outcome in failed:
            self.folder.remove(outcome.shard.mark)
            logger.error("failed: %s", outcome)
        if not failed:
            queue.wait_for_servers(finish, answers)
        return list(map(str, failed))
