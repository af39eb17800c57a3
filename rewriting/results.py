"""Results of rows: kept as they come in, found again by row, and brought together with the input."""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash

from common.errors import UserError
from common.resumable import parts
from metrics.coco_caption.text_checks import unsupported_facts, words
from rewriting.backends import Job, Outcome
from rewriting.prompts import Prompt, Tokens, fit
from rewriting.rows import Source

FALLBACKS = {"fuse": "keep_synthetic", "paragraph": "drop"}
SAMPLED = 100_000  # rows that vocabulary and repeated texts are counted in


def digest(inputs: dict) -> str:
    """16 hex digits of a row's captions: ties a result to what it was made of."""
    return xxhash.xxh3_64_hexdigest(json.dumps(inputs, ensure_ascii=False).encode())


def captions(inputs: dict) -> list[str]:
    """A row's captions in a list; of `fuse` raw before synthetic. Empty where one is missing."""
    found = inputs.get("captions", [inputs.get("raw"), inputs.get("synthetic")])
    return found if all(found) else []


def result_row(job: Job, outcome: Outcome) -> dict:
    """What a part file keeps of a row."""
    tokens = [outcome.tokens_in, outcome.tokens_out]
    return {"row": job.row, "input": job.digest, "text": outcome.text, "reason": outcome.reason,
            "attempts": outcome.attempts, "tokens": tokens}  # fmt: skip


class Results:
    """The results in OUTPUT's part files, by row: 16 bytes of memory each, the texts stay on disk."""

    def __init__(self, output: Path):
        self.files = [open(part, "rb") for part in parts(output)]  # noqa: SIM115 - close() closes them
        self.digests, self.places = array("Q"), array("Q")
        self.count = 0
        for number, file in enumerate(self.files):
            position = 0
            for line in file:
                if line.endswith(b"\n"):  # a kill cuts the last one in two
                    result = json.loads(line)
                    self.add(result["row"], int(result["input"], 16) or 1, number << 48 | position)
                position += len(line)

    def add(self, row: int, value: int, place: int) -> None:
        for column in (self.digests, self.places):
            column.extend(itertools.repeat(0, max(0, row + 1 - len(column))))
        self.count += not self.digests[row]
        self.digests[row], self.places[row] = value, place

    def has(self, row: int, name: str, value: str) -> bool:
        """Whether the row has a result. ValueError if it was made of other captions than it has now."""
        known = self.digests[row] if row < len(self.digests) else 0
        if known and known != (int(value, 16) or 1):
            raise UserError(
                f"{name}: row {row} has other captions than when it was rewritten. Give the input as it was, or name "
                "another --output."
            )
        return bool(known)

    def read(self, row: int) -> dict:
        place = self.places[row]
        file = self.files[place >> 48]
        file.seek(place & ((1 << 48) - 1))
        return json.loads(file.readline())

    def close(self) -> None:
        for file in self.files:
            file.close()


def rows_left(source: Source, results: Results, limit: int | None) -> Iterator[tuple[int, dict, str]]:
    """(number, inputs, digest) of each row that has captions and no result yet."""
    for number, row in enumerate(itertools.islice(source.read(source.columns), limit)):
        inputs = source.inputs(row)
        if captions(inputs):
            value = digest(inputs)
            if not results.has(number, source.name, value):
                yield number, inputs, value


def jobs(left, prompt: Prompt, tokens: Tokens, limit: int) -> Iterator[Job]:
    """A job for each of `left`, its prompt in at most `limit` tokens."""
    for number, inputs, value in left:
        text, ids = fit(prompt, inputs, tokens, limit)
        yield Job(number, value, captions(inputs), text, ids)


def fallback(task: str, inputs: dict, on_reject: str) -> tuple[str | None, str]:
    """(caption, status) of a row whose text was rejected; status null where there is nothing to keep."""
    if on_reject == "drop":
        return None, "dropped"
    kept = None
    if on_reject == "keep_synthetic":
        kept = inputs["synthetic"]
    elif on_reject == "keep_raw":
        sentences = [c if c.endswith((".", "!", "?")) else f"{c}." for c in inputs.get("captions", [])]
        kept = " ".join(sentences) if task == "paragraph" else inputs["raw"]
    return (kept, f"kept_{on_reject.removeprefix('keep_')}") if kept else (None, "null")


class Report:
    """What came out: counts, tokens, lengths, vocabulary, samples. Memory does not grow with the rows."""

    def __init__(self):
        self.statuses, self.reasons, self.lengths, self.attempts = Counter(), Counter(), Counter(), Counter()
        self.vocabularies: dict[str, set] = {"inputs": set(), "rewritten": set()}
        self.texts: Counter = Counter()
        self.tokens, self.rows, self.warned = [0, 0], 0, 0
        self.samples: dict[str, list] = {}

    def add(self, inputs: list[str], caption: str | None, facts: dict, tokens: list[int]) -> None:
        self.rows += 1
        self.statuses[facts["status"]] += 1
        self.attempts[facts["attempts"]] += 1
        self.warned += bool(facts["warnings"])
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)]
        if facts["reason"]:
            self.reasons[facts["reason"]] += 1
        shown = self.samples.setdefault(facts["reason"] or "rewritten", [])
        if len(shown) < 5:
            shown.append(
                {"inputs": inputs, "caption": caption, "rejected": facts["rejected"], "warnings": facts["warnings"]}
            )
        if facts["status"] == "rewritten":
            tokens = words(caption)
            self.lengths[min(len(tokens), 500)] += 1
            if self.rows <= SAMPLED:
                self.texts[hash(caption)] += 1
                self.vocabularies["rewritten"].update(tokens)
                self.vocabularies["inputs"].update(word for text in inputs for word in words(text))

    def summary(self, price_in: float | None, price_out: float | None) -> dict:
        written = self.lengths.total()
        passed = dict(
            zip(sorted(self.lengths), itertools.accumulate(self.lengths[n] for n in sorted(self.lengths)), strict=True)
        )
        sizes = {name: len(vocabulary) for name, vocabulary in self.vocabularies.items()}
        cost = None
        if price_in is not None and price_out is not None:
            cost = (self.tokens[0] * price_in + self.tokens[1] * price_out) / 1e6
        return {
            "rows": self.rows,
            "status": dict(self.statuses),
            "rejected": dict(self.reasons.most_common()),
            "rows_with_unsupported_names_or_numbers": self.warned,
            "attempts": {str(k): v for k, v in sorted(self.attempts.items())},
            "tokens": {"prompts": self.tokens[0], "written": self.tokens[1]},
            "cost": cost,
            "words": {
                "mean": sum(length * n for length, n in self.lengths.items()) / written if written else None,
                **{f"p{s}": next(n for n in passed if passed[n] >= written * s / 100) for s in (5, 50, 95) if written},
            },
            "vocabulary": {**sizes, "gain": sizes["rewritten"] / sizes["inputs"] if sizes["inputs"] else None},
            "most_frequent_text": max(self.texts.values(), default=0),
            "vocabulary_and_frequency_of_first_rows": min(self.rows, SAMPLED),
            "samples": self.samples,
        }


def merged(source: Source, results: Results, task: str, args, provenance: dict, report: Report) -> Iterator[dict]:
    """The output's rows: each row of the input with its caption and how it came about, in order.

    Raises:
        ValueError: a row has no result, or one of other captions.
    """
    on_reject = args.on_reject or FALLBACKS[task]
    for number, row in enumerate(itertools.islice(source.read(None), args.max_samples)):
        inputs = source.inputs(row)
        given = captions(inputs)
        result = {"text": None, "reason": "no_input", "attempts": 0, "tokens": [0, 0]}
        if given:
            if not results.has(number, source.name, digest(inputs)):
                raise UserError(f"{source.name}: row {number} has no result. Start the same command again.")
            result = results.read(number)
        caption, status = result["text"], "rewritten"
        if result["reason"]:
            caption, status = fallback(task, inputs, on_reject)
        facts = {
            "status": status,
            "reason": result["reason"],
            "warnings": unsupported_facts(caption, given) if status == "rewritten" else [],
            "rejected": result["text"] if result["reason"] else None,
            "attempts": result["attempts"],
            **provenance,
        }
        report.add(given, caption, facts, result["tokens"])
        if status != "dropped":
            yield {**row, args.output_column: caption, "rewrite": facts}


def estimate(source: Source, prompt: Prompt, tokens: Tokens, args, llm, sample: int = 2000) -> str:
    """What a run would take, in words for people: rows, tokens, cost, and the first prompt."""
    rows, empty, prompts, written, first = 0, 0, 0, 0, None
    for row in itertools.islice(source.read(source.columns), args.max_samples):
        inputs = source.inputs(row)
        rows += 1
        empty += not captions(inputs)
        if captions(inputs) and rows - empty <= sample:
            text, ids = fit(prompt, inputs, tokens, llm.max_prompt_tokens)
            first = first or text
            prompts += len(ids)
            written += min(llm.max_new_tokens, sum(len(tokens.pieces(caption)) for caption in captions(inputs)))
    asked = rows - empty
    scale = asked / max(1, min(asked, sample))
    how = "counted with its tokenizer" if tokens.tokenizer else "estimated without a tokenizer"
    lines = [
        f"{rows} rows, {empty} of them without captions to rewrite",
        f"prompts: {prompts * scale:,.0f} tokens, {how}",
        f"written: about {written * scale:,.0f} tokens, at most {asked * llm.max_new_tokens:,} (of first attempts)",
    ]
    if llm.price_in is not None and llm.price_out is not None:
        low = (prompts * llm.price_in + written * llm.price_out) * scale / 1e6
        high = (prompts * scale * llm.price_in + asked * llm.max_new_tokens * llm.price_out) / 1e6 * llm.max_attempts
        lines.append(f"cost: about {low:,.2f}, at most {high:,.2f} if each row took {llm.max_attempts} attempts")
    else:
        lines.append("cost: give --price_in and --price_out, the prices of a million tokens")
    return "\n".join(lines) + f"\nthe first prompt:\n{'-' * 40}\n{first}\n{'-' * 40}"
