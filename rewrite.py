"""Rewrite captions with an LLM, at any scale, and lose nothing.

    python rewrite.py paragraph INPUT --output OUT.jsonl --llm openai:gpt-4o-mini
                                       all captions of an image into one paragraph
    python rewrite.py fuse INPUT --output OUT/ --llm hf:BAAI/CapsFus-LLaMA
                                       a raw and a synthetic caption into one sentence (CapsFusion)
    torchrun --nproc_per_node 8 rewrite.py fuse INPUT ...

INPUT is whatever train.py trains on, or JSON, JSONL, CSV, Parquet or a Hub set with columns of captions. OUT keeps its
columns, and adds `caption` and `rewrite`: status, reason, warnings, model, prompt, settings. A run that was stopped goes
on when the same command is given again, in any number of processes; no row that was finished is asked for again.
--dry_run tells first what it would cost. Keys come from the environment (OPENAI_API_KEY).
"""

from arguments import REWRITE_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(REWRITE_GROUPS, positional="task")  # answers --help and mistakes before torch is imported

import itertools
import json
import logging
from collections import Counter
from datetime import timedelta
from pathlib import Path

from common.errors import UserError
from common.files import write_json
from common.processes import processes, show_progress
from common.provenance import environment
from common.resumable import check_settings, open_part, parts, settings_file, write_row
from rewriting import results as res
from rewriting.backends import load_tokenizer, open_backend
from rewriting.checks import REASONS, Checker
from rewriting.prompts import Tokens, load_prompt
from rewriting.rows import open_source, write_rows

logger = logging.getLogger("rewrite")


def main():
    args, llm_args, (task, name) = parse(REWRITE_GROUPS, positional="task")
    llm_args.max_new_tokens = llm_args.max_new_tokens or (80 if task == "fuse" else 256)
    llm_args.max_prompt_tokens = llm_args.max_prompt_tokens or (256 if task == "fuse" else 1024)
    prompt = load_prompt(task, args.prompt_file)
    state = processes(patience=timedelta(days=7))  # who is done waits for the others
    with state.main_process_first():
        source = open_source(task, name, args)
    if args.dry_run:
        print(res.estimate(source, prompt, counting_tokens(args.llm, llm_args), args, llm_args))
        return

    output = check_output(args, source)
    llm = open_backend(args.llm, llm_args)
    settings = {"llm": args.llm, "prompt": prompt.sha256, "seed": llm_args.seed, **llm.settings()}
    run_settings = {"task": task, "language": args.language, **settings}
    if parts(output):
        check_settings(output, run_settings)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(settings_file(output), run_settings)

    before = res.Results(output)
    left = sum(1 for _ in res.rows_left(source, before, args.max_samples)) if not args.streaming else None
    logger.info("%s rows to rewrite, %d were before", "unknown" if left is None else left, before.count)
    state.wait_for_everyone()  # all have read what was done before anyone adds to it
    share = itertools.islice(
        res.rows_left(source, before, args.max_samples), state.process_index, None, state.num_processes
    )
    jobs = res.jobs(share, prompt, llm.tokens, llm_args.max_prompt_tokens)
    total = None if left is None else left // state.num_processes
    with open_part(output, state.process_index) as part:
        write_texts(part, llm, jobs, Checker(prompt, args.language), total, output)
    before.close()
    state.wait_for_everyone()
    if state.is_main_process:
        bring_together(task, source, output, args, llm_args, settings)


def write_texts(part, llm, jobs, checker: Checker, total: int | None, output: Path) -> None:
    """Append the text of each job to `part` as soon as it passes the checks or is given up."""
    reasons: Counter = Counter()
    finished = llm.run(jobs, lambda job, text, ended: checker.fault(text, job.inputs, ended))
    for job, outcome in show_progress(finished, total, "rewriting"):
        write_row(part, res.result_row(job, outcome))
        reasons[outcome.reason] += 1
        warn_early(reasons, output)


def check_output(args, source) -> Path:
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist.")
    if output.is_dir() == (output.suffix == ".jsonl") and output.exists():
        raise UserError(f"--output {output}: a name ending in .jsonl is a file, any other a folder of Parquet files.")
    if output.exists() and not settings_file(output).exists():
        raise UserError(f"--output {output} is there already, and no run of rewrite.py made it. Name another.")
    for column in (args.output_column, "rewrite"):
        if column in next(source.read(None)):
            raise UserError(f"{source.name} has a column {column!r} already. Rename it, or choose --output_column.")
    return output


def counting_tokens(llm: str, llm_args) -> Tokens:
    """What a dry run counts with: hf's own tokenizer, or the one named for a server."""
    if llm.startswith("hf:"):
        tokenizer = load_tokenizer(llm.removeprefix("hf:"))
        return Tokens(tokenizer, tokenizer.chat_template is not None if llm_args.chat is None else llm_args.chat)
    return Tokens(load_tokenizer(llm_args.tokenizer) if llm_args.tokenizer else None)


def warn_early(reasons: Counter, output: Path) -> None:
    """Says while there is time when most texts are rejected."""
    if reasons.total() == 200 and reasons[None] < 100:
        rejected = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common() if reason)
        logger.warning(
            "of the first 200 texts %d were rejected (%s): see %s.part-0", 200 - reasons[None], rejected, output
        )


def bring_together(task: str, source, output: Path, args, llm_args, settings: dict) -> None:
    """The output, made of the input and all parts; then the report. The parts stay: they are what a further run of the
    same command (with more rows, another --on_reject) resumes from."""
    provenance = {"model": settings["llm"], "prompt": settings["prompt"], "settings": json.dumps(settings)}
    results, report = res.Results(output), res.Report()
    rows = res.merged(source, results, task, args, provenance, report)
    write_rows(rows, output, source.features, args.output_column, args.rows_per_file)
    results.close()
    summary = report.summary(llm_args.price_in, llm_args.price_out)
    write_json(output.with_name(f"{output.name}.report.json"), {**summary, "settings": settings, **environment()})
    logger.info("%s: %d rows verified, each once; %s", output, summary["rows"], in_words(summary["status"]))
    for reason, number in summary["rejected"].items():
        logger.info("  rejected: %d %s (%s)", number, reason, REASONS[reason])
    logger.info("  %d tokens of prompts, %d written%s", *summary["tokens"].values(),
                "" if summary["cost"] is None else f", cost {summary['cost']:.2f}")  # fmt: skip
    if summary["most_frequent_text"] > 0.05 * summary["rows"] > 5:
        logger.warning(
            "one text is repeated in %d rows: look at the samples in the report", summary["most_frequent_text"]
        )


def in_words(counts: dict) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items())


if __name__ == "__main__":
    run(main)
