"""The tokenizer against the Java program it stands in for."""

import json
import random
import re
import subprocess

import pytest

from metrics.coco_caption.java import find_java, package_folder
from metrics.coco_caption.tokenizer import tokenize

# pycocoevalcap's list, brackets included (which never match, for by then they are lower case).
PUNCTUATION = ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]


def stanford_tokens(captions: list[str], folder) -> list[list[str]]:
    """What pycocoevalcap's PTBTokenizer makes of these captions, one line each."""
    file = folder / "captions.txt"
    file.write_text("".join(caption + "\n" for caption in captions), encoding="utf-8", newline="")
    jar = package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = [find_java(), "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
    output = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
    lines = output.split("\n")[:-1]
    assert len(lines) == len(captions)
    return [[token for token in line.rstrip().split(" ") if token and token not in PUNCTUATION] for line in lines]


def on_one_line(caption: str) -> str:
    return re.sub("[\n\r\x0b\x0c\x85\u2028\u2029]+", " ", caption)


def real_captions(test_data) -> dict[str, list[str]]:
    coco = json.loads((test_data / "coco_karpathy_test/captions_karpathy_test.json").read_text())
    predictions = json.loads((test_data / "coco_karpathy_test/predictions_contrastive.json").read_text())
    vizwiz = json.loads((test_data / "vizwiz/processed_val.json").read_text())
    flickr = (test_data / "flickr8k/Flickr8k.token.txt").read_text(encoding="utf-8").strip().split("\n")
    capsfusion = json.loads((test_data / "capsfusion/example_data.json").read_text())
    corpora = {
        "coco": [annotation["caption"] for annotation in coco["annotations"]],
        "coco predictions": [prediction["caption"] for prediction in predictions],
        "vizwiz": [caption for row in vizwiz for caption in row["captions"]],
        "flickr8k": [line.split("\t")[1] for line in flickr],
        "capsfusion": [caption for row in capsfusion for caption in row.values()],
    }
    return {name: [on_one_line(caption) for caption in captions] for name, captions in corpora.items()}


@pytest.fixture(scope="module")
def corpora(test_data):
    return real_captions(test_data)


@pytest.fixture(scope="module")
def needs_java():
    if find_java() is None:
        pytest.skip("no Java: the Stanford tokenizer cannot be asked")


@pytest.mark.parametrize("name", ["coco", "coco predictions", "vizwiz", "flickr8k", "capsfusion"])
def test_real_captions_get_the_stanford_tokens(name, corpora, needs_java, tmp_path):
    captions = corpora[name]
    differing = [
        (caption, theirs, ours)
        for caption, theirs, ours in zip(captions, stanford_tokens(captions, tmp_path), tokenize(captions), strict=True)
        if theirs != ours
    ]
    assert len(captions) >= 4000
    assert len(differing) == 0, f"{len(differing)} of {len(captions)} captions differ: {differing[:5]}"


def test_words_of_real_captions_in_random_order_get_the_stanford_tokens(corpora, needs_java, tmp_path):
    randomness = random.Random(0)
    chunks = sorted({chunk for captions in corpora.values() for caption in captions for chunk in caption.split(" ")})
    odd = [chunk for chunk in chunks if chunk and not chunk.isalpha()]
    captions = [" ".join(randomness.choices(odd, k=randomness.randint(1, 8))) for _ in range(20_000)]
    theirs = stanford_tokens(captions, tmp_path)
    differing = [pair for pair in zip(captions, theirs, tokenize(captions), strict=True) if pair[1] != pair[2]]
    assert len(differing) == 0, f"{len(differing)} of {len(captions)} differ: {differing[:5]}"


def test_broken_and_glued_words_hardly_ever_differ(corpora, needs_java, tmp_path):
    randomness = random.Random(0)
    chunks = sorted({chunk for captions in corpora.values() for caption in captions for chunk in caption.split(" ")})
    odd = [chunk for chunk in chunks if chunk and not chunk.isalpha()]

    def glued() -> str:
        first, second = randomness.choice(odd), randomness.choice(odd)
        return first[: randomness.randint(1, len(first))] + second[randomness.randint(0, len(second)) :]

    captions = [" ".join(glued() for _ in range(randomness.randint(1, 5))) for _ in range(20_000)]
    theirs = stanford_tokens(captions, tmp_path)
    differing = [pair for pair in zip(captions, theirs, tokenize(captions), strict=True) if pair[1] != pair[2]]
    assert len(differing) <= 5, f"{len(differing)} of {len(captions)} differ: {differing[:5]}"


@pytest.mark.parametrize("template", ["a{0}b", "{0}{0}"])
def test_every_character_of_the_basic_plane_is_treated_as_stanford_does(template, needs_java, tmp_path):
    line_breaks = set(map(ord, "\n\r\x0b\x0c\x85\u2028\u2029"))
    characters = [chr(c) for c in range(1, 0x10000) if c not in line_breaks and not 0xD800 <= c < 0xE000]
    captions = [template.format(character) for character in characters]
    theirs = stanford_tokens(captions, tmp_path)
    differing = [hex(ord(c)) for c, a, b in zip(characters, theirs, tokenize(captions), strict=True) if a != b]
    assert differing == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't well-fed.", ["a", "man", "'s", "dog", "is", "n't", "well-fed"]),
        ("He can't, cannot, won't.", ["he", "ca", "n't", "can", "not", "wo", "n't"]),
        ("U.S. flags on Main St.", ["u.s.", "flags", "on", "main", "st."]),
        ("a sign (in red) [old]", ["a", "sign", "-lrb-", "in", "red", "-rrb-", "-lsb-", "old", "-rsb-"]),
        ("$5.00, 50% off at http://a.com/x", ["$", "5.00", "50", "%", "off", "at", "http://a.com/x"]),
        ("call 1 800 555 1234", ["call", "1", "800\u00a0555\u00a01234"]),
        ("5 1/2 cups & ½ pint", ["5\u00a01/2", "cups", "&", "1/2", "pint"]),
        ("“café” – naïve … 👍", ["café", "naïve"]),
        ("", []),
        (" \t ", []),
        ("?!", ["?!"]),
        ("...", []),
    ],
)
def test_known_captions_have_known_tokens_without_java(caption, tokens):
    assert tokenize([caption]) == [tokens]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\n\n"])
def test_a_line_break_inside_a_caption_is_a_space_and_shifts_nothing(line_break):
    assert tokenize([f"a dog{line_break}runs", "a cat"]) == [["a", "dog", "runs"], ["a", "cat"]]
    assert tokenize([f"a dog{line_break}", f"{line_break}", "a cat"]) == [["a", "dog"], [], ["a", "cat"]]


def test_a_final_single_letter_looks_at_the_next_caption_as_stanford_does(needs_java, tmp_path):
    captions = [
        "the Wii U.",
        "The next",
        "the Wii U.",
        "next",
        "yes or no.",
        "5 dogs",
        "yes or no.",
        "dogs",
        "vitamin D.",
    ]
    assert tokenize(captions) == stanford_tokens(captions, tmp_path)
    assert tokenize(captions)[0][-1] == "u"
    assert tokenize(captions)[2][-1] == "u."


def test_no_java_is_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("CAPTION_NO_JAVA", "1")
    assert find_java() is None
    assert tokenize(["two dogs"]) == [["two", "dogs"]]
