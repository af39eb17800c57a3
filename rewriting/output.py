"""What is made from all shards of rewritten captions: the output file, the report and the final log lines."""

import itertools
import json
import logging
import os
import tempfile
from pathlib import Path

from common.errors import UserError
from common.files import whole
from common.provenance import environment
from common.remote import is_remote, upload
from jobs.progress import say_left
from jobs.shards import REPORT, ShardFolder
from rewriting import results as res
from rewriting.checks import REASONS
from rewriting.rows import Source

logger = logging.getLogger("rewrite")


def finish(source: Source, folder: ShardFolder, shards: list, args, llm_args) -> None:
    """Write the report, and the output if it is a single file, once all shards are done. The answers are kept: the same
    command with more rows or another --on_reject does not ask for them again."""
    contents = folder.whole_files(list(folder.done(shards).values()))
    if len(contents) < len(shards):
        say_left(len(shards) - len(contents), len(shards))
        return
    names = list(contents)
    for name in set(folder.outputs().values()) - set(names):  # left by fewer rows, or another --on_reject
        folder.remove(name)
    counts = [counts for _, counts in contents.values()]
    if [each["rows"] for each in counts] != [shard.rows for shard in shards]:
        raise UserError(f"{folder.name}: a file does not have the rows of its shard. Delete it and start again.")
    if folder.single:
        bring_together(folder, names)
    report = res.Report()
    for each in counts:
        report.merge(each["report"])
    summary = report.summary(llm_args.price_in, llm_args.price_out)
    summary |= res.vocabulary(rows_of(folder, names), source, args.output_column)
    folder.write_json(REPORT, {**summary, "settings": counts[0]["settings"], **environment()})
    say(folder, summary)


def bring_together(folder: ShardFolder, names: list[str]) -> None:
    """A single .jsonl: the lines of all shards, one shard after the other."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output.jsonl" if folder.remote else Path(folder.output)
        with whole(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for name in names:
                for batch in folder.read(name):
                    file.writelines(f"{line}\n" for line in batch["line"].to_pylist())
            file.flush()
            os.fsync(file.fileno())
        if is_remote(folder.output):
            upload(output, folder.output)


def rows_of(folder: ShardFolder, names: list[str]):
    """The rows of the output, in their order."""
    for batch in itertools.chain.from_iterable(map(folder.read, names)):
        yield from map(json.loads, batch["line"].to_pylist()) if folder.single else batch.to_pylist()


def say(folder: ShardFolder, summary: dict) -> None:
    logger.info("%s: %d rows verified, each once; %s", folder.output, summary["rows"], in_words(summary["status"]))
    for reason, number in summary["rejected"].items():
        logger.info("  rejected: %d %s (%s)", number, reason, REASONS[reason])
    logger.info("  %d prompt tokens, %d written%s", *summary["tokens"].values(),
                "" if summary["cost"] is None else f", cost {summary['cost']:.2f}")  # fmt: skip
    if summary["most_frequent_text"] > 0.05 * summary["vocabulary_and_frequency_of_first_rows"] > 5:
        logger.warning(
            "one text is repeated in %d rows: look at the samples in the report", summary["most_frequent_text"]
        )


def in_words(counts: dict) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items())
