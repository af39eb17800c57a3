"""The demo as it runs: the script itself, driven by gradio_client and by a browser."""

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import browser
import numpy as np
import proxy
import pytest
import tiny
import yaml
from llm_server import LLMServer
from PIL import Image

from captioner import Captioner

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed (requirements-dev.txt)")
PATH = "/captions/demo"
SETTINGS = {"num_captions": 3, "num_beams": 4, "max_new_tokens": 8}


def serve(*arguments):
    """(process, address) of a demo that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = tiny.start("demo.py", *arguments, "--port", port)
    address, deadline = f"http://127.0.0.1:{port}", time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            urllib.request.urlopen(f"{address}/gradio_api/startup-events").close()
            return process, address
        except urllib.error.HTTPError:
            return process, address
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(model):
    process, address = serve("--model_name_or_path", model, "--max_images", 25, "--root_path", PATH)
    yield address
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, said.splitlines()[-1]) == (130, "demo.py: stopped."), said


@pytest.fixture(scope="module")
def client(address):
    with proxy.serve(address, PATH) as (shown, _):
        yield gradio_client.Client(shown, verbose=False)


def picture(number: int) -> Image.Image:
    """A photograph where there is real data, else noise."""
    if folder := os.environ.get("CAPTION_TEST_DATA"):
        return Image.open(sorted(Path(folder, "flickr8k").rglob("*.jpg"))[number]).convert("RGB")
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    picture(0).save(folder / "photo.png")
    (folder / "text.jpg").write_text("this is no picture")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number in range(20):
            file = io.BytesIO()
            picture(number).save(file, "PNG")
            archive.writestr(f"photo {number}.png", file.getvalue())
    shutil.copy(folder / "photos.zip", folder / "mixed.zip")
    with zipfile.ZipFile(folder / "mixed.zip", "a") as archive:
        archive.writestr("bad.jpg", b"this is no picture")
    return folder


@pytest.mark.slow
def test_an_exported_space_starts_by_itself_and_captions(model, files, tmp_path):
    flags = {"dataset_name": "/home/me/secret/captions.csv"}
    run = {"flags": flags, "versions": {}, "commit": "0", "command": f"train.py {flags['dataset_name']}"}
    (model / "run.json").write_text(json.dumps(run))
    tiny.run("export.py", model, "--space", tmp_path / "space")
    (model / "run.json").unlink()
    space = tmp_path / "space"
    texts = [path.read_text(encoding="utf-8") for path in space.rglob("*") if path.suffix in (".md", ".json")]
    assert not any("/home/me" in text for text in texts)
    front = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"], front["title"]) == ("gradio", "app.py", model.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--host", "127.0.0.1", "--port", str(port))
    process = subprocess.Popen([sys.executable, "app.py", *flags], cwd=space, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline:
        try:
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            break
        except Exception:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.5)
    best = client.predict(image=gradio_client.handle_file(files / "photo.png"), api_name="/caption")[0]
    process.terminate()
    process.communicate(timeout=30)
    assert [best] == Captioner.from_pretrained(model)([picture(0)])


def test_the_captions_are_the_captioners_own_with_scores_and_a_map_a_word(client, model, files):
    best, table, html = client.predict(
        image=gradio_client.handle_file(files / "photo.png"), **SETTINGS, api_name="/caption"
    )
    captioner = Captioner.from_pretrained(model, num_beams=4, max_new_tokens=8, num_return_sequences=3)
    (expected,) = captioner.caption_batch(captioner.collator([{"image": picture(0), "image_id": "0"}]))
    assert {caption for caption, _ in table["data"]} == set(expected)
    scores = [float(score) for _, score in table["data"]]
    assert scores == sorted(scores, reverse=True)
    assert all(score < 0 for score in scores)
    assert table["data"][0][0] == best
    assert html.count("<figure>") == len(best.split()) > 0
    assert [word in html for word in best.split()]


def test_a_model_on_a_server_captions_on_the_page(files, model):
    refused = []

    def answer(uri, request):
        if request["messages"][0]["content"][1]["text"] == "Refuse.":
            refused.append(uri)
            return ["", "content_filter"] if uri == refused[0] else "a dog"
        texts = [f"text {number}" for number in range(request.get("n", 1))]
        choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": t}} for t in texts]
        return 200, {"id": "1", "object": "chat.completion", "choices": choices}, {}

    with LLMServer(answer) as server:
        served = ("--model_name_or_path", "openai:small", "--base_url", server.url)
        process, address = serve(*served, "--prompt", "Which?", "--compare_to", model)
        try:
            client = gradio_client.Client(address, verbose=False)
            photo = gradio_client.handle_file(files / "photo.png")
            best, table, html, here, *_ = client.predict(image=photo, api_name="/caption")
            assert (best, table["data"], html) == ("text 0", [["text 0", ""]], "")
            assert [here] == Captioner.from_pretrained(model, prompt="Which?")([picture(0)])
            sampled = {"do_sample": True, "num_captions": 2, "temperature": 0.5, "max_new_tokens": 9, "prompt": "Again"}
            _, table, *_ = client.predict(image=photo, **sampled, api_name="/caption")
            assert [row[0] for row in table["data"]] == ["text 0", "text 1"]
            request = server.requests[-1][1]
            assert (request["n"], request["temperature"], request["max_tokens"]) == (2, 0.5, 9)
            assert request["messages"][0]["content"][1]["text"] == "Again"
            zipped = [gradio_client.handle_file(files / "photos.zip")]
            status, table, _ = client.predict(files=zipped, prompt="Refuse.", api_name="/caption_files")
            assert "19 of 20" in status
            errors = [row for row in table["data"] if row[2]]
            assert [row[1:] for row in errors] == [["", "the server's filter refused it"]]
        finally:
            process.terminate()
            process.wait(20)


def test_settings_are_bounded_and_mistakes_are_said(client, files):
    def said(**settings):
        with pytest.raises(Exception) as error:  # noqa: PT011 - gradio_client's own class, which differs by version
            client.predict(**{"image": gradio_client.handle_file(files / "photo.png")} | settings, api_name="/caption")
        return str(error.value)

    assert "1000" in said(num_beams=1000)
    assert "min_new_tokens, 20, is more than max_new_tokens, 10" in said(min_new_tokens=20, max_new_tokens=10)
    assert "are more than the 64 positions of the model" in said(max_new_tokens=100)
    assert "200 characters" in said(prompt="a " * 101)
    assert "Give an image first" in said(image=None)
    message = said(image=gradio_client.handle_file(files / "text.jpg"))
    assert message.startswith("text.jpg: not an image")
    assert "fetches no URLs" in said(image={"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}})


def test_what_the_page_does_not_show_stays_as_it_was_started(tmp_path):
    from demo_page import with_settings

    model, processor = tiny.build(tmp_path)
    started = Captioner(model, processor, no_repeat_ngram_size=2, keep_prompt=True, num_beams=1)
    page = {"num_captions": 2, "num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 0, "length_penalty": 2.0}
    page |= {"repetition_penalty": 1.0, "do_sample": False, "temperature": 1.0, "top_p": 0.9, "prompt": "a"}
    new = with_settings(started, **page)
    assert new.keep_prompt
    assert new.settings["no_repeat_ngram_size"] == 2
    assert (new.settings["num_beams"], new.settings["length_penalty"], new.prompt) == (2, 2.0, "a")


def test_sampling_draws_captions_and_a_prompt_goes_before_them(client, files):
    image = gradio_client.handle_file(files / "photo.png")
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "num_captions": 5, "max_new_tokens": 8}
    drawn = {tuple(map(tuple, client.predict(image=image, **settings, api_name="/caption")[1]["data"])) for _ in "ab"}
    assert len(drawn) == 2
    _, _, html = client.predict(image=image, prompt="a picture of", max_new_tokens=8, api_name="/caption")
    assert "<figure>" in html


def test_many_images_become_a_table_and_two_files(client, model, files):
    images = [gradio_client.handle_file(files / name) for name in ("photos.zip", "text.jpg", "photo.png")]
    status, table, (as_csv, as_text) = client.predict(files=images, max_new_tokens=8, api_name="/caption_files")
    assert "21 of 22 captioned" in status
    captioner = Captioner.from_pretrained(model, max_new_tokens=8)
    expected = captioner([picture(number) for number in range(20)])
    with open(as_csv, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows[:20]] == expected
    assert [row["file"] for row in rows[:2]] == ["photo 0.png", "photo 1.png"]
    assert rows[20]["error"].startswith("text.jpg: not an image")
    assert rows[21]["caption"] == expected[0]
    assert len(table["data"]) == 22
    lines = Path(as_text).read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"photo 0.png\t{expected[0]}"
    assert len(lines) == 21
    with pytest.raises(Exception, match="40 files are more than the 25"):
        client.predict(files=images[:1] * 2, api_name="/caption_files")


@pytest.mark.slow
def test_a_login_is_asked_for_and_two_models_answer_side_by_side(model, files, tmp_path):
    (tmp_path / "users").write_text("ann:secret\n")
    other = tiny.build_folder(tmp_path, seed=1)
    command = ["--model_name_or_path", model, "--compare_to", other, "--login", tmp_path / "users"]
    process, address = serve(*command)
    try:
        with pytest.raises(Exception, match=r"[Aa]uth|401|login|credentials"):
            gradio_client.Client(address, verbose=False)
        client = gradio_client.Client(address, auth=("ann", "secret"), verbose=False)
        image = gradio_client.handle_file(files / "photo.png")
        answer = client.predict(image=image, max_new_tokens=8, api_name="/caption")
        expected = [Captioner.from_pretrained(name, max_new_tokens=8)([picture(0)])[0] for name in (model, other)]
        assert all(
            caption in [row[0] for row in answer[n]["data"]] for n, caption in zip((1, 4), expected, strict=True)
        )
    finally:
        process.terminate()
        process.wait(20)


def test_a_port_that_is_taken_is_one_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}" in tiny.run("demo.py", "--port", port, fails=True).stderr


def test_the_examples_are_the_pictures_of_the_models_own_report(tmp_path):
    import demo
    from arguments import MetricArguments
    from reports.outputs import score_captions, write_scores
    from reports.report import write_report

    pictures = [Image.new("RGB", (60, 40), colour) for colour in ("red", "lime", "blue", "white", "black")]
    captions = {str(n): "a dog" for n in range(len(pictures))}
    quick = MetricArguments(meteor=False, spice="false", bootstrap_samples=0)
    scores, rows = score_captions(captions, {n: [text] for n, text in captions.items()}, quick, 0)
    (tmp_path / "run").mkdir()
    write_report(tmp_path / "run", write_scores(tmp_path / "run", scores, rows), rows, pictures)
    (tmp_path / "out").mkdir()
    paths = demo.pictures_of_run(str(tmp_path / "run"), str(tmp_path / "out"))
    found = [Image.open(path).convert("RGB").getpixel((20, 20)) for path in paths]
    assert len(found) == 4
    for pixel, picture in zip(found, pictures, strict=False):
        assert np.allclose(pixel, picture.getpixel((0, 0)), atol=20)
    assert demo.pictures_of_run(str(tmp_path), str(tmp_path / "out")) == []


def test_no_path_of_the_server_is_shown(tmp_path):
    from demo import shown_names

    for name in ("a/model", "b/model", "c"):
        (tmp_path / name).mkdir(parents=True)
    assert shown_names([str(tmp_path / "c"), "Salesforce/blip-image-captioning-base"]) == [
        "c", "Salesforce/blip-image-captioning-base",
    ]  # fmt: skip
    assert shown_names([str(tmp_path / "a/model"), str(tmp_path / "b/model")]) == ["model (1)", "model (2)"]


def test_a_visitor_captions_a_photo_changes_beams_and_downloads_a_batch(address, client, model, files, tmp_path):
    """Through a proxy that shows the demo under a path."""
    driver = browser.start()
    try:
        driver.set_page_load_timeout(60)
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        with proxy.serve(address, PATH) as (shown, lost):
            visit(driver, shown, client, files, tmp_path)
            assert str(model.parent) not in driver.page_source
            assert lost == [], "the page asks for nothing outside of its path"
        requests = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
        assert urls
        assert not [url for url in urls if not url.startswith((shown, "data:", "blob:"))]
    finally:
        driver.quit()


def visit(driver, address, client, files, downloads):
    from selenium.webdriver.common.keys import Keys

    until = browser.wait

    def button(text):
        found = driver.find_elements("xpath", f"//button[contains(., '{text}')]")
        return next(element for element in found if element.is_displayed())

    def best():
        return driver.find_element("css selector", ".best textarea").get_attribute("value")

    def text():
        return driver.find_element("tag name", "body").text

    driver.get(address)
    until(lambda: button("Caption it"))
    time.sleep(1)
    assert browser.faults_for_readers(driver) == []
    driver.find_element("css selector", "input[type=file]").send_keys(str(files / "photo.png"))
    first = until(best)
    image = gradio_client.handle_file(files / "photo.png")
    assert first == client.predict(image=image, api_name="/caption")[0]
    browser.screen(driver, 390)
    time.sleep(1)
    places = [driver.find_element("css selector", selector).rect["y"] for selector in (".best", ".gallery-item")]
    assert places == sorted(places), "on a phone the caption comes before the examples"
    button("Settings").click()
    parts = driver.find_elements("css selector", ".settings .form > *")
    until(lambda: all(part.is_displayed() for part in parts))
    assert len(parts) == 10
    assert len({round(part.rect["x"]) for part in parts}) == 1, "on a phone each setting has a line"
    button("Settings").click()
    browser.screen(driver)

    button("Settings").click()
    for label, number in (("Captions", 1), ("Beams", 1), ("Longest", 5)):
        field = until(
            lambda label=label: driver.find_element("css selector", f"input[type=number][aria-label*='{label}']")
        )
        driver.execute_script("arguments[0].select()", field)
        field.send_keys(str(number) + "\t")
    expected = client.predict(image=image, num_captions=1, num_beams=1, max_new_tokens=5, api_name="/caption")[0]
    driver.execute_script("arguments[0].focus()", button("Caption it"))
    browser.press(driver, Keys.ENTER)
    until(lambda: best() == expected != first)

    driver.find_element("css selector", "button[aria-label='Remove Image']").click()
    until(lambda: driver.find_element("css selector", "input[type=file]")).send_keys(str(files / "text.jpg"))
    until(lambda: "text.jpg: not an image" in text())
    until(lambda: not driver.find_elements("css selector", ".picture img") and not best(), "the bad file stays")
    pills = "return [...document.querySelectorAll('span.error')].filter((one) => one.checkVisibility()).length"
    until(lambda: driver.execute_script(pills) == 0, "an error stays on the page")

    button("Many images").click()
    assert "Download as CSV" not in text(), "no empty box"
    fields = until(lambda: driver.find_elements("css selector", "input[type=file][multiple]"))
    fields[-1].send_keys(str(files / "mixed.zip"))
    until(lambda: "mixed" in text())
    time.sleep(1)
    button("Caption them all").click()
    until(lambda: "20 of 21 captioned" in text(), text)
    error = until(lambda: driver.find_element("xpath", "//td[contains(., 'bad.jpg: not an image')]"))
    assert 0 < error.rect["x"] < error.rect["x"] + error.rect["width"] <= 1280, "what is wrong is in sight"
    until(lambda: driver.find_element("css selector", "a[download='captions.csv'], a[href$='captions.csv']")).click()
    until(lambda: list(downloads.glob("*.csv")))
    (table,) = downloads.glob("*.csv")
    assert len(list(csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"))))) == 22
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if "text.jpg" not in message], severe  # the browser cannot show that one


class SecondReadsAsFirst(Captioner):
    """Its first and third beam have other tokens and the same text, as invalid bytes have."""

    def texts(self, tokens):
        return ["a dog", "a cat", "a dog"]


def test_the_first_beam_is_shown_first_though_a_later_one_reads_the_same(tmp_path):
    import demo_page

    captioner = SecondReadsAsFirst(*tiny.build(tmp_path), num_beams=3, num_return_sequences=3, max_new_tokens=4)
    shown = demo_page.candidates(captioner, Image.new("RGB", (32, 32)))
    assert [text for text, _ in shown] == ["a dog", "a cat"]
