"""LLM backends: an OpenAI-compatible server, or a local model run by these processes.

Both have `run(jobs, judge)`, which yields (job, outcome) in the order in which rows finish. `judge(job, text, finished)`
returns the reason to reject a text, or None; a rejected row is retried with another seed, up to `max_attempts` attempts.
All finished rows are yielded before an error is raised.
"""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import torch

from common.errors import UserError
from common.provenance import without_secrets
from rewriting.checks import tidy
from rewriting.prompt_cache import prompt_cache
from rewriting.prompts import Tokens

logger = logging.getLogger(__name__)
WITHOUT_TEXT = "answered without text"
TOLD_WAIT, LONGEST_WAIT = 120.0, 600.0  # seconds that a server may ask to wait: more than the first are said
WINDOW = 32  # batches of rows that are sorted by length together


@dataclass(slots=True)
class Job:
    """A row to rewrite."""

    row: int  # position in the input
    digest: str  # of its captions
    inputs: list[str]  # its captions
    prompt: str
    ids: list  # the prompt's tokens


@dataclass(slots=True)
class Outcome:
    text: str  # the last text written
    reason: str | None  # why it was rejected: one of rewriting.checks.REASONS
    attempts: int = 1
    tokens_in: int = 0  # of all attempts
    tokens_out: int = 0


def open_backend(llm: str, args):
    """The backend that --llm names, `openai:MODEL` or `hf:MODEL`. `args` are LLMArguments."""
    backend, _, model = llm.partition(":")
    backends = {"openai": OpenAIBackend, "hf": HFBackend}
    if backend not in backends or not model:
        raise UserError(f"--llm {llm}: expected openai:MODEL (on a server) or hf:MODEL (a folder or Hub id).")
    return backends[backend](model, args)


def load_tokenizer(name: str | None):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name) if name else None


def is_chat(tokenizer, args) -> bool:
    """Whether prompts are wrapped in the tokenizer's chat template: by default if it has one."""
    return tokenizer.chat_template is not None if args.chat is None else args.chat


# ---------------------------------------------------------------- a server


class Pace:
    """Rate limiter: lets `per_minute` units through per minute, evenly spaced."""

    def __init__(self, per_minute: float | None):
        self.interval, self.next, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()

    def wait(self, units: float = 1) -> None:
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + units * self.interval
        time.sleep(max(0, start - time.monotonic()))


class Stopped(Exception):
    """Another row met an error that ends the run."""


class OpenAIBackend:
    """Chat completions, `concurrency` rows at a time, each in its own thread.

    Transient errors (no connection, a timeout, 408, 409, 429, 5xx, an answer without a message) are retried `max_retries`
    times, after the delay that the server asks for, up to ten minutes, else with exponential backoff up to a minute, with
    jitter. Permanent errors (a wrong key, no such model, no credit) end the run with a ValueError. A prompt that the server
    refuses (400, 413, 422) or never answers with a message counts as that row's fault, unless no other is answered either.
    """

    def __init__(self, model: str, args):
        import openai

        self.openai, self.model, self.args = openai, model, args
        base_url = args.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise UserError("Set OPENAI_API_KEY in the environment, or name another server with --base_url.")
        self.client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=args.timeout, max_retries=0)
        self.tokens = Tokens(load_tokenizer(args.tokenizer))
        # OpenAI's newer models take max_completion_tokens, most other servers max_tokens.
        limit = "max_completion_tokens" if "api.openai.com" in str(self.client.base_url) else "max_tokens"
        self.request = {"model": model, limit: args.max_new_tokens}
        try:
            self.request["extra_body"] = json.loads(args.extra_body or "{}")
        except json.JSONDecodeError as error:
            raise UserError(f"--extra_body is not JSON: {error}") from None
        self.requests, self.volume = Pace(args.requests_per_minute), Pace(args.tokens_per_minute)
        self.stop, self.answered, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.not_before = self.noted = 0.0
        self.fresh: Counter = Counter()  # errors that are not logged yet

    def settings(self) -> dict:
        named = ("max_new_tokens", "max_prompt_tokens", "temperature", "extra_body", "tokenizer")
        values = {name: getattr(self.args, name) for name in named}
        return values | {"extra_body": self.args.extra_body and without_secrets(self.args.extra_body)}

    def run(self, jobs: Iterable[Job], judge: Callable) -> Iterator[tuple[Job, Outcome]]:
        self.stop.clear()
        jobs, waiting, error = iter(jobs), {}, None
        pool = concurrent.futures.ThreadPoolExecutor(self.args.concurrency)
        try:
            while True:
                room = 0 if error else 2 * self.args.concurrency - len(waiting)
                waiting |= {pool.submit(self.rewrite, job, judge): job for job in itertools.islice(jobs, room)}
                if not waiting:
                    break
                try:
                    done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                except KeyboardInterrupt as interrupt:  # requests in flight are already paid for: wait for them
                    error, done = interrupt, []
                    self.stop.set()
                for future in done:
                    job, failure = waiting.pop(future), future.exception()
                    if failure is None:
                        yield job, future.result()
                    else:  # the first one, which has stopped the others
                        error = error or failure
                        self.stop.set()
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        if error:
            raise error

    def rewrite(self, job: Job, judge: Callable) -> Outcome:
        outcome = Outcome("", "empty", attempts=0)
        for attempt in range(self.args.max_attempts):
            answer = self.ask(job, attempt)
            outcome.attempts += 1
            if answer is None:
                outcome.reason = "server_refused"
                break
            choice = answer.choices[0]
            content = choice.message.content
            outcome.text = tidy(content if isinstance(content, str) else "")
            outcome.tokens_in += getattr(answer.usage, "prompt_tokens", None) or 0
            outcome.tokens_out += getattr(answer.usage, "completion_tokens", None) or 0
            if choice.finish_reason == "content_filter":
                outcome.reason = "server_refused"
            else:
                outcome.reason = judge(job, outcome.text, choice.finish_reason != "length")
            if outcome.reason is None:
                break
        return outcome

    def ask(self, job: Job, attempt: int):
        """The server's answer, or None if it refuses the prompt."""
        options = self.options(attempt)
        for trial in range(self.args.max_retries + 1):
            self.wait_for_turn(job)
            try:
                answer = self.client.chat.completions.create(
                    messages=[{"role": "user", "content": job.prompt}], **options
                )
                if has_message(answer):
                    self.answered.set()
                    return answer
                trouble, wait = WITHOUT_TEXT, 0.0
            except (self.openai.OpenAIError, ValueError) as error:
                if getattr(error, "status_code", None) in REFUSALS and self.answered.wait(20):
                    self.note(f"refused a prompt, which is left ({error.status_code}: {server_message(error)})")
                    return None
                trouble, wait = self.trouble_of(error)
            self.note(f"{trouble}; trying again")
            self.stop.wait(wait or min(60, 0.5 * 2**trial) * random.uniform(0.5, 1))
        if trouble == WITHOUT_TEXT and self.answered.is_set():  # it answers other prompts
            return None
        raise UserError(
            f"the server of {self.model} {trouble}, {self.args.max_retries + 1} times in a row. Finished rows are kept; "
            "the same command resumes from there."
        )

    def options(self, attempt: int) -> dict:
        """Options of a row's request: each attempt has another seed, and samples if it is not the first."""
        options, temperature = dict(self.request), self.args.temperature
        if temperature is not None:
            options["temperature"] = max(temperature, 0.7) if attempt else temperature
        return options | {"seed": self.args.seed + attempt}

    def wait_for_turn(self, job: Job) -> None:
        self.stop.wait(max(0, self.not_before - time.monotonic()))
        self.requests.wait()
        self.volume.wait(len(job.ids) + self.args.max_new_tokens)
        if self.stop.is_set():
            raise Stopped

    def trouble_of(self, error: Exception) -> tuple[str, float]:
        """(what the server did, seconds that it asks to wait). UserError for what does not pass by itself."""
        if isinstance(error, self.openai.APITimeoutError):
            return f"did not answer in {self.args.timeout:g} s", 0.0
        if isinstance(error, self.openai.APIConnectionError):
            return f"could not be reached ({type(error.__cause__ or error).__name__})", 0.0
        if not isinstance(error, self.openai.APIStatusError):
            return f"sent invalid JSON ({type(error).__name__})", 0.0
        code = error.status_code
        if (code not in TRANSIENT and code < 500) or error.code == "insufficient_quota":
            raise UserError(
                f"the server of {self.model} answers {code}: {server_message(error)}. {ADVICE.get(code, '')}"
            ) from None
        wait = retry_after(error.response.headers)
        self.not_before = max(self.not_before, time.monotonic() + wait)
        asks = f" and asks to wait {wait / 60:.0f} minutes" if wait > TOLD_WAIT else ""
        return f"answered {code}{asks}", wait

    def note(self, trouble: str) -> None:
        """Count an error, and log the recent ones on one line, at most every five seconds."""
        with self.lock:
            self.fresh[trouble] += 1
            if time.monotonic() - self.noted < 5:
                return
            self.noted = time.monotonic()
            recent, self.fresh = self.fresh, Counter()
        logger.warning("server: %s", ", ".join(f"{trouble} (×{n})" for trouble, n in recent.items()))


REFUSALS = (400, 413, 422)  # of one prompt, if others are answered
TRANSIENT = (408, 409, 429)  # and all from 500 on
ADVICE = {
    401: "Is OPENAI_API_KEY right?",
    403: "Is the key allowed to use this model?",
    404: "Is the model's name right, and --base_url (it usually ends in /v1)?",
    429: "The account has no credit left.",
}


def has_message(answer) -> bool:
    """Whether an answer has what the protocol says; servers and gateways send others, too."""
    choice = next(iter(getattr(answer, "choices", None) or []), None)
    return hasattr(getattr(choice, "message", None), "content")


def server_message(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or body.get("detail") or error.message)[:300]


def retry_after(headers) -> float:
    """Seconds that the server asks to wait, as a number or until a date, at most LONGEST_WAIT; 0 if it does not say."""
    for seconds in (
        lambda: float(headers["retry-after-ms"]) / 1000,
        lambda: float(headers["retry-after"]),
        lambda: parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(),
    ):
        with contextlib.suppress(KeyError, ValueError):
            return min(LONGEST_WAIT, max(0.0, seconds()))
    return 0.0


# ---------------------------------------------------------------- a local model


class HFBackend:
    """A causal or encoder-decoder language model of transformers, on this process's device.

    Rows are sorted by length, WINDOW batches at a time, and padded to the longest in their batch: on the left, except for
    encoder-decoders. The first attempt uses beam search; later ones sample, each with another seed. A batch that does not
    fit into GPU memory is split in half.
    """

    def __init__(self, model: str, args, device=None):
        import transformers

        from common.processes import captions_in_bfloat16, processes
        from common.weights import read_weights
        from models.loading import quantization_config

        self.args, self.device = args, torch.device(device) if device else processes().device
        bf16 = captions_in_bfloat16(self.device) if args.bf16 is None else args.bf16
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        options = {"dtype": self.dtype, "device_map": {"": self.device}}
        if args.quantization:
            options["quantization_config"] = quantization_config(args.quantization)
        config = transformers.AutoConfig.from_pretrained(model)
        seq2seq = config.is_encoder_decoder
        limit = getattr(config, "max_position_embeddings", None)
        if limit and not seq2seq and args.max_prompt_tokens + args.max_new_tokens > limit:
            raise UserError(
                f"{model} has a context of {limit} tokens; --max_prompt_tokens {args.max_prompt_tokens} plus --max_new_tokens "
                f"{args.max_new_tokens} exceed it."
            )
        of_decoder, of_encoder = (
            (transformers.AutoModelForCausalLM, "left"),
            (transformers.AutoModelForSeq2SeqLM, "right"),
        )
        model_class, padding_side = of_encoder if seq2seq else of_decoder
        # A vision-language checkpoint has weights that its language model does not use.
        unread = r"(.*\.)?(vision|visual|multi_modal|mm_)\w*\..*"
        self.model = read_weights(model_class, model, unread=unread, **options).eval()
        tokenizer = load_tokenizer(model)
        if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.padding_side = padding_side
        self.tokens = Tokens(tokenizer, is_chat(tokenizer, args))
        ends = self.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = torch.atleast_1d(torch.tensor(ends, device=self.device))

    def settings(self) -> dict:
        named = ("max_new_tokens", "max_prompt_tokens", "num_beams", "temperature", "quantization")
        precision = str(self.dtype).removeprefix("torch.")
        return {name: getattr(self.args, name) for name in named} | {"chat": self.tokens.chat, "precision": precision}

    def run(self, jobs: Iterable[Job], judge: Callable) -> Iterator[tuple[Job, Outcome]]:
        jobs = iter(jobs)
        while window := list(itertools.islice(jobs, WINDOW * self.args.per_device_batch_size)):
            outcomes: dict = {}
            for attempt in range(self.args.max_attempts):
                window.sort(key=lambda job: -len(job.ids))  # longest first: running out of memory shows at once
                rejected = []
                for start in range(0, len(window), self.args.per_device_batch_size):
                    batch = window[start : start + self.args.per_device_batch_size]
                    for job, (text, finished, count) in zip(batch, self.generate(batch, attempt), strict=True):
                        outcome = outcomes.setdefault(job.row, Outcome("", None, attempts=0))
                        outcome.text, outcome.attempts = text, attempt + 1
                        outcome.tokens_in += len(job.ids)
                        outcome.tokens_out += count
                        outcome.reason = judge(job, text, finished)
                        if outcome.reason and attempt + 1 < self.args.max_attempts:
                            rejected.append(job)
                        else:
                            yield job, outcomes.pop(job.row)
                window = rejected

    @torch.inference_mode()
    def generate(self, batch: list[Job], attempt: int) -> list[tuple[str, bool, int]]:
        """(text, whether it ended with an end token, its number of tokens) for each prompt."""
        inputs = self.tokens.tokenizer.pad({"input_ids": [job.ids for job in batch]}, return_tensors="pt").to(
            self.device
        )
        search = {
            "do_sample": False,
            "num_beams": self.args.num_beams,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if attempt:
            torch.manual_seed(hash((self.args.seed, attempt, batch[0].row)) % 2**32)
            search = {"do_sample": True, "num_beams": 1, "temperature": self.args.temperature or 0.7, "top_p": 0.95}
        try:
            return self.search(inputs, search)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, which keeps the memory in use
        half = len(batch) // 2
        return self.generate(batch[:half], attempt) + self.generate(batch[half:], attempt)

    def search(self, inputs: dict, search: dict) -> list[tuple[str, bool, int]]:
        """As `generate`. inputs: input_ids and attention_mask, (rows, tokens); search: settings of the model's `generate`."""
        beams, room = search["num_beams"], self.args.max_new_tokens
        tokens = self.model.generate(
            **inputs,
            **search,
            past_key_values=prompt_cache(self.model, inputs, beams, room) if beams > 1 else None,
            max_new_tokens=room,
            pad_token_id=self.tokens.tokenizer.pad_token_id,
        )
        before = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        tokens = tokens[:, before:]
        ended = torch.isin(tokens, self.ends)
        counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1]).tolist()
        texts = self.tokens.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [(tidy(text), end, count) for text, end, count in zip(texts, ended.any(1).tolist(), counts, strict=True)]
