"""docs/families.md's table, made from the outcomes of the tests:

    python -m pytest tests/models/test_families.py tests/scripts/test_family_scripts.py --junitxml families.xml
    python tests/families_table.py families.xml            # writes benchmarks/results/families.json and the table

A cell is "yes" if all of its tests passed, "no" if one failed, and "-" if one was skipped or did not run. It is to be run
in the environment with torchvision, where no family's tests are skipped.
"""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
CELLS = {  # column: its tests, and what else their parameters must say
    "train": ["test_train"],
    "LoRA": ["test_lora"],
    "evaluate": ["test_evaluate"],
    "infer": ["test_the_same_captions_everywhere"],
    "SCST": ["test_scst"],
    "DiCO": ["test_dico"],
    "export": ["test_export"],
    "ten pairs memorised": ["test_ten_pairs_are_memorised_and_given_back_one_by_one_and_reloaded"],
    "best == final": ["test_best_is_final"],
    "resumed == unbroken": ["test_resumed_is_unbroken"],
    "own picture, one encoding": ["test_samples_are_scored_on_their_own_picture"],
    "no look ahead": ["test_no_token_sees_what_it_is_to_predict"],
}


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """{family: {column: "yes" | "no" | "-"}} of a JUnit file."""
    found: dict[str, dict[str, list[str]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[([a-z0-9_-]+)\]", case.get("name"))
        columns = [column for column, tests in CELLS.items() if match and match[1] in tests]
        if not columns:
            continue
        family = re.sub(r"-?(trained|adapted)-?", "", match[2])
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "no" if failed else "-" if case.find("skipped") is not None else "yes"
        found.setdefault(family, {}).setdefault(columns[0], []).append(outcome)
    return {
        family: {column: min(cells.get(column, ["-"]), key=["no", "-", "yes"].index) for column in CELLS}
        for family, cells in sorted(found.items())
    }


def table(families: dict) -> str:
    rows = [["Family", *CELLS], ["---"] * (len(CELLS) + 1)]
    rows += [[family, *cells.values()] for family, cells in families.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from common.provenance import environment

    families = outcomes(Path(sys.argv[1]))
    result = ROOT / "benchmarks" / "results" / "families.json"
    result.write_text(json.dumps({"families": families, **environment()}, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs" / "families.md"
    text = page.read_text(encoding="utf-8")
    start, end = "<!-- table -->\n", "<!-- end of table -->"
    before, _, rest = text.partition(start)
    page.write_text(before + start + table(families) + end + rest.partition(end)[2], encoding="utf-8")
