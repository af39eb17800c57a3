"""What an endpoint runs: the four handlers of sagemaker-huggingface-inference-toolkit, which all images go through.

    image/*, application/x-image, application/octet-stream    the bytes of one image
    application/json         {"inputs": BASE64 or [BASE64, ...], "parameters": {"num_beams": 3, "prompt": "a photo of"}}
    application/jsonlines    one such object per line (batch transform)

The answer to JSON and to an image is {"captions": [...]}, one per image, in order; with the parameter "return_scores"
also "scores", the mean log-probability of a caption's tokens. JSON lines are answered line by line, an invalid one by
{"error": ...}. A client's mistake is one sentence with status 400, which the toolkit makes of any exception; the
server's is a 500.

LIMITS bound what one request may cost; environment variables of the same names change them. A URL is fetched only from
hosts named in CAPTION_ALLOWED_HOSTS (comma-separated): without redirects, and never from a private address.
"""

import base64
import binascii
import http.client
import ipaddress
import json
import logging
import os
import socket
import ssl
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))  # code/, where the folders it imports are next to it

import torch

from captioner import Captioner, UnfitLengths
from data import ImageError, open_image
from objectives.cross_entropy import mean_log_probs

logger = logging.getLogger(__name__)
LIMITS = {
    name: int(os.environ.get(name, default))
    for name, default in {
        "CAPTION_MAX_IMAGES": 16,  # images in a request
        "CAPTION_MAX_BYTES": 20_000_000,  # of an image file
        "CAPTION_MAX_PIXELS": 100_000_000,  # of all images of a request: 3 bytes each, decoded
        "CAPTION_MAX_BEAMS": 10,
        "CAPTION_MAX_TOKENS": 100,  # new ones, per caption
        "CAPTION_MAX_PROMPT": 200,  # characters
        "CAPTION_MAX_WORK": 6000,  # images x beams x tokens, so that no request outlives the server's time limit
    }.items()
}
# name: (type, lowest, highest)
PARAMETERS = {
    "num_beams": (int, 1, LIMITS["CAPTION_MAX_BEAMS"]),
    "max_new_tokens": (int, 1, LIMITS["CAPTION_MAX_TOKENS"]),
    "min_new_tokens": (int, 0, LIMITS["CAPTION_MAX_TOKENS"]),
    "length_penalty": (float, -5, 5),
    "repetition_penalty": (float, 0.5, 5),
    "no_repeat_ngram_size": (int, 0, 10),
}
JSON, LINES = ("application/json",), ("application/jsonlines", "application/x-jsonlines", "application/jsonl")
IMAGES = ("application/x-image", "application/octet-stream")
FETCH_SECONDS = 5
URL_SAFE = str.maketrans("-_", "+/")  # base64 as URLs have it


class BadRequest(ValueError):
    """What the client must change, in one sentence: in ASCII, as a lone surrogate would break the server's own encoding
    of it."""

    def __init__(self, message: str):
        super().__init__(message[:300].encode("unicode_escape").decode("ascii"))


def model_fn(model_dir: str) -> Captioner:
    if "mms.service" in sys.modules:  # in a worker of the model server, not in a test
        lengthen_answers(sys.modules["mms.service"])
    return Captioner.from_pretrained(model_dir)


def lengthen_answers(service) -> None:
    """Makes multi-model-server's worker send no answer of less than 512 bytes to the server.

    The server (1.1.11: ModelResponseDecoder.decode and CodecUtils.readMap) reads an answer's status and headers without
    checking whether they have arrived, and if they have not, answers 500 and restarts the worker. Its first read is of
    1,024 bytes and has them all, but after two short answers in a row Netty reads fewer (AdaptiveRecvByteBufAllocator).
    The server discards what is added here: it forwards only the message of a failure, and only the body of a success.
    """
    create = service.create_predict_response

    def create_predict_response(ret, req_id_map, message, code, context=None):
        if code == 200:
            message = message.ljust(512)
        else:
            ret, message = dict.fromkeys(req_id_map, b" " * 512), message[:400]
        return create(ret, req_id_map, message, code, context)

    service.create_predict_response = create_predict_response


def input_fn(body, content_type: str | None) -> list[dict]:
    """The jobs of a request: [{"images": [PIL], "settings": {...}, "return_scores": bool, "line": bool}, ...]. An
    invalid line of JSON lines is {"error": ..., "line": True}."""
    media_type = (content_type or "").split(";")[0].strip().lower()
    if not body:
        raise BadRequest("The request has no body.")
    if media_type.startswith("image/") or media_type in IMAGES:
        image = picture(bytes(body), 0, LIMITS["CAPTION_MAX_PIXELS"])
        return [{"images": [image], "settings": {}, "return_scores": False, "line": False}]
    if media_type not in JSON + LINES:
        raise BadRequest(
            f"The content type '{media_type[:60]}' is not one of image/*, {', '.join((*IMAGES, JSON[0], LINES[0]))}."
        )
    text = as_text(body)
    if media_type in JSON:
        return [{**parse_job(text, LIMITS["CAPTION_MAX_PIXELS"]), "line": False}]
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > LIMITS["CAPTION_MAX_IMAGES"]:
        raise BadRequest(f"{len(lines)} lines are more than the {LIMITS['CAPTION_MAX_IMAGES']} images of a request.")
    if not lines:
        raise BadRequest("The request has no line.")
    jobs, pixels = [], LIMITS["CAPTION_MAX_PIXELS"]
    for line in lines:
        try:
            job = parse_job(line, pixels)
            pixels -= sum(image.width * image.height for image in job["images"])
        except BadRequest as error:
            job = {"error": str(error)}
        jobs.append({**job, "line": True})
    return jobs


def predict_fn(jobs: list[dict], captioner: Captioner, context=None) -> list[dict]:
    """One answer per job. Jobs that share their settings are captioned as one batch."""
    check_work(jobs, captioner.settings)
    answers: list[dict] = [{"error": job.get("error")} for job in jobs]
    groups: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        if "error" not in job:
            groups.setdefault(json.dumps([job["settings"], job["return_scores"]]), []).append(index)
    try:
        for members in groups.values():
            images = [image for index in members for image in jobs[index]["images"]]
            settings, return_scores = jobs[members[0]]["settings"], jobs[members[0]]["return_scores"]
            try:
                captions, scores = caption(captioner, images, settings, return_scores)
            except BadRequest as error:
                if not jobs[0]["line"]:
                    raise
                for index in members:
                    answers[index] = {"error": str(error)}
                continue
            for index in members:
                count = len(jobs[index]["images"])
                answers[index] = {"captions": captions[:count]}
                captions = captions[count:]
                if scores is not None:
                    answers[index]["scores"], scores = scores[:count], scores[count:]
    except BadRequest:
        raise
    except Exception:
        if context is None:
            raise
        logger.exception("captioning failed")
        context.set_response_status(code=500, phrase="Captioning failed")
        return [{"error": "Captioning failed; the server's log says why."}]
    return answers if jobs[0]["line"] else answers[0]


def output_fn(answer, accept: str | None) -> str:
    accept = accept or "*/*"
    kinds = [media_type.split(";")[0].strip().lower() for media_type in accept.split(",")]
    # The toolkit uses it as the answer's content type, whatever else it says.
    if not set(kinds) & {*JSON, *LINES, "*/*", "application/*"} or not accept.isascii() or len(accept) > 200:
        raise BadRequest(f"'{accept[:60]}' cannot be answered with: accept {JSON[0]} or {LINES[0]}.")
    if isinstance(answer, list):
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answer)
    return json.dumps(answer, ensure_ascii=False)


@torch.inference_mode()
def caption(captioner: Captioner, images: list, settings: dict, return_scores: bool):
    """(captions, scores or None) of PIL images. BadRequest if the settings do not fit each other or the model."""
    if settings:
        captioner = captioner.with_settings(**settings)
    batch = captioner.collator([{"image": image, "image_id": str(i)} for i, image in enumerate(images)])
    try:
        tokens = captioner.generate_tokens(batch)
    except UnfitLengths as error:
        raise BadRequest(str(error)) from None
    if not return_scores:
        return captioner.texts(tokens), None
    scores = mean_log_probs(captioner.model, captioner.training_batch(batch, captioner.rows(tokens)))
    return captioner.texts(tokens), [round(score, 4) for score in scores.tolist()]


def check_work(jobs: list[dict], own: dict) -> None:
    """BadRequest if the jobs together cost too much. `own`: the model's settings."""
    images = work = 0
    for job in jobs:
        if "error" in job:
            continue
        settings = {**own, **job["settings"]}
        images += len(job["images"])
        work += len(job["images"]) * settings["num_beams"] * settings["max_new_tokens"]
    if images > LIMITS["CAPTION_MAX_IMAGES"]:
        raise BadRequest(f"{images} images are more than the {LIMITS['CAPTION_MAX_IMAGES']} that a request may have.")
    if work > LIMITS["CAPTION_MAX_WORK"]:
        raise BadRequest(
            f"images x num_beams x max_new_tokens is {work}, at most {LIMITS['CAPTION_MAX_WORK']} are allowed: send "
            "fewer images at once."
        )


def as_text(body) -> str:
    if isinstance(body, str):
        return body
    try:
        return bytes(body).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8 text.") from None


def parse_job(text: str, max_pixels: int) -> dict:
    try:
        request = json.loads(text)
    except RecursionError:
        raise BadRequest("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not JSON ({str(error)[:80]}).") from None
    if not isinstance(request, dict) or "inputs" not in request:
        raise BadRequest('The JSON must be an object with "inputs", the image as base64 or a list of these.')
    if unknown := [name for name in request if name not in ("inputs", "parameters")]:
        raise BadRequest(f'\'{unknown[0][:60]}\' is not known: a request has "inputs" and "parameters".')
    inputs = request["inputs"] if isinstance(request["inputs"], list) else [request["inputs"]]
    if not 1 <= len(inputs) <= LIMITS["CAPTION_MAX_IMAGES"]:
        raise BadRequest(f"A request has 1 to {LIMITS['CAPTION_MAX_IMAGES']} images, not {len(inputs)}.")
    settings = check_parameters(request.get("parameters"))  # first: images cost more to read
    return_scores = settings.pop("return_scores", False)
    images = []
    for index, value in enumerate(inputs):
        images.append(picture(image_bytes(value, index), index, max_pixels))
        max_pixels -= images[-1].width * images[-1].height
    return {"images": images, "settings": settings, "return_scores": return_scores}


def check_parameters(parameters) -> dict:
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest('"parameters" must be an object.')
    checked = {}
    for name, value in parameters.items():
        if name == "prompt":
            if not isinstance(value, str) or len(value) > LIMITS["CAPTION_MAX_PROMPT"]:
                raise BadRequest(f"prompt must be text of at most {LIMITS['CAPTION_MAX_PROMPT']} characters.")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise BadRequest("prompt is not valid Unicode text.")
        elif name == "return_scores":
            if not isinstance(value, bool):
                raise BadRequest("return_scores must be true or false.")
        elif name in PARAMETERS:
            number_type, low, high = PARAMETERS[name]
            numbers = (int,) if number_type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
                raise BadRequest(
                    f"{name} must be {'a whole' if number_type is int else 'a'} number from {low} to {high}."
                )
        else:
            names = ", ".join((*PARAMETERS, "prompt", "return_scores"))
            raise BadRequest(f"'{name[:60]}' is not a parameter; known are {names}.")
        checked[name] = value
    return checked


def image_bytes(value, index: int) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"Image {index} must be text: the bytes of its file in base64.")
    if value.startswith(("http://", "https://")):
        return fetch(value, index)
    if value.startswith("data:"):
        value = value.partition(",")[2]
    if len(value) > LIMITS["CAPTION_MAX_BYTES"] * 4 / 3 + 4:
        raise BadRequest(f"Image {index} is larger than {LIMITS['CAPTION_MAX_BYTES']} bytes.")
    try:
        return base64.b64decode("".join(value.split()).translate(URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"Image {index} is not base64.") from None


def picture(content: bytes, index: int, max_pixels: int):
    if len(content) > LIMITS["CAPTION_MAX_BYTES"]:
        raise BadRequest(f"Image {index} is larger than {LIMITS['CAPTION_MAX_BYTES']} bytes.")
    try:
        return open_image(content, max_pixels=max_pixels)
    except ImageError as error:
        raise BadRequest(f"Image {index}: {str(error).removeprefix('image bytes: ').split('. ')[0]}.") from None


def fetch(url: str, index: int) -> bytes:
    """The content behind a URL on an allowed host, at most CAPTION_MAX_BYTES within FETCH_SECONDS."""
    allowed = {host.strip().lower() for host in os.environ.get("CAPTION_ALLOWED_HOSTS", "").split(",") if host.strip()}
    if not allowed:
        raise BadRequest(f"Image {index} is a URL, which this endpoint does not fetch: send the bytes as base64.")
    refused = BadRequest(f"Image {index} is a URL of a host that this endpoint does not fetch from.")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise refused from None
    if host not in allowed or parts.username is not None or port not in (None, 80 if parts.scheme == "http" else 443):
        raise refused
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        # Connect to the address that was checked: if looked up again, the name might have another.
        connection = http.client.HTTPConnection(host, timeout=FETCH_SECONDS)
        connection.sock = socket.create_connection((public_address(host), 80 if parts.scheme == "http" else 443), 2)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        connection.sock.settimeout(FETCH_SECONDS)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": host, "Connection": "close"})
        answer = connection.getresponse()
        if answer.status != 200:  # including redirects
            raise BadRequest(f"Image {index}: the host answers with status {answer.status}, and only 200 is accepted.")
        content = bytearray()
        while chunk := answer.read1(65536):
            content += chunk
            if len(content) > LIMITS["CAPTION_MAX_BYTES"]:
                raise BadRequest(f"Image {index} is larger than {LIMITS['CAPTION_MAX_BYTES']} bytes.")
            if time.monotonic() > deadline:
                raise BadRequest(f"Image {index} could not be fetched within {FETCH_SECONDS} seconds.")
        connection.close()
        return bytes(content)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise BadRequest(f"Image {index} could not be fetched ({type(error).__name__}).") from None


def public_address(host: str) -> str:
    """The host's address; BadRequest if any of its addresses is not a public one."""
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    if not addresses or not all(ipaddress.ip_address(address.split("%")[0]).is_global for address in addresses):
        raise BadRequest("A URL of a private address is not fetched.")
    return sorted(addresses)[0]
