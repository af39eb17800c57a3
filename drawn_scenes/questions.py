"""Questions about scenes, made from their facts, and a server that answers them from a caption: a judge without a language model.

    python -m drawn_scenes.questions runs/questions.jsonl --port 8899

writes the questions about the training scenes, as `--judge multiple_choice` and recipes/questions/rewards.py take them, and
then speaks OpenAI's protocol until it is stopped: it reads a caption as drawn_scenes.facts does, and says only what it states.
"""

import argparse
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.files import write_text
from drawn_scenes.drawing import COLOURS, COUNTS, NAMES, SHAPES, SIZES, load
from drawn_scenes.facts import ATTRIBUTES, INVERSE, parse

CHOICES = {
    "count": [*map(str, COUNTS)], "size": [*SIZES], "colour": [*COLOURS], "shape": [*SHAPES], "relation": [*INVERSE],
}  # fmt: skip
# A group of objects is named by its shape or by its colour.
GROUPS = {("shape", shape): NAMES[shape][0][1] for shape in SHAPES} | {
    ("colour", colour): f"{colour} objects" for colour in COLOURS
}
WORDS = {
    "count": "How many {} are there?", "size": "What size are the {}?", "colour": "What colour are the {}?",
    "shape": "What shape do the {} have?",
}  # fmt: skip
WHERE = "Where are the {}, seen from the {}?"
PROMPT = re.compile(
    r"description:\n(?P<caption>.*)\n\nQuestion about the image: (?P<question>.*)\n(?P<choices>(?:.+\n)+)"
)


def questions_of(facts: dict) -> list[dict]:
    """{"question", "choices", "answer"} of each fact of a scene but what its groups are named by: their shape, or their colour
    if they have the same shape."""
    objects, (one, relation, other) = facts["objects"], facts["relations"][0]
    by = "shape" if objects[0]["shape"] != objects[1]["shape"] else "colour"
    names = [GROUPS[by, group[by]] for group in objects]
    asked = [
        (WORDS[attribute].format(name), attribute, str(group[attribute]))
        for name, group in zip(names, objects, strict=True)
        for attribute in ATTRIBUTES
        if attribute != by
    ]
    asked.append((WHERE.format(names[one], names[other]), "relation", relation))
    return [
        {"question": question, "choices": CHOICES[attribute], "answer": answer} for question, attribute, answer in asked
    ]


# What each question asks: the kind of fact, and the groups.
MEANINGS = {
    WORDS[question_kind].format(name): (question_kind, group)
    for question_kind in ATTRIBUTES
    for group, name in GROUPS.items()
} | {
    WHERE.format(name, other): ("relation", group, of)
    for group, name in GROUPS.items()
    for of, other in GROUPS.items()
    if group != of
}


def answer(caption: str, question: str) -> str | None:
    """What `caption` states in answer to one of the questions; None if it does not, or of several groups that fit."""
    parsed, (attribute, *groups) = parse(caption), MEANINGS[question]
    matching = [
        [number for number, mention in enumerate(parsed["objects"]) if mention.get(by) == value] for by, value in groups
    ]
    if any(len(numbers) != 1 for numbers in matching):
        return None
    first = matching[0][0]
    if attribute != "relation":
        value = parsed["objects"][first].get(attribute)
        return None if value is None else str(value)
    other = matching[1][0]
    claims = {r for a, r, b in parsed["relations"] if (a, b) == (first, other)}
    claims |= {INVERSE[r] for a, r, b in parsed["relations"] if (a, b) == (other, first)}
    return claims.pop() if len(claims) == 1 else None


def reply(prompt: str) -> str:
    """The letter of the right choice, to a prompt of recipes/judges/multiple_choice.txt; of the last, which says that the caption
    does not tell, if there is none."""
    asked = PROMPT.search(prompt)
    letters = {text: letter for letter, text in re.findall(r"^([A-Z])\. (.*)$", asked["choices"], re.MULTILINE)}
    return letters.get(answer(asked["caption"], asked["question"]), max(letters.values()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    wbufsize = -1  # head and body in one packet: two would wait for each other

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": reply(request["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Says nothing of single requests."""


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


def write_questions(path: Path, records, each: int) -> None:
    """`each` questions about each record's scene, chosen by its id."""
    lines = []
    for image_id, facts in zip(records["image_id"], records["facts"], strict=True):
        asked = random.Random(image_id).sample(questions_of(json.loads(facts)), each)
        lines += [json.dumps({"image_id": image_id, **question}) + "\n" for question in asked]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--each", type=int, default=3, choices=range(1, 8), help="questions about a scene, of its 7")
    parser.add_argument("--port", type=int, default=8899)
    arguments = parser.parse_args()
    write_questions(arguments.file, load("scenes")["train"], arguments.each)
    server = Server(("127.0.0.1", arguments.port), Handler)
    print(f"answers at http://127.0.0.1:{server.server_port}/v1, from captions alone; Ctrl-C ends it", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
