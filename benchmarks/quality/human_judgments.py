"""The published table of correlations with people on Flickr8k-Expert, by evaluate.py --human_judgments.

    CAPTION_TEST_DATA=... CORENLP_DIR=... python -m benchmarks.quality.human_judgments

Kendall's tau-c x 100 as published for BLEU-1, BLEU-4, METEOR, ROUGE-L, CIDEr (all to three decimals) and SPICE (to one),
ours, and the difference. The first judgments alone are scored, too, for the test that holds these numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, write_result

PUBLISHED = {"Bleu_1": 32.324, "Bleu_4": 30.776, "METEOR": 41.822, "ROUGE_L": 32.314, "CIDEr": 43.891}
PUBLISHED_TAU_B = {"Bleu_1": 32.175, "Bleu_4": 30.599, "METEOR": 41.538, "ROUGE_L": 32.139, "CIDEr": 43.602}
FIRST = 300  # judgments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(RESULTS / "human_judgments.json"))
    arguments = parser.parse_args()
    data = Path(os.environ["CAPTION_TEST_DATA"]) / "flickr8k_expert"
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.jsonl"
        lines = (data / "judgments.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        first.write_text("".join(lines[:FIRST]), encoding="utf-8")
        part, _ = evaluate(first, data, folder, "--meteor", "false", "--spice", "false")
        plain, seconds = evaluate(data / "judgments.jsonl", data, folder, "--spice", "false")
        with_spice, _ = evaluate(data / "judgments.jsonl", data, folder)
    ours = {name: round(100 * plain["scores"][name]["tau_c"]["value"], 3) for name in PUBLISHED}
    ours_b = {name: round(100 * plain["scores"][name]["tau_b"]["value"], 3) for name in PUBLISHED}
    spice = with_spice["scores"]["SPICE"]
    write_result(
        Path(arguments.output),
        {
            "published": PUBLISHED,
            "ours": ours,
            "difference": {name: round(ours[name] - value, 3) for name, value in PUBLISHED.items()},
            "tau_b": {"published": PUBLISHED_TAU_B, "ours": ours_b},
            "SPICE": {
                "published": {"tau_b": 51.7, "tau_c": 44.9},
                "ours": {name: round(100 * spice[name]["value"], 3) for name in ("tau_b", "tau_c")},
            },
            "pairwise_accuracy": {name: of_one["pairwise_accuracy"] for name, of_one in with_spice["scores"].items()},
            "tau_c_intervals": {name: of_one["tau_c"]["interval"] for name, of_one in with_spice["scores"].items()},
            "counts": {name: plain[name] for name in ("images", "captions", "ratings")},
            "seconds": round(seconds, 1),
            "first_judgments": {
                "ratings": FIRST,
                "tau_c": {name: of_one["tau_c"]["value"] for name, of_one in part["scores"].items()},
            },
        },
    )


def evaluate(judgments: Path, data: Path, folder: str, *flags: str) -> tuple[dict, float]:
    """(human_judgments.json, seconds) of a run of the script."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, "evaluate.py", "--human_judgments", str(judgments), "--output_dir", output]
        command += ["--references", str(data / "references.json"), *flags]
        subprocess.run(command, cwd=ROOT, check=True)
        result = json.loads((Path(output) / "human_judgments.json").read_text(encoding="utf-8"))
    return result, time.perf_counter() - begin


if __name__ == "__main__":
    main()
