"""A small OpenAI-compatible server on this machine: real HTTP, answers and faults as a test says."""

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class LLMServer(ThreadingHTTPServer):
    """`with LLMServer(answer) as server:` serves at `server.url`.

    `answer(prompt, request)`, where the prompt of a picture is its data URI, gives the text; or (status, body, headers) for a fault; or None to hang until closed.
    `paid` counts the texts that were sent, by prompt.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.paid, self.requests, self.closing = answer, Counter(), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.headers_seen: list = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is none of the server's errors."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        if isinstance(prompt, list):  # of a picture and a text
            prompt = prompt[0]["image_url"]["url"]
        self.server.requests.append((time.monotonic(), request))
        self.server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        answer = self.server.answer(prompt, request)
        if answer is None:
            self.server.closing.wait(60)
            self.close_connection = True
            return
        if isinstance(answer, tuple):
            return self.send(*answer)
        self.server.paid[prompt] += 1
        text, reason = answer if isinstance(answer, list) else (answer, "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split()), "total_tokens": 0}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
                        "choices": [choice], "usage": usage}, {})  # fmt: skip

    def send(self, status, body, headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(content)
        except BrokenPipeError:  # the client was killed
            self.close_connection = True

    def log_message(self, *_):
        pass


def fused(prompt, request=None):
    """What a good LLM would answer to the published prompt."""
    raw = re.search(r"Sentence 1: (.*)", prompt).group(1)
    synthetic = re.search(r"Sentence 2: (.*)", prompt).group(1)
    return f"There is {raw.rstrip('.')}, and with it {synthetic.rstrip('.')}."


def picture_in(uri) -> Image.Image:
    """The picture of a data URI, which must be a JPEG."""
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/jpeg"
    return Image.open(io.BytesIO(base64.b64decode(data)), formats=["JPEG"])


def coloured(uri, request=None):
    """A caption that differs with the picture."""
    red, green, blue = picture_in(uri).resize((1, 1)).getpixel((0, 0))
    return f"a square of {red} red, {green} green and {blue} blue"


def write_rows(folder, count, **more):
    rows = [
        {"laion_2b": f"Shop {n} offer no. {n}", "laion_coco": f"a picture of {n} dogs.", "key": n, **more}
        for n in range(count)
    ]
    (folder / "in.json").write_text(json.dumps(rows))
    return folder / "in.json"
