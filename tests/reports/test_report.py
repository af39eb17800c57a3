"""report.html and the comparison of runs: what the files say, and what a reader sees and does in a real Chromium."""

import json
import math
import random
import xml.etree.ElementTree as ElementTree

import browser
import numpy as np
import pytest
import tiny
from conftest import ROOT
from PIL import Image
from transformers import TrainerState

from arguments import MetricArguments
from reports.charts import histogram, labels, line_charts
from reports.comparison import compare, paired_bootstrap, read_runs
from reports.outputs import score_captions
from reports.plots import COLOURS, STYLE, plot_curves, training_panels
from reports.report import contradictions, faults, read_thumbnails, thumbnails, write_report

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><!-- <script>document.title='hacked'</script>"
REFERENCES = {
    "dog": ["a red dog runs on grass", "the red dog is running"],
    "cat": ["two cats sit on a green sofa", "two black cats on the sofa"],
    HOSTILE: [HOSTILE, "a man"],
    **{
        f"more{n}": [f"a {word} on the road", f"the {word} near water"] for n, word in enumerate(["ball", "child"] * 30)
    },
}
GOOD = {image: captions[0] for image, captions in REFERENCES.items()}
BAD = GOOD | {"dog": "a blue dog runs with a", "cat": "three cats cats sit", HOSTILE: f"{HOSTILE} again"}
NO_JAVA = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", "200")


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders good, bad and both, as evaluate.py writes them. Pictures lie beside, of all images but the hostile one,
    whose name no file can have: without --image_dir, so the report has none."""
    folder = tmp_path_factory.mktemp("runs")
    for name, captions in (("good", GOOD), ("bad", BAD)):
        files = _write(folder / f"{name}-files", predictions=captions, references=REFERENCES)
        tiny.run(
            "evaluate.py", "--predictions", files / "predictions.json", "--references", files / "references.json",
            "--output_dir", folder / name, *NO_JAVA,
        )  # fmt: skip
    result = tiny.run(
        "evaluate.py", "--compare", folder / "bad", folder / "good", "--output_dir", folder / "both", *NO_JAVA
    )
    (folder / "both.log").write_text(result.stderr)
    return folder


@pytest.fixture(scope="module")
def chromium():
    driver = browser.start()
    yield driver
    driver.quit()


def opened(driver, folder):
    browser.screen(driver)
    driver.get_log("browser"), driver.get_log("performance")
    driver.get((folder / "report.html").as_uri())
    assert driver.get_log("browser") == []
    return driver


def cards(driver) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#gallery > li')].map(card => card.querySelector('.id').textContent)"
    )


def choose(driver, select: str, title: str) -> None:
    driver.execute_script(
        "const select = document.getElementById(arguments[0]);"
        "select.value = [...select.options].find(option => option.text === arguments[1]).value;"
        "select.dispatchEvent(new Event('change', {bubbles: true}))",
        select,
        title,
    )


def wait_for(driver, found: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    status = driver.find_element("id", "found")
    WebDriverWait(driver, 5).until(lambda _: status.text == found, f"'{status.text}' instead of '{found}'")


# ------------------------------------------------------------------------------------------------------------ the page


def test_a_reader_sorts_searches_and_filters_and_hostile_captions_stay_text(chromium, runs):
    opened(chromium, runs / "bad")
    assert chromium.find_element("id", "found").text == "63 of 63 images"
    assert set(cards(chromium)[:3]) == {"dog", "cat", HOSTILE}, "the worst come first"
    assert len(cards(chromium)) < 63, "cards are made as they are scrolled to"
    choose(chromium, "sort", "image id")
    assert cards(chromium)[1:4] == ["cat", "dog", "more0"]
    assert cards(chromium)[4] == "more1", "numbers are sorted as numbers"
    choose(chromium, "order", "highest first")
    assert cards(chromium)[0] == "more59"

    search = chromium.find_element("id", "search")
    search.send_keys("RED grass")
    wait_for(chromium, "1 of 63 images")
    assert cards(chromium) == ["dog"]
    search.clear()
    search.send_keys("onerror")
    wait_for(chromium, "1 of 63 images")
    assert chromium.find_element("css selector", ".prediction").text == BAD[HOSTILE]
    assert chromium.find_element("css selector", ".references li").text == HOSTILE
    search.clear()
    search.send_keys("no such words")
    wait_for(chromium, "0 of 63 images")
    chromium.execute_script("arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))", search)
    wait_for(chromium, "63 of 63 images")

    for fault, image, said in (
        ("bad ending", "dog", "bad ending: … a"),
        ("repeated words", "cat", "repeated words: cats cats"),
        ("colour contradicted", "dog", "colour contradicted: blue; references: red"),
        ("count contradicted", "cat", "count contradicted: 3; references: 2"),
    ):
        box = chromium.find_element("css selector", f"input[value='{fault}']")
        box.click()
        assert cards(chromium) == [image]
        assert said in [chip.text for chip in chromium.find_elements("css selector", ".fault")]
        lines = "return [...document.querySelectorAll('#gallery .chips')].map((chips) => chips.offsetHeight)"
        assert max(chromium.execute_script(lines)) < 30, "one line of flags, with the number of the others"
        box.click()
    assert "hacked" not in chromium.title
    assert chromium.find_elements("css selector", "img[src=x]") == []
    assert chromium.get_log("browser") == []


def test_the_images_that_a_filter_shows_are_saved_as_a_list(chromium, runs, tmp_path):
    opened(chromium, runs / "bad")
    how = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", how)
    chromium.find_element("css selector", "input[value='repeated words']").click()
    chromium.find_element("id", "save").click()
    saved = tmp_path / "images.txt"
    browser.wait(lambda: saved.exists() and saved.read_text() == "cat\n")
    saved.unlink()
    chromium.find_element("css selector", "input[value='repeated words']").click()
    chromium.find_element("id", "save").click()
    browser.wait(lambda: saved.exists() and len(saved.read_text().splitlines()) == 63)
    assert saved.read_text().splitlines()[:3] == cards(chromium)[:3]
    assert chromium.get_log("browser") == []


def test_only_cards_in_sight_are_made_and_scrolling_comes_by_all_of_them(chromium, runs):
    opened(chromium, runs / "bad")
    choose(chromium, "sort", "image id")
    expected = ["</script>", "cat", "dog", *(f"more{n}" for n in range(60))]
    seen, most = {}, 0
    for _ in range(60):
        found = chromium.execute_script(
            "return [...document.querySelectorAll('#gallery > li')].map((card) => ["
            "Number(card.getAttribute('aria-posinset')), card.querySelector('.id').textContent,"
            "card.getBoundingClientRect().top + scrollY, card.getBoundingClientRect().left])"
        )
        most = max(most, len(found))
        for place, image, top, left in found:
            assert seen.setdefault(place, (image, top, left)) == (image, top, left), "a card keeps its place"
        if chromium.execute_script("return scrollY + innerHeight >= document.documentElement.scrollHeight - 1"):
            break
        chromium.execute_async_script(
            "scrollBy(0, 700); requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
    assert most < 40
    assert [seen[place][0][:9] for place in sorted(seen)] == [image[:9] for image in expected]
    assert len(seen) == 63
    chromium.execute_async_script("scrollTo(0, 0); requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert len(cards(chromium)) < 40


def test_an_image_is_opened_and_the_next_ones_turned_to_by_keyboard_alone(chromium, runs):
    from selenium.webdriver.common.keys import Keys

    opened(chromium, runs / "bad")
    chromium.execute_script("document.body.tabIndex = -1; document.body.focus()")

    def focused():
        return chromium.switch_to.active_element

    def tab_to(name, most=40):
        for _ in range(most):
            browser.press(chromium, Keys.TAB)
            if focused().accessible_name.startswith(name):
                return
        raise AssertionError(f"no {name} within {most} tabs")

    tab_to("Search")
    browser.press(chromium, "water")
    wait_for(chromium, "60 of 63 images")
    tab_to("Sort by")
    browser.press(chromium, "image")  # a select takes the option that is typed
    assert chromium.execute_script("return $('sort').selectedOptions[0].text") == "image id"
    assert cards(chromium)[:2] == ["more0", "more1"]
    tab_to("bad ending") if chromium.find_element("css selector", "input[value='bad ending']").is_enabled() else None
    tab_to("Open image more0")
    for image in ("more1", "more2", "more3", "more4", "more5", "more6", "more7", "more8"):
        browser.press(chromium, Keys.TAB)
        assert focused().accessible_name == f"Open image {image}"
        box = focused().rect["y"] - chromium.execute_script("return scrollY")
        assert 0 <= box <= 900, "what has the focus is in sight"
    browser.press(chromium, Keys.ENTER)
    assert chromium.find_element("id", "viewer-title").text == "more8 (9 of 60)"
    viewer = chromium.find_element("id", "viewer")
    assert viewer.find_element("css selector", ".prediction").text == GOOD["more8"]
    assert [item.text for item in viewer.find_elements("css selector", ".references li")] == REFERENCES["more8"]
    browser.press(chromium, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert chromium.find_element("id", "viewer-title").text == "more9 (10 of 60)"
    for _ in range(5):
        browser.press(chromium, Keys.TAB)
        assert chromium.execute_script("return !document.activeElement.closest('#gallery, #controls')"), "focus stays"
    browser.press(chromium, Keys.ESCAPE)
    assert not viewer.is_displayed()
    assert focused().accessible_name == "Open image more9", "where the reader was"
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("width", [1400, 390])
def test_a_screen_reader_finds_no_serious_fault(chromium, runs, width):
    for folder, dark in (("bad", False), ("both", True)):
        opened(chromium, runs / folder)
        browser.screen(chromium, width, dark=dark)
        assert browser.faults_for_readers(chromium) == []
        chromium.find_element("css selector", "#gallery button").click()
        assert browser.faults_for_readers(chromium) == []
    browser.screen(chromium)


def test_nothing_is_asked_of_any_server_and_every_control_has_a_name(chromium, runs):
    opened(chromium, runs / "bad")
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the log tells of the page itself"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    controls = chromium.find_elements("css selector", "input, select, summary, nav a")
    assert len(controls) > 8
    assert [control.get_attribute("outerHTML") for control in controls if not control.accessible_name] == []
    for folder in ("bad", "both"):
        chromium.get((runs / folder / "report.html").as_uri())
        headings = chromium.execute_script(
            "return [...document.querySelectorAll('th')].map((one) => one.textContent.trim())"
        )
        assert all(headings), "every row and column of a table has a name"
        assert "bad endings" in headings
        for width in (360, 390, 1280, 1400):
            browser.screen(chromium, width)
            assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
            cut = chromium.execute_script(
                "return [...document.querySelectorAll('svg text')].filter((text) => {"
                "const [own, all] = [text.getBoundingClientRect(), text.closest('svg').getBoundingClientRect()];"
                "return own.left < all.left - 0.5 || own.right > all.right + 0.5}).map((text) => text.textContent)"
            )
            assert cut == [], "every label of a chart is in sight"
            broken = chromium.execute_script(
                "return [...document.querySelectorAll('.interval')].filter((one) => one.getClientRects().length > 1).length"
            )
            assert broken == 0, "no interval is broken over two lines"
            wide = chromium.execute_script(
                "return [...document.querySelectorAll('.wide')].filter((one) => one.scrollWidth > one.clientWidth).length"
            )
            assert wide == 0, "tables of two runs fit"
    browser.screen(chromium)


def test_runs_stand_side_by_side_and_the_greatest_difference_first(chromium, runs):
    opened(chromium, runs / "both")
    assert chromium.find_element("tag name", "h1").text == "bad and good compared"
    choose(chromium, "order", "highest first")
    first = chromium.find_element("css selector", "#gallery > li")
    captions = [p.text for p in first.find_elements("css selector", ".prediction")]
    image = first.find_element("css selector", ".id").text
    assert captions == [BAD[image], GOOD[image]]
    assert image in ("dog", "cat", HOSTILE)
    chromium.find_element("css selector", "input[value='other:1']").click()
    assert sorted(cards(chromium)) == sorted(["dog", "cat", HOSTILE])
    assert chromium.get_log("browser") == []
    assert "hacked" not in chromium.title


def test_a_report_of_a_model_has_its_pictures_and_that_of_a_comparison_takes_them_over(chromium, tmp_path):
    captions = {f"photo{n}": ["a red ball.", "the green circle on grass."] for n in range(4)}
    dataset = tiny.write_photos(tmp_path / "photos", captions, dict.fromkeys(captions, "test"))
    model = tiny.build_folder(tmp_path)
    for name, beams in (("greedy", 1), ("beams", 3)):
        tiny.run(
            "evaluate.py", "--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", tmp_path / name,
            "--num_beams", beams, "--max_new_tokens", 5, *NO_JAVA,
        )  # fmt: skip
    tiny.run(
        "evaluate.py", "--compare", tmp_path / "greedy", tmp_path / "beams", "--output_dir", tmp_path / "c", *NO_JAVA
    )
    for folder in ("greedy", "c"):
        opened(chromium, tmp_path / folder)
        widths = chromium.execute_async_script(
            "const images = [...document.querySelectorAll('#gallery img')];"
            "Promise.all(images.map(image => image.decode())).then(() => arguments[0](images.map(i => i.naturalWidth)))"
        )
        assert widths == [32] * 4
    assert len(read_thumbnails(tmp_path / "c")) == 4


# ---------------------------------------------------------------------------------------------------------- comparison


def test_differences_are_those_of_the_scores_and_the_verdict_says_what_is_real(runs):
    found = json.loads((runs / "both/comparison.json").read_text())
    scores = {name: json.loads((runs / name / "coco_metrics.json").read_text()) for name in ("good", "bad")}
    assert found["baseline"] == "bad"
    assert set(found["differences"]["good"]) == {
        "Bleu_1",
        "Bleu_2",
        "Bleu_3",
        "Bleu_4",
        "ROUGE_L",
        "CIDEr",
        "sacrebleu",
    }
    for metric, test in found["differences"]["good"].items():
        assert test["difference"] == pytest.approx(scores["good"][metric] - scores["bad"][metric], abs=1e-9)
        if test["p"] is None:  # of the 63 images so few differ that many a resample has none of them
            assert test["interval"] is None
            assert not test["real"]
            continue
        assert test["interval"][0] <= test["difference"] <= test["interval"][1]
        assert test["real"] == (test["p_corrected"] < 0.05)
        assert test["p"] == test["p_corrected"], "two runs are one comparison: nothing to correct"
    assert "good against bad, 63 images" in (runs / "both.log").read_text()


def _rows(references, captions):
    without_java = MetricArguments(meteor=False, spice="false", bootstrap_samples=0)
    return score_captions(captions, references, without_java, seed=1)[1]


def _noisy(references, share, seed):
    chance = random.Random(seed)
    return {
        image: " ".join(
            chance.choice(tiny.VOCABULARY[:24]) if chance.random() < share else word for word in captions[0].split()
        )
        for image, captions in references.items()
    }


@pytest.fixture(scope="module")
def many():
    chance = random.Random(0)
    return {str(n): [" ".join(chance.choices(tiny.VOCABULARY[:24], k=9)) for _ in range(3)] for n in range(300)}


@pytest.mark.parametrize("share", [0.40, 0.37, 0.34, 0.2])
def test_p_of_a_mean_is_that_of_the_paired_z_test(many, share):
    one, two = _rows(many, _noisy(many, 0.4, seed=1)), _rows(many, _noisy(many, share, seed=2))
    found = paired_bootstrap(one, two, samples=4000, seed=3)
    for metric in ("CIDEr", "ROUGE_L"):
        differences = np.array([b["scores"][metric] - a["scores"][metric] for a, b in zip(one, two, strict=True)])
        z = differences.mean() / (differences.std() / len(differences) ** 0.5)
        assert found[metric]["p"] == pytest.approx(math.erfc(abs(z) / 2**0.5), abs=0.03)
        assert found[metric]["difference"] == pytest.approx(differences.mean())
        spread = 1.96 * differences.std() / len(differences) ** 0.5
        assert found[metric]["interval"] == pytest.approx(
            [differences.mean() - spread, differences.mean() + spread], abs=0.2 * spread
        )


def test_differences_of_a_corpus_score_are_the_librarys(many):
    from sacrebleu.metrics import BLEU

    one, two = _noisy(many, 0.4, seed=1), _noisy(many, 0.25, seed=2)
    test = paired_bootstrap(_rows(many, one), _rows(many, two), samples=500, seed=3)["sacrebleu"]
    references = [[captions[n] for captions in many.values()] for n in range(3)]
    library = [BLEU(lowercase=True).corpus_score(list(run.values()), references).score for run in (one, two)]
    assert test["difference"] == pytest.approx(library[1] - library[0], abs=1e-9)
    assert test["p"] < 0.01
    assert test["interval"][0] > 0


def test_a_run_beside_itself_is_equal_and_chance_is_called_real_as_rarely_as_it_should(many):
    rows = _rows(many, _noisy(many, 0.4, seed=1))
    same = paired_bootstrap(rows, rows, samples=200, seed=0)
    assert {(test["difference"], test["p"]) for test in same.values()} == {(0.0, 1.0)}
    # Captioners that are equally good: p is below 0.1 in about a tenth of such comparisons.
    p = [
        paired_bootstrap(rows, _rows(many, _noisy(many, 0.4, seed=seed)), samples=200, seed=0)["ROUGE_L"]["p"]
        for seed in range(2, 22)
    ]
    assert sum(value < 0.1 for value in p) <= 7
    assert np.mean(p) > 0.25


def test_one_score_is_tested_alone_and_on_the_images_that_have_it(many):
    one, two = _rows(many, _noisy(many, 0.4, seed=1)), _rows(many, _noisy(many, 0.3, seed=2))
    found = paired_bootstrap(one, two, samples=200, seed=0)
    for metric in ("Bleu_4", "CIDEr", "sacrebleu"):
        alone = paired_bootstrap(one, two, samples=200, seed=0, metric=metric)[metric]
        assert alone["interval"] == pytest.approx(found[metric]["interval"])
        assert (alone["difference"], alone["p"]) == (found[metric]["difference"], found[metric]["p"])
    for place in range(100):
        one[place]["scores"]["SPICE"], two[place + 50]["scores"]["SPICE"] = 0.1, 0.3
    test = paired_bootstrap(one, two, samples=200, seed=0, metric="SPICE")
    assert test["SPICE"]["difference"] == pytest.approx(0.2)
    assert test["SPICE"]["interval"] == pytest.approx([0.2, 0.2])


def test_several_runs_are_corrected_for_their_number(many):
    runs = {
        name: {"folder": name, "scores": {}, "rows": _rows(many, _noisy(many, share, seed))}
        for name, share, seed in (("a", 0.4, 1), ("b", 0.38, 2), ("c", 0.42, 3), ("d", 0.2, 4))
    }
    found = compare(runs, samples=500, seed=0)["differences"]
    p = sorted((found[name]["CIDEr"]["p"], found[name]["CIDEr"]["p_corrected"]) for name in "bcd")
    expected = np.maximum.accumulate([min(1, value * times) for (value, _), times in zip(p, (3, 2, 1), strict=True)])
    assert [corrected for _, corrected in p] == pytest.approx(list(expected))
    assert found["d"]["CIDEr"]["real"]


def test_runs_of_other_images_or_references_are_refused_by_name(runs, tmp_path):
    def changed(name, change):
        rows = [json.loads(line) for line in (runs / "good/per_image.jsonl").read_text().split("\n") if line]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "coco_metrics.json").write_text((runs / "good/coco_metrics.json").read_text())
        (folder / "per_image.jsonl").write_text("\n".join(map(json.dumps, change(rows))))
        return str(folder)

    good = str(runs / "good")
    fewer = changed("fewer", lambda rows: rows[1:])
    with pytest.raises(ValueError, match=r"fewer lacks 1 images of .*good: 'dog'"):
        read_runs([good, fewer])
    with pytest.raises(ValueError, match=r"fewer lacks 1 images of .*good: 'dog'"):
        read_runs([fewer, good])
    other = changed("other", lambda rows: [rows[0] | {"references": ["else"]}, *rows[1:]])
    with pytest.raises(ValueError, match=r"other and .*good have different references for 1 images: 'dog'"):
        read_runs([good, other])
    shuffled = read_runs([good, changed("shuffled", lambda rows: rows[::-1])])
    assert [[row["image_id"] for row in run["rows"]] for run in shuffled.values()] == [list(REFERENCES)] * 2
    with pytest.raises(ValueError, match="same folder is named twice"):
        read_runs([good, good])
    (tmp_path / "other/per_image.jsonl").write_text('{"image_id"')
    with pytest.raises(ValueError, match=r"other/per_image.jsonl is damaged"):
        read_runs([good, other])
    result = tiny.run("evaluate.py", "--compare", good, tmp_path, "--output_dir", tmp_path / "out", fails=True)
    assert "holds no coco_metrics.json" in result.stderr


# --------------------------------------------------------------------------------------------------------------- parts


def test_a_failing_report_costs_nothing_that_is_finished(tmp_path):
    files = _write(tmp_path / "files", predictions=GOOD, references=REFERENCES)
    (tmp_path / "out/report.html").mkdir(parents=True)  # a folder where the file should go
    result = tiny.run(
        "evaluate.py", "--predictions", files / "predictions.json", "--references", files / "references.json",
        "--output_dir", tmp_path / "out", *NO_JAVA,
    )  # fmt: skip
    assert "report.html could not be written; the scores are in" in result.stderr
    assert json.loads((tmp_path / "out/coco_metrics.json").read_text())["CIDEr"] > 0
    assert len((tmp_path / "out/per_image.jsonl").read_text().splitlines()) == len(REFERENCES)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_a_colour_or_count_is_contradicted_only_if_every_reference_says_another():
    colours, counts = (
        (lambda *texts: contradictions(*texts)["colour"]),
        (lambda *texts: contradictions(*texts)["count"]),
    )
    assert colours("a red dog", ["a blue dog", "a grey dog"]) == (["red"], ["blue", "gray"])
    assert colours("a red dog", ["a blue dog", "a dog"]) == ([], []), "the second says nothing of colour"
    assert colours("a red and blue dog", ["a blue dog"]) == (["red"], ["blue"])
    assert colours("a gray dog", ["a Grey dog"]) == ([], [])
    assert colours("a dog", ["a red dog"]) == ([], [])
    assert counts("three dogs", ["two dogs", "a pair of dogs"]) == (["3"], ["2"])
    assert counts("2 dogs", ["a couple of dogs"]) == ([], [])
    assert counts("one dog", ["two dogs"]) == ([], []), "one is said of anything"
    assert counts("two dogs", []) == ([], [])


def test_faults_name_what_is_wrong():
    captions = [
        "a man with a",
        "a dog dog runs",
        "a cat and a cat and a cat and a cat",
        "",
        "a dog\u200b runs",
        "a man runs.",
    ]
    rows = [{"caption": caption, "references": ["a man"]} for caption in captions]
    assert faults(rows) == [
        {"bad ending": "… a"},
        {"repeated words": "dog dog"},
        {"loop": "a cat and"},
        {"empty": "no words"},
        {"illegal characters": "U+200B"},
        {},
    ]


def test_thumbnails_are_small_and_a_damaged_picture_is_left_out(tmp_path, caplog):
    import base64
    import io

    Image.effect_noise((1600, 800), 90).convert("RGB").save(tmp_path / "wide.jpg")
    (tmp_path / "damaged.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes()[:2000])
    images = [tmp_path / "wide.jpg", {"path": str(tmp_path / "damaged.jpg"), "bytes": None}]
    made = thumbnails(["wide", "damaged"], images, [0.1, 0.2])
    assert list(made) == ["wide"]
    assert Image.open(io.BytesIO(base64.b64decode(made["wide"]))).size == (256, 128)
    assert "damaged" in caplog.text
    plain = Image.new("RGB", (300, 300))
    ids = [str(n) for n in range(1001)]
    assert Image.open(io.BytesIO(base64.b64decode(thumbnails(ids, [plain] * 1001, [0] * 1001)["7"]))).size == (192, 192)


def test_histograms_count_every_value_once():
    chart = histogram([0.0, 0.1, 0.1, 0.3, 1.9], "CIDEr")
    assert chart["bars"][0]["text"] == "0.0 to 0.1: 1 image"
    assert [bar["text"].split(": ")[1] for bar in chart["bars"]] == ["1 image", "2 images", "1 image", "1 image"]
    words = histogram([3, 3, 5], "words", whole=True)
    assert [(bar["text"], bar["height"]) for bar in words["bars"]] == [("3: 2 images", 40), ("5: 1 image", 20)]
    assert histogram([2.5, 2.5], "all the same")["bars"][0]["text"].endswith("2 images")
    assert histogram([-1.0, 1.0], "differences")["zero"] == pytest.approx(50, abs=5)


@pytest.mark.parametrize(
    ("value", "whole"), [(0.0, False), (0.37, False), (6, True), (0, True), (-0.4, False), (1e-6, False)]
)
def test_equal_values_are_one_narrow_bar_and_axes_of_scores_have_no_negative_part(value, whole):
    chart = histogram([value] * 5, "any", whole=whole)
    (bar,) = chart["bars"]
    assert bar["width"] <= 10
    assert len(chart["x_ticks"]) >= 3
    negative = any("\u2212" in tick["text"] for tick in chart["x_ticks"])
    assert not negative or value < 0
    panel = {"title": "any", "best_step": None, "lines": [{"label": None, "points": [(1, value), (2, value)]}]}
    (drawn,) = line_charts([panel])
    assert not any("\u2212" in tick["text"] for tick in drawn["y_ticks"]) or value < 0
    assert all(0 <= point["y"] <= 40 for point in drawn["lines"][0]["points"])


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_all_different_evenly_spaced_and_true(seed):
    chance = random.Random(seed)
    scale = 10 ** chance.uniform(-4, 4)
    low = chance.choice([0, chance.uniform(-3, 3)])
    values = [(low + chance.random()) * scale for _ in range(chance.choice([2, 5, 5000]))]
    chart = histogram(values, "any")
    assert sum(int(bar["text"].split(": ")[1].split()[0].replace(",", "")) for bar in chart["bars"]) == len(values)
    for axis, place in (("x_ticks", "x"), ("y_ticks", "y")):
        ticks = chart[axis]
        numbers = [float(tick["text"].replace(",", "").replace("\u2212", "-")) for tick in ticks]
        assert len(set(numbers)) == len(ticks) >= (2 if axis == "y_ticks" else 1)
        gaps = np.diff([tick[place] for tick in ticks])
        assert np.allclose(gaps, gaps[0] if len(gaps) else 0)
        assert np.allclose(np.diff(numbers), np.diff(numbers)[0] if len(gaps) else 0), (
            "labels are as far apart as ticks"
        )
        if axis == "x_ticks" and len(ticks) > 1:  # what a bar says of its edge is where it is drawn
            edge = float(chart["bars"][0]["text"].split(" to ")[0].replace(",", "").replace("\u2212", "-"))
            drawn = numbers[0] + (chart["bars"][0]["x"] - ticks[0]["x"]) * (numbers[1] - numbers[0]) / gaps[0]
            assert edge == pytest.approx(drawn, abs=1e-3 * (numbers[1] - numbers[0]))


def test_labels_of_small_steps_differ():
    assert labels([0.01, 0.015, 0.02], 0.005) == ["0.010", "0.015", "0.020"]
    assert labels([0, 2000, 4000], 2000) == ["0", "2,000", "4,000"]
    assert labels([-0.5, 0.0, 0.5], 0.5) == ["\u22120.5", "0.0", "0.5"]
    assert [float(text) for text in labels([0, 5e-5, 1e-4, 1.5e-4], 5e-5)] == [0, 5e-5, 1e-4, 1.5e-4]


LOG = [
    *({"step": step, "loss": 4 - step / 500, "learning_rate": 1e-3} for step in range(10, 1001, 10)),
    *({"step": step, "eval_loss": 3, "eval_CIDEr": step / 1000, "eval_sacrebleu": 9} for step in (400, 800)),
]


def test_training_charts_share_their_steps_and_mark_the_checkpoint_that_was_kept(tmp_path):
    panels = training_panels(TrainerState(log_history=LOG, best_global_step=800))
    drawn = line_charts(panels)
    assert [chart["title"] for chart in drawn] == [
        "Loss",
        "Learning rate",
        "CIDEr, validation",
        "sacreBLEU, validation",
    ]
    assert len({tuple((tick["x"], tick["text"]) for tick in chart["x_ticks"]) for chart in drawn}) == 1
    training, validation = drawn[0]["lines"]
    assert (training["points"][0]["x"], training["points"][-1]["x"]) == (0, 100)
    place = {
        round(float(point["text"].split(":")[0].removeprefix("step ").replace(",", ""))): point["x"]
        for point in training["points"]
    }
    assert {chart["best"]["x"] for chart in drawn} == {place[800]}
    assert [point["x"] for point in drawn[3]["lines"][0]["points"]] == [place[400], place[800]]
    assert not training["marked"]
    assert validation["marked"]
    plot_curves(panels, tmp_path)
    assert Image.open(tmp_path / "training_curves.png").size == (1350, 900)


def test_a_run_without_validation_has_the_charts_of_what_it_logged(tmp_path):
    panels = training_panels(TrainerState(log_history=[row for row in LOG if "loss" in row][:1]))
    assert [chart["title"] for chart in line_charts(panels)] == ["Loss", "Learning rate"]
    assert line_charts(panels)[0]["best"] is None
    plot_curves(panels, tmp_path)
    assert (tmp_path / "training_curves.svg").stat().st_size
    assert training_panels(TrainerState(log_history=[])) == []
    plot_curves([], tmp_path)


@pytest.mark.parametrize("last", [1, 2, 18, 35, 20_000])
def test_curves_are_drawn_over_whole_steps(tmp_path, monkeypatch, last):
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")  # letters, where the file that people get has outlines
    log = [{"loss": 1 / step, "step": step} for step in range(1, last + 1, -(-last // 18))]
    plot_curves(training_panels(TrainerState(log_history=log)), tmp_path)
    axis = ElementTree.parse(tmp_path / "training_curves.svg").find(".//*[@id='matplotlib.axis_1']")
    *ticks, name = ["".join(text.itertext()).strip() for text in axis.iter("{http://www.w3.org/2000/svg}text")]
    assert name == "step"
    assert ticks
    assert [tick for tick in ticks if not tick.lstrip("\N{MINUS SIGN}").isdigit()] == []


def test_charts_in_files_and_in_the_report_have_the_same_colours():

    style = (ROOT / "reports/report.css").read_text(encoding="utf-8")
    light = style.split("@media")[0]
    assert [f"--run{number}: {colour}" in light for number, colour in enumerate(COLOURS)] == [True] * len(COLOURS)


def test_a_report_without_pictures_says_so(runs):
    page = (runs / "good/report.html").read_text()
    assert "Without pictures: none were given; --image_dir names their folder." in page
    assert '<script type="application/json" id="thumbnails">{}</script>' in page
    assert page.count("<img") == 0


def test_a_report_of_one_image_opens(chromium, tmp_path):
    metrics = MetricArguments(meteor=False, spice=False, bootstrap_samples=100)
    scores, rows = score_captions({"dog": "a red dog"}, {"dog": REFERENCES["dog"]}, metrics, seed=1)
    scores |= {"predictions": "one.json", "command": "", "generation": None}
    write_report(tmp_path, scores, rows, [Image.new("RGB", (64, 48), "red")])
    opened(chromium, tmp_path)
    assert chromium.find_element("id", "found").text == "1 of 1 image"
    assert cards(chromium) == ["dog"]
    chromium.find_element("css selector", "#gallery img").click()
    assert chromium.find_element("id", "viewer-title").text == "dog (1 of 1)"
    for button in ("previous", "next"):
        assert not chromium.find_element("id", button).is_enabled()
    chromium.find_element("id", "close").click()


def test_a_failure_inside_the_report_is_logged_not_raised(tmp_path, caplog):
    write_report(tmp_path, {}, [], None)
    assert "report.html could not be written" in caplog.text


def test_a_card_shows_where_the_model_looked_for_each_word(chromium, tmp_path):
    model = tiny.build_folder(tmp_path)
    words = ("dog", "cat", "ball", "star")
    captions = {f"photo{n}": [f"a red {word}", f"the {word}"] for n, word in enumerate(words)}
    photos = tiny.write_photos(tmp_path / "photos", captions, dict.fromkeys(captions, "test"))
    tiny.run(
        "evaluate.py", "--model_name_or_path", model, "--dataset_name", photos, "--split", "test", "--output_dir",
        tmp_path / "out", "--min_new_tokens", 4, "--max_new_tokens", 6, "--report_maps", 2, *NO_JAVA,
    )  # fmt: skip
    opened(chromium, tmp_path / "out")
    assert chromium.execute_script("return Object.keys(looks).length") == 2, "as many as were asked for"
    chromium.find_element("css selector", "#gallery img").click()
    caption = chromium.find_element("css selector", "#opened .prediction").text
    words = browser.wait(lambda: [figure.text for figure in chromium.find_elements("css selector", ".looks figure")])
    assert words == caption.split() != []
    dark, light = chromium.execute_script(
        "const canvas = document.querySelector('.looks canvas');"
        "const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return [Math.min(...pixels), Math.max(...pixels.filter((_, index) => index % 4 < 3))];"
    )
    assert light > dark
    assert chromium.get_log("browser") == []
