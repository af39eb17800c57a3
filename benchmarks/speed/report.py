"""How soon report.html opens with 5,000 images, in Chromium; and the screenshots in docs/.

    CAPTION_TEST_DATA=... python -m benchmarks.speed.report
    python -m benchmarks.speed.report --screenshots RUN COMPARISON        folders with a report.html each

The rows are the 5,000 captions of COCO's Karpathy test split in the test data, beside a published system's captions. The
test data has none of their pictures, so the Flickr8k photographs stand in, each several times: what counts is their size.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT

sys.path.insert(0, str(ROOT / "tests"))

import browser
from PIL import Image

from arguments import MetricArguments
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_predictions, load_references
from reports.outputs import score_captions, write_scores
from reports.report import write_report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", nargs=2, type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "report.json")
    args = parser.parse_args()
    if args.screenshots:
        run, comparison = args.screenshots
        screenshot(run, "captions", 1200, 820, ROOT / "docs/report.png")
        screenshot(run, "top", 390, 800, ROOT / "docs/report_phone.png")
        screenshot(comparison, "scores", 1200, 820, ROOT / "docs/comparison.png")
        return

    folder = Path(os.environ["CAPTION_TEST_DATA"])
    predictions = load_predictions(folder / "coco_karpathy_test/predictions_contrastive.json")
    references = load_references(folder / "coco_karpathy_test/captions_karpathy_test.json")
    photos = sorted((folder / "flickr8k").rglob("*.jpg"))
    images = [photos[number % len(photos)] for number in range(len(references))]
    scores, rows = score_captions(predictions, references, MetricArguments(meteor=False, spice=False), seed=42)
    with tempfile.TemporaryDirectory() as out:
        out = Path(out)
        scores = write_scores(out, scores, rows, predictions="predictions_contrastive.json")
        start = time.perf_counter()
        write_report(out, scores, rows, images)
        written = time.perf_counter() - start
        size = (out / "report.html").stat().st_size
        opened = [open_report(out / "report.html") for _ in range(args.repeats)]
    medians = {name: statistics.median(turn[name] for turn in opened) for name in opened[0]}
    result = {"images": len(rows), "seconds_to_write": written, "megabytes": size / 1e6, "milliseconds": medians}
    write_json(args.output, result | {"turns": opened} | environment())
    print(result)


def open_report(path: Path) -> dict[str, float]:
    """Milliseconds of one opening in a fresh browser, and of what a reader does then."""
    driver = browser.start()
    try:
        driver.get(path.as_uri())
        timing = driver.execute_async_script("""
            const done = arguments[0];
            const images = [...document.querySelectorAll('#gallery img')].slice(0, 8);
            Promise.all(images.map((image) => image.decode())).then(() => requestAnimationFrame(() => {
                const [page] = performance.getEntriesByType('navigation');
                const [paint] = performance.getEntriesByName('first-contentful-paint');
                done({loaded: page.loadEventEnd, first_paint: paint ? paint.startTime : null,
                      cards: document.querySelectorAll('#gallery > li').length});
            }));""")
        errors = driver.get_log("browser")
        if errors or not timing.pop("cards"):
            raise SystemExit(f"The page has errors or no captions: {errors}")
        for name, control, value in (("sort", "sort", "1"), ("order", "order", "-1")):
            timing[name] = driver.execute_script(
                "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
                "const start = performance.now(); control.dispatchEvent(new Event('change', {bubbles: true}));"
                "document.body.offsetHeight; return performance.now() - start",
                control,
                value,
            )
        timing["search"] = driver.execute_script(
            "document.getElementById('search').value = 'dog frisbee'; const start = performance.now();"
            "document.getElementById('controls').dispatchEvent(new Event('change'));"
            "document.body.offsetHeight; return performance.now() - start"
        )
        return timing
    finally:
        driver.quit()


def screenshot(folder: Path, section: str, width: int, height: int, target: Path) -> None:
    """A section of a report as a small PNG of at most 256 colours."""
    driver = browser.start(width, height)
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get((folder / "report.html").resolve().as_uri())
        driver.execute_script(f"document.getElementById('{section}').scrollIntoView()")
        time.sleep(1)  # pictures in sight are decoded
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            driver.save_screenshot(file.name)
            Image.open(file.name).convert("RGB").quantize(256).save(target, optimize=True)
        print(target, f"{target.stat().st_size / 1000:.0f} kB")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
