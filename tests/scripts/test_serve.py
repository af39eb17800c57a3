"""serve.py as it runs: driven by OpenAI's own client, and by requests that nobody should send."""

import base64
import io
import json
import math
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from scipy import stats

import serve
from captioner import Captioner
from data.prompts import PROMPTS
from models.loading import build_model
from objectives import token_log_probs

pytest.importorskip("uvicorn", reason="uvicorn is not installed (requirements-dev.txt)")
COLOURS = ("red", "green", "blue", "white", "black")


def picture(colour: str, size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def message(content: bytes, *texts: str) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(content).decode()}}
    return [{"role": "user", "content": [*({"type": "text", "text": text} for text in texts), image]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = tiny.start(
        "serve.py", "--model_name_or_path", model, "--port", port, "--max_request_mb", 1, "--max_megapixels", 1
    )
    address, deadline = f"http://127.0.0.1:{port}", time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            urllib.request.urlopen(f"{address}/health").close()
            break
        except OSError:
            time.sleep(0.2)
    yield address
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, said.splitlines()[-1]) == (130, "serve.py: stopped."), said


@pytest.fixture(scope="module")
def client(address):
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    block, named = page.partition("```python\n")[2].partition("```")[0], {"openai": openai}
    assert "http://127.0.0.1:8000" in block
    exec(block.replace("http://127.0.0.1:8000", address), named)
    return named["client"].with_options(max_retries=0)


def test_openais_client_gets_the_captions_of_infer(client, model):
    captioner = Captioner.from_pretrained(model)
    (listed,) = client.models.list().data
    assert listed.id == model.name
    for colour in COLOURS:
        answer = client.chat.completions.create(model=listed.id, messages=message(picture(colour)))
        assert answer.choices[0].message.content == captioner([Image.open(io.BytesIO(picture(colour)))])[0]
    asked = {"max_tokens": 3, "messages": message(picture("red"), "a picture of")}
    answer = client.chat.completions.create(model="model", **asked)
    own = captioner.with_settings(prompt="a picture of", max_new_tokens=3)
    assert answer.choices[0].message.content == own([Image.open(io.BytesIO(picture("red")))])[0]
    assert (answer.choices[0].finish_reason == "length") == (answer.usage.completion_tokens == 3)
    assert answer.usage.prompt_tokens > 1
    for braces in ("a {thing} of", "{{red}} dog"):  # a client's text is no template
        answer = client.chat.completions.create(model="model", messages=message(picture("red"), braces), n=None)
        batch = captioner.collator([{"image": picture("red"), "image_id": "0", PROMPTS: [braces]}])
        assert answer.choices[0].message.content == captioner.caption_batch(batch)[0][0]
    drawn = {
        client.chat.completions.create(model="model", temperature=2.0, messages=message(picture("red")))
        .choices[0]
        .message.content
        for _ in range(5)
    }
    assert len(drawn) > 1


@pytest.mark.parametrize("asked", [{"temperature": 1.0}, {"temperature": 1.6}, {"temperature": 0.7, "top_p": 0.9}])
def test_drawn_words_are_as_frequent_as_the_model_says(asked, tmp_path):
    """2,000 first words of a vocabulary larger than the 50 that `generate` draws from by itself."""
    with open(tiny.write_vocabulary(tmp_path), "a", encoding="utf-8") as vocabulary:
        vocabulary.writelines(f"\nword{number}" for number in range(40))
    torch.manual_seed(0)
    model, processor = build_model(str(tiny.write_config(tmp_path)), str(tmp_path / "vocab.txt"), [], True)
    with torch.no_grad():
        model.text_decoder.get_output_embeddings().bias.copy_(torch.randn(model.config.text_config.vocab_size))
    captioner = Captioner(model.eval(), processor, seed=None)
    server = serve.Server(captioner, "model", SimpleNamespace(max_megapixels=1))
    body = {"model": "model", "messages": message(picture("red")), "max_tokens": 1} | asked
    (settings, prompt), image = server.job_of(body)
    words = Counter(text for text, *_ in server.captions(settings, prompt, [image] * 2000))
    tokens = [[token] for token in range(model.config.text_config.vocab_size)]
    batch = captioner.collator([{"image": image, "image_id": "0"}])
    with torch.no_grad():
        log_probs = token_log_probs(model, captioner.training_batch(batch, tokens)).sum(dim=1)
    warped = (log_probs.double() / asked["temperature"]).softmax(dim=0)
    order = warped.argsort(descending=True)
    warped[order[warped[order].cumsum(dim=0) - warped[order] >= asked.get("top_p", 1)]] = 0
    probabilities = Counter()
    for text, share in zip(captioner.texts(torch.tensor(tokens)), (warped / warped.sum()).tolist(), strict=True):
        probabilities[text] += share
    assert len(words) > (50 if "top_p" not in asked else 20)
    assert all(probabilities[word] > 0 for word in words)
    usual = [word for word, share in probabilities.items() if 2000 * share >= 5]
    counts = [words[word] for word in usual]
    expected = [2000 * probabilities[word] for word in usual]
    rest = 2000 - sum(expected)
    if rest > 1e-6:
        counts, expected = [*counts, 2000 - sum(counts)], [*expected, rest]
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_infer_captions_with_it_as_it_does_without(address, model, tmp_path):
    for colour in COLOURS:
        (tmp_path / "photos" / f"{colour}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{colour}.png").write_bytes(picture(colour))
    flags = (tmp_path / "photos", "--output")
    tiny.run("infer.py", *flags, tmp_path / "own.jsonl", "--model_name_or_path", model)
    served = ("--model_name_or_path", f"openai:{model.name}", "--base_url", f"{address}/v1", "--prompt", "")
    tiny.run("infer.py", *flags, tmp_path / "served.jsonl", *served)
    own, asked = (
        list(map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())) for name in ("own", "served")
    )
    assert [(row["image"], row["caption"]) for row in asked] == [(row["image"], row["caption"]) for row in own]


def test_two_hundred_requests_at_once_are_each_answered_with_their_own_caption(client, model):
    captioner = Captioner.from_pretrained(model)
    pictures = [picture(COLOURS[n % 5], (20 + n, 30)) for n in range(200)]
    texts = ["" if n % 3 else "a picture of" for n in range(200)]

    def ask(n: int) -> str:
        answer = client.chat.completions.create(model="model", messages=message(pictures[n], texts[n]))
        return answer.choices[0].message.content

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for prompt in ("", "a picture of"):
        own = [n for n in range(200) if texts[n] == prompt]
        captions = captioner.with_settings(prompt=prompt or None)([Image.open(io.BytesIO(pictures[n])) for n in own])
        assert [answers[n] for n in own] == captions


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not a JSON object"),
        (b"[]", 400, "not a JSON object"),
        (b" " * 1_100_000, 413, "larger than 1 megabytes"),
        (b"[" * 100_000, 400, "not a JSON object"),
        ({}, 400, "messages must be a list"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "content must be text"),
        ({"model": "gpt-4o", "messages": message(picture("red"))}, 404, "'gpt-4o' is not here: this server has 'model'"),
        ({"messages": message(picture("red")), "max_tokens": math.inf}, 400, "max_tokens must be a number from 1"),
        ({"messages": message(picture("red")) * 2}, 400, "2 images"),
        ({"messages": [{"role": "user", "content": "hello"}]}, 400, "0 images"),
        ({"messages": [{"role": "system", "content": "hello"}]}, 400, "one message of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "parts of type text and image_url"),
        ({"messages": message(b"no image")}, 400, "nothing is fetched"),
        ({"messages": message(picture("red")[:60])}, 400, "truncated|damaged|not an image"),
        ({"messages": message(picture("red", (2000, 1000)))}, 400, "too large"),
        ({"messages": message(picture("red")), "stream": True}, 400, "stream"),
        ({"messages": message(picture("red")), "n": 3}, 400, "one caption per request"),
        ({"messages": message(picture("red")), "max_tokens": 0}, 400, "max_tokens must be a number from 1"),
        ({"messages": message(picture("red")), "temperature": "hot"}, 400, "temperature must be a number"),
    ],
)  # fmt: skip
def test_a_request_with_a_mistake_is_refused_in_one_sentence(body, status, said, address):
    content = body if isinstance(body, bytes) else json.dumps({"model": "model"} | body).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", content))
    assert refused.value.code == status
    error = json.loads(refused.value.read())["error"]["message"]
    assert re.search(said, error), error


def test_an_address_is_not_fetched(address):
    fetched = {"type": "image_url", "image_url": {"url": f"{address}/health"}}
    body = json.dumps({"model": "model", "messages": [{"role": "user", "content": [fetched]}]}).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", body))
    assert "nothing is fetched" in refused.value.read().decode()


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(address, model):
    failed = tiny.run("serve.py", "--model_name_or_path", model, "--port", address.rpartition(":")[2], fails=True)
    assert "Address already in use" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_model_whose_prompt_holds_columns_is_refused_at_the_start(model):
    failed = tiny.run("serve.py", "--model_name_or_path", model, "--port", 0, "--prompt", "near {category}", fails=True)
    assert "holds columns, which a request has not" in failed.stderr
