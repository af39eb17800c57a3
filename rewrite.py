"""Rewrite captions with an LLM, at any scale, and lose nothing.

    python rewrite.py paragraph INPUT --output OUT.jsonl --llm openai:gpt-4o-mini
                                       all captions of an image into one paragraph
    python rewrite.py fuse INPUT --output OUT/ --llm hf:BAAI/CapsFus-LLaMA
                                       a raw and a synthetic caption into one sentence (CapsFusion)
    torchrun --nproc_per_node 8 rewrite.py fuse INPUT ...

INPUT is any data set that train.py accepts, or a JSON, JSONL, CSV, Parquet or Hub data set with caption columns. OUT keeps
its columns and adds `caption` and `rewrite`: status, reason, warnings, model, prompt, settings. To resume a stopped run,
give the same command again, in any number of processes; rows that were answered are not sent to the LLM again.
--status OUT shows the progress, on this machine or another; millions of rows and clusters: docs/scale.md.
--dry_run estimates the cost first. Keys come from the environment (OPENAI_API_KEY).
"""

from arguments import REWRITE_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(REWRITE_GROUPS, positional="task")  # handles --help and wrong arguments before torch is imported

import functools
import itertools
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

from common.errors import UserError
from common.processes import own_share
from jobs import queue
from jobs.run import Run
from jobs.shards import ShardFolder
from rewriting import output
from rewriting import results as res
from rewriting.backends import is_chat, load_tokenizer, open_backend
from rewriting.checks import Checker
from rewriting.prompts import Prompt, Tokens, load_prompt
from rewriting.rows import Source, inferred_features, open_source, plain_row, tables

logger = logging.getLogger("rewrite")


def main():
    args, llm_args, words = parse(REWRITE_GROUPS, positional="task")
    task, name = words
    llm_args.max_new_tokens = llm_args.max_new_tokens or (80 if task == "fuse" else 256)
    llm_args.max_prompt_tokens = llm_args.max_prompt_tokens or (256 if task == "fuse" else 1024)
    prompt = load_prompt(task, args.prompt_file)
    share = own_share()
    source = open_source(task, name, args)
    check_columns(args, source)
    if args.dry_run:
        print(res.estimate(source, prompt, counting_tokens(args.llm, llm_args), args, llm_args))
        return

    folder = ShardFolder(args.output, single=args.output.endswith(".jsonl"))
    folder.check()
    args.on_reject = args.on_reject or res.FALLBACKS[task]
    if args.rows_per_file is None:
        args.rows_per_file = folder.size(10_000, queue.sharing(args, share), source.read(source.columns))
    shards = res.plan(source, args.rows_per_file, args.max_samples, args.on_reject, args.output_column)
    opened = functools.partial(open_source, task, name, args)
    work = RewriteShards(task, args, llm_args, prompt, opened, source_features(source, folder), folder)
    failed = Run(folder, shards, args.rows_per_file, "rows", share).complete(
        work, lambda: output.finish(source, folder, shards, args, llm_args), args
    )
    if failed:
        sys.exit(1)


class RewriteShards:
    """Rewrites the captions of one shard into its file. Each worker has one instance."""

    def __init__(self, task: str, args, llm_args, prompt: Prompt, opened, features, folder: ShardFolder):
        self.task, self.args, self.llm_args, self.prompt = task, args, llm_args, prompt
        self.opened, self.features, self.folder = opened, features, folder
        self.reasons: Counter = Counter()

    def start(self) -> dict:
        """Open the source and the LLM; return the settings that must not change within a run."""
        self.rows = res.Rows(self.opened())
        self.llm = open_backend(self.args.llm, self.llm_args)
        self.checker = Checker(self.prompt, self.args.language)
        settings = {"llm": self.args.llm, "prompt": self.prompt.sha256, "seed": self.llm_args.seed}
        self.settings = settings | self.llm.settings()
        more = {"task": self.task, "language": self.args.language, "rows_per_file": self.args.rows_per_file}
        return more | self.settings

    def __call__(self, shard, tick) -> dict:
        started, source, report = time.time(), self.rows.source, res.Report()
        with res.Answers(self.folder, shard) as answers:
            tick(len(answers.rows))
            self.ask(shard, answers, tick)
            answers.keep()
            provenance = {"model": self.settings["llm"], "prompt": self.settings["prompt"]}
            provenance["settings"] = json.dumps(self.settings)
            every = self.rows.read(shard, None)
            merged = res.merged(every, source, answers, self.args, provenance, report)

            def counts():
                seconds = round(time.time() - started, 3)
                return {"source": str(shard), "rows": report.rows, "errors": without_text(report), "seconds": seconds,
                        "finished": time.time(), "settings": self.settings, "report": vars(report)}  # fmt: skip

            self.folder.write(shard.file, tables(merged, self.features, self.args.output_column), counts)
        return {"rows": report.rows, "errors": without_text(report)}

    def ask(self, shard, answers: res.Answers, tick) -> None:
        """Rewrite the rows that have no answer yet; each is saved as soon as it passes the checks or is given up."""
        source, limit = self.rows.source, self.llm_args.max_prompt_tokens
        jobs = res.jobs(self.rows.read(shard, source.columns), source, answers, self.prompt, self.llm.tokens, limit)
        finished = self.llm.run(jobs, lambda job, text, ended: self.checker.fault(text, job.inputs, ended))
        for job, outcome in finished:
            answers.add(res.result_row(job, outcome))
            self.reasons[outcome.reason] += 1
            warn_early(self.reasons, answers.path)
            tick(len(answers.rows))


def without_text(report: res.Report) -> int:
    """The rows that have neither a new text nor a caption in its place."""
    return report.statuses["null"] + report.statuses["dropped"]


def check_columns(args, source: Source) -> None:
    """UserError where the output could not hold the rows, before any answer is paid for."""
    for row in itertools.islice(source.read(None), 100):
        for column in {args.output_column, "rewrite"} & set(row):
            raise UserError(f"{source.name} already has a column {column!r}. Rename it, or choose --output_column.")
        if (args.output or "").endswith(".jsonl"):
            plain_row(row)


def source_features(source: Source, folder: ShardFolder):
    """Column types of the input, for Parquet: as declared, or else inferred from its first 1,000 rows."""
    if folder.single:
        return None
    return source.features or inferred_features(list(itertools.islice(source.read(None), 1000)))


def counting_tokens(llm: str, llm_args) -> Tokens:
    """The tokenizer that a dry run counts with: the hf model's own, or the one given for a server."""
    if llm.startswith("hf:"):
        tokenizer = load_tokenizer(llm.removeprefix("hf:"))
        return Tokens(tokenizer, is_chat(tokenizer, llm_args))
    return Tokens(load_tokenizer(llm_args.tokenizer))


def warn_early(reasons: Counter, answers: Path) -> None:
    """Warn early when most texts are rejected."""
    if reasons.total() == 200 and reasons[None] < 100:
        rejected = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common() if reason)
        logger.warning("of the first 200 texts %d were rejected (%s): see %s", 200 - reasons[None], rejected, answers)


if __name__ == "__main__":
    run(main)
