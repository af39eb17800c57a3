"""A captioner behind the protocol that clients of language models speak: POST /v1/chat/completions with an image.

    python serve.py --model_name_or_path runs/quickstart          then http://127.0.0.1:8000/v1 is the base_url of any client
    python infer.py photos/ --model_name_or_path openai:quickstart --base_url http://127.0.0.1:8000/v1 --prompt ""

For BLIP and its kind, which no other server takes; chat models are faster behind vLLM or SGLang. A request has one image, as a
data: address (nothing is fetched), and may have text, which takes the place of --prompt: BLIP continues it. Without `temperature`, or at 0, the
caption is the one that infer.py gives; above 0 it is drawn. Requests that wait are captioned together. GET /health, /v1/models.
"""

from arguments import SERVE_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(SERVE_GROUPS)  # answers --help and mistakes before torch is imported

import asyncio
import contextlib
import json
import logging
import time
import uuid
from pathlib import Path

from captioner import Captioner
from common.errors import UserError
from common.prompts import columns_in
from data.columns import from_base64
from data.images import open_image
from data.prompts import PROMPTS

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError:
    uvicorn = None

logger = logging.getLogger("serve")


class Refused(UserError):
    """What the client must change, in one sentence, and the status of the answer."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def main():
    model_args, generation_args, args = parse(SERVE_GROUPS)
    if uvicorn is None:
        raise UserError(
            "The server is built with Starlette and uvicorn, which are not installed: pip install starlette uvicorn"
        )
    loading = {"bf16": args.bf16, "fast_jpeg": model_args.fast_jpeg, "loading": model_args.loading()}
    captioner = Captioner.from_pretrained(model_args.model_name_or_path, **loading, **generation_args.settings())
    name = model_args.model_name_or_path
    if columns_in(captioner.prompt):
        raise UserError(
            f"The model's prompt {captioner.prompt!r} holds columns, which a request has not: give a --prompt without."
        )
    server = Server(captioner, Path(name).resolve().name if Path(name).exists() else name, args)
    logger.info("http://%s:%d/v1 answers for %s; Control-C stops it", args.host, args.port, server.name)
    uvicorn.Server(uvicorn.Config(server.app(), args.host, args.port, log_level="warning", log_config=None)).run()
    raise KeyboardInterrupt  # only a signal ends it, and asyncio does not always hand on Control-C


class Server:
    """Answers requests in the order they come in, as many together as `batch_size` and equal settings allow."""

    def __init__(self, captioner: Captioner, name: str, args):
        self.captioner, self.name, self.args = captioner, name, args
        self.waiting: list[tuple] = []  # (settings and prompt, image, future)

    def app(self) -> "Starlette":
        routes = [
            Route("/health", lambda request: JSONResponse({"status": "ok", "waiting": len(self.waiting)})),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]

        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.arrived = asyncio.Event()
            task = asyncio.create_task(self.caption_waiting())
            yield
            task.cancel()

        return Starlette(routes=routes, lifespan=lifespan)

    def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "local"}]})

    async def answer(self, request):
        try:
            asked, image = await asyncio.to_thread(self.job_of, await self.body_of(request))
            if len(self.waiting) >= self.args.max_waiting:
                raise Refused(f"{self.args.max_waiting} requests are waiting: try again later.", 429)
            future = asyncio.get_running_loop().create_future()
            self.waiting.append((asked, image, future))
            self.arrived.set()
            text, read, written, cut = await future
        except UserError as error:
            refusal = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": refusal}, getattr(error, "status", 400))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if cut else "stop",
        }
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return JSONResponse(
            {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()), "model": self.name,
             "choices": [choice], "usage": usage}
        )  # fmt: skip

    async def body_of(self, request) -> dict:
        limit, content = self.args.max_request_mb * 1_000_000, bytearray()
        async for part in request.stream():
            content += part
            if len(content) > limit:
                raise Refused(f"The request is larger than {self.args.max_request_mb} megabytes.", 413)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused("The body is not a JSON object.")
        return body

    def job_of(self, body: dict) -> tuple[tuple[dict, str | None], object]:
        """((settings of the captioner, prompt or None), RGB picture) of a request. Refused, ImageError: it has mistakes."""
        if body.get("model") != self.name:
            raise Refused(f"The model {str(body.get('model'))[:80]!r} is not here: this server has {self.name!r}.", 404)
        if body.get("stream"):
            raise Refused("stream: captions are short, and come whole. Leave it out.")
        if body.get("n") not in (None, 1):
            raise Refused("n: one caption per request. Send the request again, with a temperature above 0.")
        settings = {"num_return_sequences": 1}
        tokens = body.get("max_completion_tokens", body.get("max_tokens"))
        if tokens is not None:
            allowed = self.captioner.settings["max_new_tokens"]
            settings["max_new_tokens"] = min(allowed, int(number_in(tokens, "max_tokens", 1, 1e9)))
        if number_in(body.get("temperature") or 0, "temperature", 0, 2) > 0:
            settings |= {"do_sample": True, "num_beams": 1, "top_k": 0, "temperature": float(body["temperature"])}
            settings["top_p"] = float(number_in(body.get("top_p") or 1, "top_p", 1e-6, 1))
        texts, images = parts_of(body.get("messages"))
        if len(images) != 1:
            raise Refused(f"The messages have {len(images)} images: a caption is of one.")
        content = from_base64(images[0])
        if content is None:
            raise Refused(
                "The image must be a data: address with a JPEG, PNG, WebP, GIF, BMP or TIFF in base64: nothing is fetched."
            )
        return (settings, " ".join(texts) or None), open_image(content, self.args.max_megapixels * 1_000_000)

    async def caption_waiting(self) -> None:
        while True:
            await self.arrived.wait()
            asked = self.waiting[0][0]
            same = [job for job in self.waiting if job[0] == asked][: self.args.batch_size]
            taken = {future for *_, future in same}
            self.waiting = [job for job in self.waiting if job[2] not in taken]
            if not self.waiting:
                self.arrived.clear()
            try:
                answers = await asyncio.to_thread(self.captions, *asked, [image for _, image, _ in same])
            except UserError as error:
                answers = [error] * len(same)
            except Exception:
                logger.exception("captioning failed")
                answers = [Refused("Captioning failed; the server's log says why.", 500)] * len(same)
            for (*_, future), answer in zip(same, answers, strict=True):
                if not future.done():  # its client has gone
                    future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)

    def captions(self, settings: dict, prompt: str | None, images: list) -> list[tuple[str, int, int, bool]]:
        """(caption, tokens of its prompt, its own, whether it was cut) of each picture."""
        captioner = self.captioner.with_settings(**settings)
        asked = {} if prompt is None else {PROMPTS: [prompt]}
        samples = [{"image": image, "image_id": str(i)} | asked for i, image in enumerate(images)]
        batch = captioner.collator(samples)
        tokens, end = captioner.generate_tokens(batch), captioner.collator.end
        texts = captioner.texts(tokens, batch.get("prompts"))
        read, rows = batch["attention_mask"].sum(dim=1).tolist(), captioner.rows(tokens)
        cut = [row[-1:] != [end] for row in rows]
        return list(zip(texts, read, map(len, rows), cut, strict=True))


def number_in(value, name: str, least: float, most: float):
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Refused(f"{name} must be a number from {least} to {most}, not {value!r:.40}.")
    return value


def parts_of(messages) -> tuple[list[str], list[str]]:
    """(texts, addresses of images) of the user's messages."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused("messages must be a list of objects with role and content.")
    texts, images = [], []
    for message in messages:
        if message.get("role") != "user":
            raise Refused("messages: this model takes one message of the user, with an image and perhaps text.")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise Refused("content must be text, or a list of parts of type text and image_url.")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                texts += [part["text"]] if part["text"].strip() else []
            elif isinstance(part, dict) and part.get("type") == "image_url":
                address = part.get("image_url")
                images.append(str(address.get("url") if isinstance(address, dict) else address))
            else:
                raise Refused("content must be text, or a list of parts of type text and image_url.")
    return texts, images


if __name__ == "__main__":
    run(main, when_stopped="")
