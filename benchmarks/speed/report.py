"""How fast report.html opens with 5,000 and 40,000 images in Chromium; and the screenshots in docs/.

    CAPTION_TEST_DATA=... python -m benchmarks.speed.report
    python -m benchmarks.speed.report --screenshots RUN COMPARISON        folders with a report.html each

The rows are the 5,000 images of COCO's Karpathy test split in the test data: the first human caption of each, scored
against the others; for 40,000, each is repeated eight times. The test data does not have their images, so Flickr8k
photographs are used instead, each several times: only their size matters.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, write_result

sys.path.insert(0, str(ROOT / "tests/helpers"))

import browser
from PIL import Image

from arguments import MetricArguments
from data.caption_files import load_references
from reports.outputs import score_captions, write_scores
from reports.report import write_report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", nargs=2, type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 8], help="copies of each of the 5,000 images")
    parser.add_argument("--output", type=Path, default=RESULTS / "report.json")
    args = parser.parse_args()
    if args.screenshots:
        run, comparison = args.screenshots
        screenshot(run, "captions", 1200, 820, ROOT / "docs/report.png")
        screenshot(run, "top", 390, 800, ROOT / "docs/report_phone.png")
        screenshot(comparison, "scores", 1200, 820, ROOT / "docs/comparison.png")
        demo_screenshot(run, ROOT / "docs/demo.png")
        return

    folder = Path(os.environ["CAPTION_TEST_DATA"])
    captions = load_references(folder / "coco_karpathy_test/captions_karpathy_test.json")
    photos = sorted((folder / "flickr8k").rglob("*.jpg"))
    predictions = {image: said[0] for image, said in captions.items()}
    references = {image: said[1:] for image, said in captions.items()}
    metrics = MetricArguments(meteor=False, spice=False)
    scores, rows = score_captions(predictions, references, metrics, seed=42)
    sizes = {}
    for copies in args.copies:
        many = [row | {"image_id": f"{row['image_id']}-{copy}"} for copy in range(copies) for row in rows]
        images = [photos[number % len(photos)] for number in range(len(many))]
        counts = {name: value * copies for name, value in scores["counts"].items()}
        sizes[str(len(many))] = measure(scores | {"counts": counts}, many, images, args.repeats)
        print(len(many), {name: value for name, value in sizes[str(len(many))].items() if name != "turns"})
    write_result(args.output, {"images": sizes})


def measure(scores: dict, rows: list[dict], images: list, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as out:
        out = Path(out)
        scores = write_scores(out, scores, rows, predictions="first human caption")
        start = time.perf_counter()
        write_report(out, scores, rows, images)
        written = time.perf_counter() - start
        size = (out / "report.html").stat().st_size
        opened = [open_report(out / "report.html") for _ in range(repeats)]
    medians = {name: statistics.median(turn[name] for turn in opened) for name in opened[0]}
    return {"seconds_to_write": written, "megabytes": size / 1e6, "milliseconds": medians, "turns": opened}


def open_report(path: Path) -> dict[str, float]:
    """Milliseconds to open it in a fresh browser, and for a reader's usual actions."""
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
        timing |= driver.execute_script("""
            const timing = {}, filters = [...document.querySelectorAll('#filters input:enabled')];
            const act = (name, change) => {
                const start = performance.now();
                change();
                document.getElementById('controls').dispatchEvent(new Event('change'));
                document.body.offsetHeight;
                timing[name] = performance.now() - start;
            };
            const set = (id, value) => () => { document.getElementById(id).value = value; };
            const option = (title) => [...document.getElementById('sort').options].find((one) => one.text === title).value;
            act('sort', set('sort', '1'));
            act('order', set('order', '-1'));
            act('sort_by_id', set('sort', option('image id')));
            act('filter', () => { filters[0].checked = true; });
            act('filter_off', () => { filters[0].checked = false; });
            act('first_search', set('search', 'dog frisbee'));
            act('next_search', set('search', 'red bus'));
            act('search_off', set('search', ''));
            timing.cards_at_once = document.querySelectorAll('#gallery > li').length;
            return timing;""")
        timing["scroll_to_the_end"] = driver.execute_async_script(
            "const start = performance.now(); scrollTo({top: document.body.scrollHeight, behavior: 'instant'});"
            "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0](performance.now() - start)))"
        )
        return timing
    finally:
        driver.quit()


def screenshot(folder: Path, section: str, width: int, height: int, target: Path) -> None:
    """A section of a report as a small PNG of at most 256 colours."""
    driver = browser.start(width, height)
    try:
        browser.screen(driver, width, height)
        driver.get((folder / "report.html").resolve().as_uri())
        driver.execute_script(f"document.getElementById('{section}').scrollIntoView()")
        time.sleep(1)  # until visible images are decoded
        save(driver, target)
    finally:
        driver.quit()


def demo_screenshot(run: Path, target: Path) -> None:
    """demo.py's page with the run's model, after a click on the first example."""
    address = "http://127.0.0.1:7911"
    command = [sys.executable, str(ROOT / "demo.py"), "--model_name_or_path", str(run), "--port", address[-4:]]
    demo, driver = subprocess.Popen(command), browser.start(1200, 860)
    try:
        browser.screen(driver, 1200, 860)
        browser.wait(lambda: driver.get(address) or driver.find_elements("css selector", ".gallery-item"), seconds=200)
        browser.wait(lambda: driver.find_element("css selector", ".gallery-item").click() is None)
        browser.wait(lambda: driver.find_elements("css selector", ".words figure"))
        time.sleep(1)
        save(driver, target)
    finally:
        driver.quit()
        demo.terminate()


def save(driver, target: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        driver.save_screenshot(file.name)
        Image.open(file.name).convert("RGB").quantize(256).save(target, optimize=True)
    print(target, f"{target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
