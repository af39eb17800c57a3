"""What is made from all shards of rewritten captions: the output file, the report and the final log lines."""

import itertools
import json
import logging

from common.errors import UserError
from common.provenance import environment
from common.remote import whole_at
from jobs.chat_server import cost_in_words
from jobs.shards import REPORT, ShardFolder
from rewriting import results as res
from rewriting.checks import REASONS
from rewriting.rows import Source

logger = logging.getLogger("rewrite")


def finish(source: Source, folder: ShardFolder, shards: list, args, llm_args) -> None:
    """Write the report, and the output if it is a single file, once all shards are done. The answers are kept: the same
    command with more rows or another --on_reject does not ask for them again."""
    with folder.assembling(shards) as contents:
        if contents is not None:
            say(folder, assemble(source, folder, shards, contents, args, llm_args))


def assemble(source: Source, folder: ShardFolder, shards: list, contents: dict, args, llm_args) -> dict:
    """Write them; returns the summary of the report."""
    names = list(contents)
    for name in set(folder.outputs().values()) - set(names):  # left by fewer rows, or another --on_reject
        folder.remove(name)
    counts = [counts for _, counts in contents.values()]
    if [shard["rows"] for shard in counts] != [shard.rows for shard in shards]:
        raise UserError(f"{folder.name}: a file does not have the rows of its shard. Delete it and start again.")
    if folder.single:
        bring_together(folder, names)
    report = res.Report()
    for shard in counts:
        report.merge(shard["report"])
    summary = report.summary(llm_args.price_in, llm_args.price_out)
    summary |= res.vocabulary(rows_of(folder, names), source, args.output_column)
    folder.write_json(REPORT, {**summary, "settings": counts[0]["settings"], **environment()})
    return summary


def bring_together(folder: ShardFolder, names: list[str]) -> None:
    """A single .jsonl: the lines of all shards, one shard after the other."""
    with whole_at(folder.output) as target, open(target, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row['line']}\n" for name in names for row in folder.rows(name))


def rows_of(folder: ShardFolder, names: list[str]):
    """The rows of the output, in their order."""
    rows = itertools.chain.from_iterable(map(folder.rows, names))
    return (json.loads(row["line"]) for row in rows) if folder.single else rows


def say(folder: ShardFolder, summary: dict) -> None:
    logger.info("%s: %d rows verified, each once; %s", folder.output, summary["rows"], in_words(summary["status"]))
    for reason, number in summary["rejected"].items():
        logger.info("  rejected: %d %s (%s)", number, reason, REASONS[reason])
    logger.info("  %d prompt tokens, %d written%s", *summary["tokens"].values(), cost_in_words(summary["cost"]))
    if summary["most_frequent_text"] > 0.05 * summary["vocabulary_and_frequency_of_first_rows"] > 5:
        logger.warning(
            "one text is repeated in %d rows: look at the samples in the report", summary["most_frequent_text"]
        )


def in_words(counts: dict) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items())
