"""How well the checks of rewrite.py find faults in the 2,000 official fused captions of CapsFusion.

    CAPTION_TEST_DATA=... python -m benchmarks.rewriting.detector

Counts flagged texts by reason, and compares with texts read by hand (detector_annotations.json: flagged and passed
ones, drawn at random): precision, share of faults among the passed, and the estimated recall.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment
from metrics.coco_caption.text_checks import unsupported_facts
from rewriting.checks import Checker, tidy
from rewriting.prompts import load_prompt


def wilson(hits: int, count: int) -> list[float]:
    """95 % confidence interval of a share."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def main() -> None:
    rows = json.loads(
        (Path(os.environ["CAPTION_TEST_DATA"]) / "capsfusion/example_data.json").read_text(encoding="utf-8")
    )
    notes = json.loads((ROOT / "benchmarks/rewriting/detector_annotations.json").read_text(encoding="utf-8"))
    checker = Checker(load_prompt("fuse"))
    reasons, warned = {}, 0
    for number, row in enumerate(rows):
        text, inputs = tidy(row["capsfuion_official"]), [row["laion_2b"], row["laion_coco"]]
        reasons[number] = checker.fault(text, inputs)
        warned += bool(unsupported_facts(text, inputs))
    flagged = sum(reason is not None for reason in reasons.values())
    moved = [n for n in notes["flagged"] if not reasons[int(n)]] + [n for n in notes["passed"] if reasons[int(n)]]
    assert not moved, f"the checks changed since these rows were read: {moved}. Draw and read them again"

    right = sum(note["at_fault"] for note in notes["flagged"].values())
    missed = sum(note["at_fault"] for note in notes["passed"].values())
    read_flagged, read_passed = len(notes["flagged"]), len(notes["passed"])
    precision, miss_rate = right / read_flagged, missed / read_passed
    found = flagged * precision
    bounds = wilson(missed, read_passed)
    recall = {
        name: found / (found + (len(rows) - flagged) * share)
        for name, share in (("estimate", miss_rate), ("low", bounds[1]), ("high", bounds[0]))
    }
    leaks = [int(n) for n, note in notes["flagged"].items() if reasons[int(n)] == "prompt_leak"]
    result = {
        "texts": len(rows),
        "flagged": flagged,
        "by_reason": dict(Counter(reason for reason in reasons.values() if reason).most_common()),
        "with_names_or_numbers_of_no_input": warned,
        "read_by_hand": {"flagged": read_flagged, "passed": read_passed},
        "precision": precision,
        "precision_interval": wilson(right, read_flagged),
        "precision_of_prompt_leak": sum(notes["flagged"][str(n)]["at_fault"] for n in leaks) / len(leaks),
        "faults_among_passed": miss_rate,
        "faults_among_passed_interval": bounds,
        "recall": recall,
        "faults_found_by_searching_the_passed": sorted(map(int, notes["searched"]["at_fault"])),
        **environment(),
    }
    write_json(RESULTS / "detector.json", result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "hardware")}, indent=2))


if __name__ == "__main__":
    main()
