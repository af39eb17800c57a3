"""Captions of a model on an OpenAI-compatible server: what captioner.Captioner is to scripts, without a model here."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.errors import DataError, UserError
from common.existence import SERVER
from common.limits import cpus
from common.processes import processes, show_progress
from common.prompts import plain
from common.provenance import without_secrets
from common.request import body_of
from common.text import Caption
from data.images import ImageError, open_image
from data.prompts import PROMPTS
from jobs.chat_server import WITHOUT_PRICES, ChatServer, Refused, cost_in_words, cost_of, tokens_of
from jobs.journal import Journal
from metrics.coco_caption.text_checks import remove_illegal_characters

logger = logging.getLogger(__name__)
PROMPT, MAX_NEW_TOKENS = "Describe the image in one sentence.", 256
PIXELS_PER_TOKEN = 750  # of an image, as Anthropic's documentation estimates; servers count in ways of their own
SAMPLED = 200  # images that an estimate opens
# Flags of SamplingArguments.
DRAWING = ("do_sample", "temperature", "top_p", "top_k", "num_return_sequences")
OF_A_SERVER = ("prompt", "system_prompt", "max_new_tokens", "remove_illegal_characters", *DRAWING)


class Unanswered(DataError):
    """An image without a caption: the server refuses it, or its answer is empty."""


@dataclass(slots=True)
class Picture:
    """One image to ask about: what is sent, or why it cannot be read. `key` is a digest of all that the answer depends on."""

    image_id: object
    messages: list = ()
    key: str = ""
    tokens: int = 0
    error: ImageError | None = None


def is_served(model_name_or_path: str) -> bool:
    return model_name_or_path.startswith(SERVER)


def check_flags(model_args, generation_args, server_args, args) -> None:
    """UserError for flags of a server without one, and for those of a model here with a server."""
    name = model_args.model_name_or_path
    if not is_served(name):
        if getattr(server_args, "judge", None):  # whose server it is
            return
        if changed := [*_changed(server_args), *(["dry_run"] if getattr(args, "dry_run", False) else [])]:
            raise UserError(
                f"--{changed[0]} is for a model on a server: --model_name_or_path openai:MODEL, not {name}."
            )
        return
    of_here = {f.name for f in dataclasses.fields(generation_args)} - {*OF_A_SERVER, "prompt_column"}
    of_here |= {"model_revision", "dtype", "quantization", "device", "fast_attention", "bf16", "sweep"}
    of_here |= {"per_device_eval_batch_size", "attn_implementation", "max_pixels", "min_pixels"}
    changed = [*_changed(model_args), *_changed(generation_args), *_changed(args)]
    if flag := next(filter(of_here.__contains__, changed), None):
        raise UserError(f"--{flag} is for models that run here. Fields of a server's own requests: --extra_body.")


def _changed(group) -> list[str]:
    """The flags of a group that do not have their default."""
    fields = dataclasses.fields(group)
    return [f.name for f in fields if f.default not in (getattr(group, f.name), dataclasses.MISSING)]


def connect(model_args, generation_args, server_args, seed: int, **how) -> "ServerCaptioner":
    """The captioner of openai:MODEL."""
    how["seed"] = seed
    settings = {name: value for name, value in generation_args.settings().items() if name in OF_A_SERVER}
    name = model_args.model_name_or_path.removeprefix(SERVER)
    return ServerCaptioner(name, server_args, fast_jpeg=model_args.fast_jpeg, **settings, **how)


class ServerCaptioner:
    """A model on a server and how it is asked. `server_args`: ImageServerArguments; the rest as for Captioner.

    Each image is one request: the picture, and after it the prompt, at temperature 0 unless do_sample or --extra_body say
    another. Images are read, made smaller and compressed ahead, in threads of their own. `journal_file`: where caption_split keeps answers.
    """

    model = None  # there is none here

    def __init__(
        self,
        name: str,
        server_args,
        *,
        prompt: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        remove_illegal_characters: bool = False,
        fast_jpeg: bool = False,
        corruption=None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        num_return_sequences: int | None = None,
        seed: int | None = None,
        journal_file: Path | None = None,
    ):
        self.how = {name: value for name, value in locals().items() if name not in ("self", "name", "server_args")}
        self.name, self.args, self.system_prompt = name, server_args, system_prompt
        self.prompt = PROMPT if prompt is None else prompt
        self.settings = {"max_new_tokens": max_new_tokens or MAX_NEW_TOKENS}
        self.drawing, fields = {"temperature": 0}, body_of(server_args)
        if do_sample:
            self.drawing = {"temperature": temperature, "top_p": top_p, "seed": seed}
            fields = ({"top_k": top_k} if top_k else {}) | fields
        if num_return_sequences:
            if not do_sample:
                raise UserError(
                    "A server answers the same each time at temperature 0: several captions need --do_sample."
                )
            self.settings["num_return_sequences"] = self.drawing["n"] = num_return_sequences
        self.request = self.drawing | fields
        self.drawing["extra_body"] = fields
        self.filtered, self.fast_jpeg, self.corruption = remove_illegal_characters, fast_jpeg, corruption
        self.server = ChatServer(name, server_args, self.settings["max_new_tokens"])
        self.address = without_secrets(str(self.server.client.base_url)).rstrip("/")
        self.journal_file, self.kept, self.keep, self.lock = journal_file, {}, None, threading.Lock()
        self.count_anew()

    def count_anew(self) -> None:
        """Begin to count answers: `written` captions, those `cut` by the server, images `unanswered`, and [prompt, written]
        `tokens`."""
        self.written = self.cut = self.unanswered = 0
        self.tokens = [0, 0]

    def counts(self) -> dict[str, int]:
        return {"cut": self.cut, "tokens_in": self.tokens[0], "tokens_out": self.tokens[1]}

    def say_cut(self) -> None:
        """What the answers since the count began cost, and how many captions were cut, if there are any."""
        if self.cut:
            logger.info("%d of %d captions were cut by the server (finish_reason length)", self.cut, self.written)
        kept = "all answers, those of earlier runs too: " if self.journal_file else ""
        say_cost(*self.tokens, self.args.prices, kept)

    def with_settings(self, prompt: str | None = None, **settings) -> "ServerCaptioner":
        """A captioner with another prompt or other settings, whose requests count in the same limits per minute."""
        settings |= {} if prompt is None else {"prompt": prompt}
        other = ServerCaptioner(self.name, self.args, **self.how | settings)
        other.server.requests, other.server.volume = self.server.requests, self.server.volume
        return other

    def description(self) -> dict:
        """The settings as coco_metrics.json records them."""
        how = {name: self.request[name] for name in ("temperature", "top_p", "top_k", "seed") if name in self.request}
        how |= {"max_side": self.args.max_side, "fast_jpeg": self.fast_jpeg}
        if self.system_prompt:
            how["system_prompt"] = self.system_prompt
        if self.args.extra_body:
            how["extra_body"] = without_secrets(self.args.extra_body)
        if self.corruption:
            how["corrupt"] = self.corruption.spec
        if self.filtered:
            how["remove_illegal_characters"] = True
        return {"prompt": self.prompt, **self.settings, **how}

    def record(self) -> dict:
        """What the answers since the count began took, for coco_metrics.json."""
        cost = cost_of(*self.tokens, *self.args.prices)
        tokens = dict(zip(("prompts", "written"), self.tokens, strict=True))
        return {"unanswered": self.unanswered, "tokens": tokens, "cost": cost}

    # ---------------------------------------------------------------- asking

    @contextlib.contextmanager
    def journal(self, file: Path, others: Iterable[Path] = ()):
        """Within it, answers are kept in `file` as soon as they arrive, and none that it has is asked for again, nor one in
        the journals `others`. Images that had no caption there are asked again."""
        with Journal(file) as journal:
            rows = [*itertools.chain.from_iterable(map(_rows_in, others)), *journal.rows]
            self.kept = {row["key"]: row for row in rows if not row["error"]}
            self.keep = journal.add
            try:
                yield
            finally:
                self.kept, self.keep = {}, None

    def stream(self, samples, *, batch_size: int = 1, num_workers: int = 0, skip_bad_images: bool = False):
        """Yields (image_id, captions) of `samples` as Captioner.stream does, but in the order in which the answers come.
        Images that the server does not caption are (image_id, Unanswered)."""
        pictures = self._ahead(samples, max(num_workers, cpus()))
        for picture, row in self.server.run(pictures, functools.partial(self._answer, skip_bad_images)):
            yield picture.image_id, picture.error or self._counted(row)

    def answers(self, images: list) -> list[list[str] | Unanswered]:
        """The captions of each of a few images, in their order."""
        found = dict(self.stream([{"image": image, "image_id": number} for number, image in enumerate(images)]))
        return [found[number] for number in range(len(images))]

    def _counted(self, row: dict) -> list[str] | Unanswered:
        self.tokens = [a + b for a, b in zip(self.tokens, row["tokens"], strict=True)]
        self.cut += sum(row["cut"])
        if row["error"]:
            self.unanswered += 1
            return Unanswered(row["error"])
        self.written += len(row["texts"])
        return list(map(Caption, row["texts"], row["cut"]))

    def _ahead(self, samples, threads: int) -> Iterator[Picture]:
        """The pictures of `samples`, in order, the next ones made in threads."""
        with ThreadPoolExecutor(threads) as pool:
            coming = deque()
            for sample in samples:
                coming.append(pool.submit(self.picture, sample))
                if len(coming) > self.args.concurrency + threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def picture(self, sample: dict) -> Picture:
        """What is sent of {"image", "image_id"}."""
        side, image_id = self.args.max_side, sample["image_id"]
        try:
            image = open_image(sample["image"], size=(2 * side, 2 * side) if self.fast_jpeg and side else None)
        except ImageError as error:
            return Picture(image_id, error=error)
        if self.corruption:
            image = self.corruption(image, 0, image_id)
        if side:
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        jpeg = buffer.getvalue()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"}}
        ]
        prompt = next(iter(sample.get(PROMPTS) or ()), None)
        if prompt := plain(self.prompt) if prompt is None else prompt:
            content.append({"type": "text", "text": prompt})
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        asked = [self.address, self.name, prompt, self.settings, self.request, *system]
        key = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace") + jpeg).hexdigest()[:24]
        tokens = image.width * image.height // PIXELS_PER_TOKEN + len(prompt) // 4
        return Picture(image_id, [*system, {"role": "user", "content": content}], key, tokens)

    def _answer(self, skip_bad_images: bool, picture: Picture) -> dict | None:
        """The journal's row of a picture: the one it has, else a new one."""
        if picture.error:
            if not skip_bad_images:
                raise picture.error
            return None
        if (row := self.kept.get(picture.key)) is None:
            row = {"key": picture.key, **self._ask(picture)}
            with self.lock:
                if self.keep:
                    self.keep(row)
        return row

    def _ask(self, picture: Picture) -> dict:
        """{"texts", "cut" (whether the server cut each), "error" or None, "tokens" [of the prompt, written]}."""
        try:
            answer = self.server.ask(picture.messages, picture.tokens, **self.drawing)
        except Refused as refusal:
            return {"texts": [], "cut": [], "error": str(refusal), "tokens": [0, 0]}
        error = next(filter(None, map(_fault, answer.choices)), None)
        choices = [] if error else answer.choices
        texts = [self._text(choice.message.content) for choice in choices]
        cut = [choice.finish_reason == "length" for choice in choices]
        return {"texts": texts, "cut": cut, "error": error, "tokens": tokens_of(answer)}

    def _text(self, content: str) -> str:
        text = " ".join(content.split())
        return remove_illegal_characters(text) if self.filtered else text

    # ---------------------------------------------------------------- a split

    def caption_split(self, records, *, batch_size: int = 1, num_workers: int = 0) -> dict[str, str]:
        """`{image_id: caption}` of a whole split, in its order; an image that the server does not caption has an empty one,
        which is scored, and counted by `unanswered`."""
        if processes().num_processes > 1:
            raise UserError("A server is asked by one process, --concurrency images at a time: start without torchrun.")
        self.count_anew()
        with self.journal(self.journal_file):
            stream = self.stream(records, num_workers=num_workers)
            found = dict(show_progress(stream, len(records)))
        for image_id, captions in found.items():
            if isinstance(captions, Unanswered):
                logger.warning("image %s has no caption, and is scored with an empty one: %s", image_id, captions)
        self.say_cut()
        return {
            image_id: found[image_id][0] if isinstance(found[image_id], list) else ""
            for image_id in records["image_id"]
        }


def _fault(choice) -> str | None:
    """Why a choice of an answer is no caption, if it is none."""
    if choice.finish_reason == "content_filter":
        return "the server's filter refused it"
    if refusal := getattr(choice.message, "refusal", None):
        return f"the model refused it: {refusal}"
    if not (isinstance(choice.message.content, str) and choice.message.content.strip()):
        return "the answer is empty" + (
            ", cut by the server (finish_reason length)" if choice.finish_reason == "length" else ""
        )
    return None


def _rows_in(journal: Path) -> list[dict]:
    """The rows of a journal that another process may be writing."""
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[:-1]]
    return []


def say_cost(prompts: int, written: int, prices: tuple, of: str = "") -> None:
    if prompts or written:
        cost = cost_of(prompts, written, *prices)
        logger.info("%s%d prompt tokens, %d written%s", of, prompts, written, cost_in_words(cost))


def estimate(captioner: ServerCaptioner, samples: Iterable[dict]) -> str:
    """What a run would take, as text: images, tokens, cost."""
    number, tokens, opened = 0, 0, []
    for sample in samples:
        number += 1
        if len(opened) < SAMPLED:
            opened.append(captioner.picture(sample))
    readable = [picture for picture in opened if not picture.error]
    tokens = number * sum(picture.tokens for picture in readable) / max(1, len(readable))
    written = number * captioner.settings["max_new_tokens"] * captioner.settings.get("num_return_sequences", 1)
    at_most = cost_of(tokens, written, *captioner.args.prices)
    cost = WITHOUT_PRICES if at_most is None else f"at most about {at_most:,.2f}"
    return "\n".join(
        [
            f"{number:,} images, {len(opened) - len(readable)} of the first {len(opened)} cannot be read",
            f"prompts: about {tokens:,.0f} tokens, {PIXELS_PER_TOKEN} pixels of an image each. Servers count in ways of their own: "
            "a run over a few images says what this one counted",
            f"written: at most {written:,} tokens",
            f"cost: {cost}",
        ]
    )
