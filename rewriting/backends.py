"""LLM backends: an OpenAI-compatible server, or a local model run by these processes.

Both have `run(jobs, judge)`, which yields (job, outcome) in the order in which rows finish. `judge(job, text, finished)`
returns the reason to reject a text, or None; a rejected row is retried with another seed, up to `max_attempts` attempts.
All finished rows are yielded before an error is raised.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from common.errors import UserError
from common.provenance import without_secrets
from jobs.chat_server import ChatServer, Refused, tokens_of
from rewriting.checks import tidy
from rewriting.prompt_cache import prompt_cache
from rewriting.prompts import Tokens

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


class OpenAIBackend:
    """A chat model on a server (jobs/chat_server.py)."""

    def __init__(self, model: str, args):
        self.args, self.server = args, ChatServer(model, args, args.max_new_tokens)
        self.tokens = Tokens(load_tokenizer(args.tokenizer))

    def settings(self) -> dict:
        named = ("max_new_tokens", "max_prompt_tokens", "temperature", "extra_body", "tokenizer")
        values = {name: getattr(self.args, name) for name in named}
        return values | {"extra_body": self.args.extra_body and without_secrets(self.args.extra_body)}

    def run(self, jobs: Iterable[Job], judge: Callable) -> Iterator[tuple[Job, Outcome]]:
        return self.server.run(jobs, lambda job: self.rewrite(job, judge))

    def rewrite(self, job: Job, judge: Callable) -> Outcome:
        outcome = Outcome("", "empty", attempts=0)
        for attempt in range(self.args.max_attempts):
            outcome.attempts += 1
            try:
                message = {"role": "user", "content": job.prompt}
                answer = self.server.ask([message], len(job.ids), **self.options(attempt))
            except Refused:
                outcome.reason = "server_refused"
                break
            choice = answer.choices[0]
            content = choice.message.content
            outcome.text = tidy(content if isinstance(content, str) else "")
            tokens_in, tokens_out = tokens_of(answer)
            outcome.tokens_in += tokens_in
            outcome.tokens_out += tokens_out
            if choice.finish_reason == "content_filter":
                outcome.reason = "server_refused"
            else:
                outcome.reason = judge(job, outcome.text, choice.finish_reason != "length")
            if outcome.reason is None:
                break
        return outcome

    def options(self, attempt: int) -> dict:
        """Options of a row's request: each attempt has another seed, and samples if it is not the first."""
        options, temperature = {"seed": self.args.seed + attempt}, self.args.temperature
        if temperature is not None:
            options["temperature"] = max(temperature, 0.7) if attempt else temperature
        return options


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
