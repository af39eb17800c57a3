"""The client of an OpenAI-compatible server: many requests at a time, at most so many a minute, each asked until it is answered."""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime

from common.errors import UserError
from common.request import body_of

logger = logging.getLogger(__name__)
WITHOUT_TEXT = "answered without text"
TOLD_WAIT, LONGEST_WAIT = 120.0, 600.0  # seconds that a server may ask to wait: more than the first are said
PATIENCE = 20.0  # seconds in which another request has to be answered for a refusal to be of one request alone
REFUSALS = (400, 413, 422)  # of one prompt, if others are answered
TRANSIENT = (408, 409, 429)  # and all from 500 on
WITHOUT_PRICES = "give --price_in and --price_out, the prices per million tokens"
ADVICE = {
    401: "Is OPENAI_API_KEY right?",
    403: "Is the key allowed to use this model?",
    404: "Is the model's name right, and --base_url (it usually ends in /v1)?",
    429: "The account has no credit left.",
}


class Pace:
    """Rate limiter: lets `per_minute` units through per minute, evenly spaced."""

    def __init__(self, per_minute: float | None):
        self.interval, self.next, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()

    def wait(self, units: float = 1) -> None:
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + units * self.interval
        if (left := start - time.monotonic()) > 0:
            time.sleep(left)


class Stopped(Exception):
    """Another request met an error that ends the run."""


class Refused(Exception):
    """The server refuses this request, or never answers it with a message, and answers others."""


class ChatServer:
    """Chat completions of `model`, `concurrency` requests at a time, each in its own thread. `args`: ServerArguments.

    Transient errors (no connection, a timeout, 408, 409, 429, 5xx, an answer without a message) are retried `max_retries`
    times, after the delay that the server asks for, up to ten minutes, else with exponential backoff up to a minute, with
    jitter. Permanent errors (a wrong key, no such model, no credit) end the run with a UserError. A prompt that the server
    refuses (400, 413, 422) or never answers with a message counts as that request's fault, unless no other is answered either.
    """

    def __init__(self, model: str, args, max_new_tokens: int):
        import openai

        self.openai, self.model, self.args, self.max_new_tokens = openai, model, args, max_new_tokens
        base_url = args.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise UserError("Set OPENAI_API_KEY in the environment, or name another server with --base_url.")
        self.client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=args.timeout, max_retries=0)
        # OpenAI's newer models take max_completion_tokens, most other servers max_tokens.
        limit = "max_completion_tokens" if "api.openai.com" in str(self.client.base_url) else "max_tokens"
        self.request = {"model": model, limit: max_new_tokens, "extra_body": body_of(args)}
        self.requests, self.volume = Pace(args.requests_per_minute), Pace(args.tokens_per_minute)
        self.stop, self.answered, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.patience_ends = float("inf")  # of the first refusal
        self.not_before = self.noted = 0.0
        self.fresh: Counter = Counter()  # errors that are not logged yet

    def run(self, jobs: Iterable, call: Callable) -> Iterator[tuple]:
        """(job, call(job)) in the order in which they finish. All that finish are yielded before an error is raised."""
        self.stop.clear()
        jobs, waiting, error = iter(jobs), {}, None
        pool = concurrent.futures.ThreadPoolExecutor(self.args.concurrency)
        try:
            while True:
                room = 0 if error else 2 * self.args.concurrency - len(waiting)
                waiting |= {pool.submit(call, job): job for job in itertools.islice(jobs, room)}
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

    def ask(self, messages: list[dict], tokens: int, **options):
        """The server's answer to messages of about so many `tokens`. Raises Refused."""
        request = {"messages": messages} | self.request | options
        body = {name: value for name, value in request.items() if name != "extra_body"} | request["extra_body"]
        # As chat.completions.create, but for its search of messages for what it would have to rename: half of its CPU time.
        post = {"cast_to": self.openai.types.chat.ChatCompletion, "body": body}
        for trial in range(self.args.max_retries + 1):
            self._wait_for_turn(tokens)
            try:
                answer = self.client.post("/chat/completions", **post)
                if has_message(answer):
                    self.answered.set()
                    return answer
                trouble, wait = WITHOUT_TEXT, 0.0
            except (self.openai.OpenAIError, ValueError) as error:
                if getattr(error, "status_code", None) in REFUSALS and self._answers_others():
                    refusal = f"{error.status_code}: {server_message(error)}"
                    self.note(f"refused a prompt, which is left ({refusal})")
                    raise Refused(f"the server refused it ({refusal})") from None
                trouble, wait = self.trouble_of(error)
            self.note(f"{trouble}; trying again")
            self.stop.wait(wait or min(60, 0.5 * 2**trial) * random.uniform(0.5, 1))
        if trouble == WITHOUT_TEXT and self.answered.is_set():  # it answers other prompts
            raise Refused(f"the server {WITHOUT_TEXT}")
        raise UserError(
            f"the server of {self.model} {trouble}, {self.args.max_retries + 1} times in a row. Finished rows are kept; "
            "the same command resumes from there."
        )

    def _answers_others(self) -> bool:
        """Whether another request is answered within PATIENCE of the first refusal."""
        self.patience_ends = min(self.patience_ends, time.monotonic() + PATIENCE)
        return self.answered.wait(max(0, self.patience_ends - time.monotonic()))

    def _wait_for_turn(self, tokens: int) -> None:
        self.stop.wait(max(0, self.not_before - time.monotonic()))
        self.requests.wait()
        self.volume.wait(tokens + self.max_new_tokens)
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


def tokens_of(answer) -> list[int]:
    """[of the prompt, written], as far as the server says."""
    return [getattr(answer.usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]


def cost_of(prompts: float, written: float, price_in: float | None, price_out: float | None) -> float | None:
    """Of so many tokens, at prices per million; None where one is not given."""
    return None if None in (price_in, price_out) else (prompts * price_in + written * price_out) / 1e6


def cost_in_words(cost: float | None) -> str:
    """The end of a line that gives numbers of tokens."""
    return "" if cost is None else f", cost {cost:.2f}"


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
