"""Answers for rows: saved as they come in, looked up by row, and merged with the input."""

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import xxhash

from common.errors import UserError
from common.files import whole
from common.remote import upload
from jobs.chat_server import WITHOUT_PRICES, cost_of
from jobs.journal import ANSWERS, Journal, answers_of
from jobs.shards import Cursor, Shard, ShardFolder, digest_of, parquet_ranges, row_ranges, version_of
from metrics.coco_caption.text_checks import unsupported_facts, words
from rewriting.backends import Job, Outcome
from rewriting.prompts import Pieces, Prompt, Tokens, fit
from rewriting.rows import Source

FALLBACKS = {"fuse": "keep_synthetic", "paragraph": "drop"}
ESTIMATED = 2_000  # rows that an estimate reads the prompts of
SAMPLED = 100_000  # rows that vocabulary and repeated texts are counted in


def digest(inputs: dict) -> str:
    """16 hex digits that tie a result to the captions it was made from."""
    return xxhash.xxh3_64_hexdigest(json.dumps(inputs, ensure_ascii=False).encode())


def captions(inputs: dict) -> list[str]:
    """A row's captions as a list; for `fuse`, raw before synthetic. Empty if one is missing."""
    texts = inputs.get("captions", [inputs.get("raw"), inputs.get("synthetic")])
    return texts if all(texts) else []


def result_row(job: Job, outcome: Outcome) -> dict:
    """What is saved for a row."""
    tokens = [outcome.tokens_in, outcome.tokens_out]
    return {"row": job.row, "input": job.digest, "text": outcome.text, "reason": outcome.reason,
            "attempts": outcome.attempts, "tokens": tokens}  # fmt: skip


class Answers:
    """The answers for a shard's rows, one per line, written as soon as they arrive: the journal that a killed run resumes
    from, and that a run with more rows or another --on_reject reuses.

    They are in the output's _answers folder. For a remote output the journal is in the local cache and is uploaded once
    the shard is done, so another machine lacks the answers of at most one shard per worker.
    """

    def __init__(self, folder: ShardFolder, shard: Shard):
        self.folder, self.shard, self.path = folder, shard, answers_of(folder, shard)
        self.name = f"{ANSWERS}/{self.path.name}"
        if not self.path.exists():
            with (
                contextlib.suppress(FileNotFoundError),
                folder.open(self.name) as stored,
                whole(self.path) as temporary,
            ):
                temporary.write_bytes(stored.read())

    def __enter__(self):
        self.journal = Journal(self.path)
        self.rows = {row["row"]: row for row in self.journal.rows}
        return self

    def __exit__(self, *_) -> None:
        self.journal.file.close()

    def add(self, row: dict) -> None:
        self.journal.add(row)
        self.rows[row["row"]] = row

    def has(self, row: int, value: str) -> bool:
        """Whether the row has an answer. ValueError if that was for other captions than it has now."""
        answer = self.rows.get(row)
        if answer and answer["input"] != value:
            raise UserError(
                f"{self.shard.label}: row {row} has other captions than when it was rewritten. Give the input as it was, "
                "or name another --output."
            )
        return answer is not None

    def keep(self) -> None:
        """Upload them to where other machines find them."""
        if self.folder.remote:
            upload(self.path, f"{self.folder.name}/{self.name}")


# ---------------------------------------------------------------- shards of a table


def plan(source: Source, size: int, limit: int | None, *settings) -> list[Shard]:
    """Shards of `size` rows each, of the source's first `limit` rows. Parquet files are not read, all others once.

    Args:
        settings: what the output depends on besides rows and answers.
    """
    shards: list[Shard] = []
    left = math.inf if limit is None else limit
    for part in source.parts:
        if part.parquet:
            ranges = parquet_ranges(pq.read_metadata(part.parquet), size, version_of(part.parquet))
        else:
            ranges = row_ranges(map(source.inputs, part.read(source.columns)), size)
        for start, stop, content in ranges:
            rows = min(stop - start, left)
            if not rows:
                return shards
            left -= rows
            content = digest_of(content, rows, *settings)
            shards.append(Shard(len(shards), "table", "", part.label, start, start + rows, rows, content))
    return shards


class Rows:
    """The rows of a source's shards: each part is read in order, once for the prompts and once for the output."""

    def __init__(self, source: Source):
        self.source, self.parts, self.cursors = source, {part.label: part for part in source.parts}, {}

    def read(self, shard: Shard, columns: list[str] | None) -> Iterator[tuple[int, dict]]:
        """(number in its part, row)."""
        key = shard.label, columns is None
        if key not in self.cursors:
            part = self.parts[shard.label]
            self.cursors[key] = Cursor(lambda start: (start, part.read(columns, start)))
        return enumerate(self.cursors[key].read(shard.start, shard.stop), shard.start)


def jobs(
    rows: Iterator[tuple[int, dict]], source: Source, answers: Answers, prompt: Prompt, tokens: Tokens, limit: int
):
    """A Job, with its prompt in at most `limit` tokens, for each of `rows` that has captions and no answer yet."""
    for number, row in rows:
        inputs = source.inputs(row)
        if captions(inputs) and not answers.has(number, digest(inputs)):
            text, ids = fit(prompt, inputs, tokens, limit)
            yield Job(number, digest(inputs), captions(inputs), text, ids)


def fallback(inputs: dict, on_reject: str) -> tuple[str | None, str]:
    """(caption, status) for a row whose text was rejected; status null if there is nothing to keep."""
    if on_reject == "drop":
        return None, "dropped"
    sentences = [re.sub(r"(?<![.!?])$", ".", caption) for caption in inputs.get("captions", [])]
    source = on_reject.removeprefix("keep_")
    kept = " ".join(sentences) or inputs.get(source)  # of a paragraph only the raw captions can be kept
    return (kept, f"kept_{source}") if kept and on_reject != "null" else (None, "null")


class Report:
    """Counts, tokens, lengths and samples of the output. Its size does not grow with the rows; shards' reports can be merged."""

    COUNTERS = ("statuses", "reasons", "lengths", "attempts")

    def __init__(self):
        self.statuses, self.reasons, self.lengths, self.attempts = Counter(), Counter(), Counter(), Counter()
        self.tokens, self.rows, self.warned = [0, 0], 0, 0
        self.samples: dict[str, list] = {}

    def add(self, inputs: list[str], caption: str | None, facts: dict, tokens: list[int]) -> None:
        self.rows += 1
        self.statuses[facts["status"]] += 1
        self.attempts[str(facts["attempts"])] += 1
        self.warned += bool(facts["warnings"])
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)]
        if facts["reason"]:
            self.reasons[facts["reason"]] += 1
        else:
            self.lengths[str(min(len(words(caption)), 500))] += 1
        samples = self.samples.setdefault(facts["reason"] or "rewritten", [])
        if len(samples) < 5:
            samples.append(
                {"inputs": inputs, "caption": caption, "rejected": facts["rejected"], "warnings": facts["warnings"]}
            )

    def merge(self, other: dict) -> None:
        """Add the `vars` of another report."""
        for name in self.COUNTERS:
            getattr(self, name).update(other[name])
        self.tokens = [a + b for a, b in zip(self.tokens, other["tokens"], strict=True)]
        self.rows, self.warned = self.rows + other["rows"], self.warned + other["warned"]
        for reason, samples in other["samples"].items():
            self.samples[reason] = (self.samples.get(reason, []) + samples)[:5]

    def summary(self, price_in: float | None, price_out: float | None) -> dict:
        return {
            "rows": self.rows,
            "status": dict(self.statuses),
            "rejected": dict(self.reasons.most_common()),
            "rows_with_unsupported_names_or_numbers": self.warned,
            "attempts": dict(sorted(self.attempts.items())),
            "tokens": {"prompts": self.tokens[0], "written": self.tokens[1]},
            "cost": cost_of(*self.tokens, price_in, price_out),
            "words": self.lengths_of_texts(),
            "samples": self.samples,
        }

    def lengths_of_texts(self) -> dict:
        """Mean and percentiles of the words of the rewritten texts."""
        if not self.lengths:
            return {"mean": None}
        lengths = np.repeat(np.array([*self.lengths], int), [*self.lengths.values()])
        percentiles = np.percentile(lengths, (5, 50, 95), method="inverted_cdf").tolist()
        return {"mean": float(lengths.mean())} | dict(zip(("p5", "p50", "p95"), percentiles, strict=True))


def vocabulary(rows: Iterator[dict], source: Source, column: str) -> dict:
    """Distinct words, and count of the most frequent text, of the rewritten rows among an output's first SAMPLED."""
    of_inputs, of_rewritten, texts, number = set(), set(), Counter(), 0
    for row in itertools.islice(rows, SAMPLED):
        number += 1
        if row["rewrite"]["status"] == "rewritten":
            texts[hash(row[column])] += 1
            of_rewritten.update(words(row[column]))
            of_inputs.update(*map(words, captions(source.inputs(row))))
    gain = len(of_rewritten) / len(of_inputs) if of_inputs else None
    return {
        "vocabulary": {"inputs": len(of_inputs), "rewritten": len(of_rewritten), "gain": gain},
        "most_frequent_text": max(texts.values(), default=0),
        "vocabulary_and_frequency_of_first_rows": number,
    }


def merged(rows, source: Source, answers: Answers, args, provenance: dict, report: Report) -> Iterator[dict]:
    """The output's rows, in order: each of `rows`, (number, row), with its caption and how it was made.

    Raises:
        UserError: a row has no answer, or one for other captions.
    """
    for number, row in rows:
        inputs = source.inputs(row)
        texts = captions(inputs)
        result = {"text": None, "reason": "no_input", "attempts": 0, "tokens": [0, 0]}
        if texts:
            if not answers.has(number, digest(inputs)):
                raise UserError(f"{answers.shard.label}: row {number} has no answer. Run the same command again.")
            result = answers.rows[number]
        if result["reason"]:
            caption, status = fallback(inputs, args.on_reject)
            warnings, rejected = [], result["text"]
        else:
            caption, status = result["text"], "rewritten"
            warnings, rejected = unsupported_facts(caption, texts), None
        facts = {"status": status, "reason": result["reason"], "warnings": warnings, "rejected": rejected}
        facts |= {"attempts": result["attempts"], **provenance}
        report.add(texts, caption, facts, result["tokens"])
        if status != "dropped":
            yield {**row, args.output_column: caption, "rewrite": facts}


def estimate(source: Source, prompt: Prompt, tokens: Tokens, args, llm) -> str:
    """What a run would take, as text: rows, tokens, cost, and the first prompt."""
    rows, asked, prompts, written, first = 0, 0, 0, 0, None
    for row in itertools.islice(source.read(source.columns), args.max_samples):
        texts = captions(source.inputs(row))
        rows += 1
        asked += bool(texts)
        if texts and asked <= ESTIMATED:
            text, ids = fit(prompt, source.inputs(row), tokens, llm.max_prompt_tokens)
            first = first or text
            prompts += len(ids)
            written += min(llm.max_new_tokens, sum(map(len, map(tokens.pieces, texts))))
    scale = asked / max(1, min(asked, ESTIMATED))
    method = "estimated without a tokenizer" if isinstance(tokens.tokenizer, Pieces) else "counted with its tokenizer"
    cost = WITHOUT_PRICES
    low = cost_of(prompts * scale, written * scale, llm.price_in, llm.price_out)
    if low is not None:
        high = cost_of(prompts * scale, asked * llm.max_new_tokens, llm.price_in, llm.price_out) * llm.max_attempts
        cost = f"about {low:,.2f}, at most {high:,.2f} if each row took {llm.max_attempts} attempts"
    return "\n".join(
        [
            f"{rows} rows, {rows - asked} of them without captions to rewrite",
            f"prompts: {prompts * scale:,.0f} tokens, {method}",
            f"written: about {written * scale:,.0f} tokens, at most {asked * llm.max_new_tokens:,} (first attempts only)",
            f"cost: {cost}",
            f"the first prompt:\n{'-' * 40}\n{first}\n{'-' * 40}",
        ]
    )
