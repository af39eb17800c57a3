"""inference.py: the handlers by themselves, then behind the real inference toolkit and model server."""

import base64
import contextlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from sagemaker_envs import program

sys.path.insert(0, str(ROOT / "sagemaker"))
import inference

import bundle
from benchmarks.speed import serving
from captioner import Captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny.build(folder)
    serving.make_sensitive(model)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def captioner(model):
    return inference.model_fn(str(model))


@pytest.fixture(scope="module")
def photos(captioner):
    return serving.distinct_photos(captioner)


def answer(captioner, body, content_type, accept="application/json"):
    return inference.output_fn(inference.predict_fn(inference.input_fn(body, content_type), captioner), accept)


def as_json(photos, **more) -> str:
    return json.dumps({"inputs": [base64.b64encode(photo).decode() for photo in photos], **more})


def test_every_content_type_gives_the_captioners_own_captions(captioner, photos):
    expected = captioner(photos)
    assert len(set(expected)) >= 3
    for body, headers, members, _ in serving.valid_requests(photos):
        text = answer(captioner, body, headers["Content-Type"])
        assert serving.captions_of(text.encode()) == [expected[index] for index in members]


def test_parameters_are_the_captioners_settings(captioner, photos):
    parameters = {"num_beams": 3, "max_new_tokens": 5, "prompt": "a picture of"}
    text = answer(captioner, as_json(photos[:2], parameters=parameters), "application/json")
    expected = Captioner(captioner.model, captioner.processor, **parameters)(photos[:2])
    assert json.loads(text) == {"captions": expected}


def test_whole_numbers_will_do_where_numbers_are_asked_for(captioner, photos):
    of_numbers = [
        answer(captioner, as_json(photos[:1], parameters=parameters), "application/json")
        for parameters in (
            {"repetition_penalty": 3, "length_penalty": 2},
            {"repetition_penalty": 3.0, "length_penalty": 2.0},
        )
    ]
    assert of_numbers[0] == of_numbers[1]


def test_scores_are_the_mean_log_probability_that_generation_gave_the_tokens(captioner, photos):
    text = answer(
        captioner, as_json(photos[:2], parameters={"num_beams": 1, "return_scores": True}), "application/json"
    )
    result = json.loads(text)
    greedy = Captioner(captioner.model, captioner.processor, num_beams=1)
    assert result["captions"] == greedy(photos[:2])
    for photo, score in zip(photos[:2], result["scores"], strict=True):
        batch = greedy.collator([{"image": photo, "image_id": "0"}])
        output = greedy.generate_tokens(batch, return_dict_in_generate=True, output_logits=True)
        steps = torch.stack(output.logits).log_softmax(-1).max(-1).values  # greedy: the token is the likeliest
        assert score == pytest.approx(steps.mean().item(), abs=1e-3)


def test_a_bad_line_of_json_lines_is_answered_by_an_error_and_costs_the_others_nothing(captioner, photos):
    good = json.dumps({"inputs": base64.b64encode(photos[0]).decode()})
    few = json.dumps({"inputs": base64.b64encode(photos[1]).decode(), "parameters": {"max_new_tokens": 2}})
    lines = answer(captioner, "\n".join([good, "{", few, good]), "application/jsonlines").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0] == rows[3] == {"captions": captioner(photos[:1])}
    assert rows[1]["error"].startswith("The body is not JSON")
    assert rows[2] == {"captions": Captioner(captioner.model, captioner.processor, max_new_tokens=2)(photos[1:2])}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"inputs": "x" * 10}, "not base64"),
        ({"inputs": 3}, "must be text"),
        ({"inputs": []}, "1 to 16 images, not 0"),
        ({"inputs": ["AAAA"] * 17}, "1 to 16 images, not 17"),
        ({"inputs": "AAAA"}, "not an image"),
        ({"image": "AAAA"}, 'object with "inputs"'),
        ({"inputs": "AAAA", "prompt": "a"}, "'prompt' is not known"),
        ({"inputs": "AAAA", "parameters": []}, '"parameters" must be an object'),
        ({"inputs": "AAAA", "parameters": {"num_beams": 11}}, "num_beams must be a whole number from 1 to 10"),
        ({"inputs": "AAAA", "parameters": {"num_beams": True}}, "num_beams must be"),
        ({"inputs": "AAAA", "parameters": {"num_beams": 10**50}}, "num_beams must be"),
        ({"inputs": "AAAA", "parameters": {"length_penalty": float("nan")}}, "length_penalty must be a number"),
        ({"inputs": "AAAA", "parameters": {"do_sample": True}}, "'do_sample' is not a parameter"),
        ({"inputs": "AAAA", "parameters": {"prompt": "a" * 201}}, "at most 200 characters"),
        ({"inputs": "AAAA", "parameters": {"prompt": "\ud800"}}, "not valid Unicode"),
        ({"inputs": "https://example.com/a.jpg"}, "does not fetch"),
        ({"inputs": "file:///etc/passwd"}, "not base64"),
    ],
)
def test_a_bad_request_is_one_plain_sentence(request_, said):
    with pytest.raises(inference.BadRequest) as error:
        inference.input_fn(json.dumps(request_), "application/json")
    assert said in str(error.value)
    assert str(error.value).isascii()
    assert "\n" not in str(error.value)


def test_the_work_of_a_request_is_bounded(captioner, photos):
    parameters = {"num_beams": 10, "max_new_tokens": 100}
    jobs = inference.input_fn(as_json(photos[:7], parameters=parameters), "application/json")
    with pytest.raises(inference.BadRequest, match="is 7000, at most 6000"):
        inference.predict_fn(jobs, captioner)


def test_a_prompt_that_leaves_the_model_no_positions_is_refused_and_the_longest_that_does_is_captioned(
    captioner, photos
):
    positions = captioner.model.config.text_config.max_position_embeddings
    parameters = {
        "num_beams": 1,
        "max_new_tokens": 30,
        "min_new_tokens": 30,
        "prompt": " ".join(["a"] * (positions - 30)),
    }
    text = answer(captioner, as_json(photos[:1], parameters=parameters), "application/json")  # and its start token
    assert json.loads(text)["captions"]
    parameters["prompt"] += " a"
    said = "The prompt's 36 tokens and max_new_tokens, 30, are more than the 64 positions of the model"
    with pytest.raises(inference.BadRequest, match=said):
        answer(captioner, as_json(photos[:1], parameters=parameters), "application/json")
    good = as_json(photos[:1])
    lines = answer(captioner, f"{as_json(photos[:1], parameters=parameters)}\n{good}", "application/jsonlines")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert rows[0]["error"].startswith(said)
    assert rows[1] == {"captions": captioner(photos[:1])}


def test_the_pixels_of_all_images_of_a_request_are_bounded_together():
    picture = io.BytesIO()
    Image.new("L", (6000, 5000)).save(picture, "PNG")
    with pytest.raises(inference.BadRequest, match=r"Image 3: the image is too large \(6000 x 5000 pixels"):
        inference.input_fn(as_json([picture.getvalue()] * 4), "application/json")


def test_a_failure_of_the_server_is_a_500_and_not_the_clients_fault(captioner, photos, monkeypatch):
    class Context:
        def set_response_status(self, code, phrase):
            self.code = code

    context = Context()
    monkeypatch.setattr(inference, "caption", lambda *_: 1 / 0)
    result = inference.predict_fn(inference.input_fn(photos[0], "image/jpeg"), captioner, context)
    assert context.code == 500
    assert "error" in json.loads(inference.output_fn(result, "*/*"))


# ---------------------------------------------------------------- URLs


@pytest.fixture
def web(photos):
    """A host that serves a photo at /a.jpg, and elsewhere redirects, drips or goes on for ever."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/a.jpg")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            try:
                while self.path == "/endless":
                    self.wfile.write(bytes(65536))
                self.wfile.write(photos[0])
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def allowed(web, monkeypatch):
    """photos.example is allowed, and the test's server stands for it: its address is the one thing pretended."""
    monkeypatch.setenv("CAPTION_ALLOWED_HOSTS", "photos.example, other.example")
    connect = inference.socket.create_connection
    monkeypatch.setattr(inference, "public_address", lambda host: "127.0.0.1")
    monkeypatch.setattr(inference.socket, "create_connection", lambda to, timeout: connect((to[0], web), timeout))


def test_an_allowed_host_is_fetched_from(allowed, photos):
    assert inference.fetch("http://photos.example/a.jpg", 0) == photos[0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://photos.example/redirect", "status 302"),
        ("http://photos.example/endless", "larger than"),
        ("http://elsewhere.example/a.jpg", "does not fetch from"),
        ("http://photos.example:8080/a.jpg", "does not fetch from"),
        ("http://me:pw@photos.example/a.jpg", "does not fetch from"),
        ("http://photos.example@elsewhere.example/a.jpg", "does not fetch from"),
        ("http://[", "does not fetch from"),
    ],
)
def test_what_is_not_a_plain_answer_of_an_allowed_host_is_refused(url, said, allowed, monkeypatch):
    monkeypatch.setitem(inference.LIMITS, "CAPTION_MAX_BYTES", 1_000_000)
    with pytest.raises(inference.BadRequest, match=said):
        inference.fetch(url, 0)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"])
def test_a_private_address_is_refused_even_of_an_allowed_host(address, monkeypatch):
    monkeypatch.setenv("CAPTION_ALLOWED_HOSTS", "photos.example")
    public = (2, 1, 6, "", ("93.184.216.34", 0))
    monkeypatch.setattr(inference.socket, "getaddrinfo", lambda *_, **__: [public, (2, 1, 6, "", (address, 0))])
    with pytest.raises(inference.BadRequest, match="private address"):
        inference.fetch("https://photos.example/a.jpg", 0)


# ---------------------------------------------------------------- packed, behind the real server


def test_the_packed_code_is_all_that_it_needs(model, captioner, photos, tmp_path):
    bundle.write_model(model, tmp_path / "model")
    script = "import sys, inference; print(inference.model_fn(sys.argv[1])([open(sys.argv[2], 'rb').read()])[0])"
    (tmp_path / "photo.jpg").write_bytes(photos[0])
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "photo.jpg")]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "model/code")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == captioner(photos[:1])[0]


def test_a_run_with_an_adapter_is_deployed_merged_and_a_folder_without_a_model_is_refused(tmp_path, model, photos):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoProcessor, BlipForConditionalGeneration

    adapted = get_peft_model(BlipForConditionalGeneration.from_pretrained(model), LoraConfig(target_modules=["query"]))
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.5)
    run = tmp_path / "run"
    adapted.save_pretrained(run)
    AutoProcessor.from_pretrained(model).save_pretrained(run)
    adapted.config.save_pretrained(run)  # as runs of earlier versions have it
    bundle.write_model(run, tmp_path / "served")
    assert not (tmp_path / "served/adapter_config.json").exists()
    captions = inference.model_fn(str(tmp_path / "served"))(photos[:3])
    assert captions == Captioner.from_pretrained(run)(photos[:3]) != Captioner.from_pretrained(model)(photos[:3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no trained model: lacks config.json or \*.safetensors"):
        bundle.write_model(tmp_path / "empty", tmp_path / "nothing")


def test_an_answer_needs_no_accept_header_and_base64_may_be_that_of_urls(captioner, photos):
    text = base64.urlsafe_b64encode(photos[0]).decode()
    job = inference.input_fn(json.dumps({"inputs": text}), "application/json")
    result = inference.output_fn(inference.predict_fn(job, captioner), None)
    assert json.loads(result) == {"captions": captioner(photos[:1])}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    bundle.pack_model(model, folder / "model.tar.gz")
    server = serving.Server(program("platform"), folder / "model.tar.gz", folder)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_the_packed_archive_is_served_by_the_real_model_server(server, captioner, photos):
    assert server.ask(b"", {}, "GET", "/ping")[0] == 200
    check = serving.checker(captioner(photos))
    for body, headers, members, _ in serving.valid_requests(photos):
        check(*server.ask(body, headers), members)


def test_eight_clients_at_once_get_the_right_captions(server, captioner, photos):
    result = serving.measure(server, serving.valid_requests(photos), 8, 100, serving.checker(captioner(photos)))
    assert result["requests"] == 100


def test_a_large_image_is_captioned_and_one_too_large_refused(server, captioner, photos):
    jpeg = {"Content-Type": "image/jpeg"}
    check = serving.checker(captioner(photos))
    check(*server.ask(photos[0] + bytes(8_000_000), jpeg), [0])  # a decoder does not look behind the picture
    status, text = server.ask(photos[0] + bytes(21_000_000), jpeg)
    assert status == 400
    assert json.loads(text)["message"] == "Image 0 is larger than 20000000 bytes."
    with contextlib.suppress(OSError):  # the server hangs up before it has all
        assert server.ask(photos[0] + bytes(40_000_000), jpeg)[0] == 413
    check(*server.ask(photos[0], jpeg), [0])


def test_short_answers_do_not_make_the_server_misread_the_next_one(server, captioner, photos):
    """It reads an answer in pieces, which many short ones make small: inference.lengthen_answers."""
    worker, check = server.worker().pid, serving.checker(captioner(photos))

    def refuse(kind: str, body: bytes) -> None:
        status, text = server.ask(body, {"Content-Type": kind})
        message = json.loads(text)["message"]
        assert status == 400, message
        assert message == message.strip()

    for _ in range(60):
        refuse("image/jpeg", b"")
    check(*server.ask(photos[0], {"Content-Type": "image/jpeg"}), [0])
    for length in range(10, 30):  # a longer sentence, to end at every place of a piece
        for _ in range(12):
            refuse("image/jpeg", b"")
        refuse("x" * length, b"x")
    assert server.worker().pid == worker


def test_nothing_that_clients_send_crashes_or_stalls_the_server(server, captioner, photos):
    """benchmarks/speed/serving.py sends ten thousand."""
    result = serving.attack(server, photos, 1500, 8, serving.checker(captioner(photos)), seed=1)
    assert result["faults"] == []
    assert not result["worker_restarted"]
    assert result["slowest_seconds"] < 30
    assert max(result["memory_mib"]) < result["memory_mib"][0] + 50
