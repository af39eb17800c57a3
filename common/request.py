"""--extra_body: fields of a server's own in the requests to it."""

import json

from common.errors import UserError

# Fields of a request that --extra_body would change behind what is recorded, or read.
OWN_FIELDS = {
    "model": "name the model as openai:MODEL",
    "messages": "they are made of the image or captions, and the prompt",
    "stream": "answers are read whole",
    "n": "one answer is read; infer.py takes --num_return_sequences",
}


def body_of(args) -> dict:
    """The fields of --extra_body."""
    try:
        body = json.loads(args.extra_body or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--extra_body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"--extra_body is a JSON object, such as '{{\"top_k\": 5}}', not {args.extra_body:.80}.")
    if name := next(filter(body.__contains__, OWN_FIELDS), None):
        raise UserError(f"--extra_body cannot set {name!r}: {OWN_FIELDS[name]}.")
    return body
