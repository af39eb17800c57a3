"""Laws of the parts that scores are made of, without the programs and data that they are computed with."""

import gzip
import io
import signal
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

from arguments import BEST
from metrics.coco_caption import java, languages, spice
from metrics.coco_caption.paraphrases import write_paraphrases
from metrics.coco_caption.text_checks import contradictions
from metrics.names import SCORES

ENTRIES = [
    ("dog", "hound"), ("a red ball", "one red ball"), ("red ball", "ball"), ("runs", "runs fast"), ("a dog", "a hound"),
    (",", "."), ("cat", "dog"), ("ball a", "dog"),
]  # fmt: skip


def test_of_the_paraphrases_those_are_written_of_which_both_sides_occur_in_the_captions(tmp_path):
    with gzip.open(tmp_path / "table.gz", "wt") as file:
        file.writelines(f"0.5\n{one}\n{other}\n" for one, other in ENTRIES)

    def written(captions):
        write_paraphrases(tmp_path / "table.gz", captions, tmp_path / "few.gz", tmp_path / "cache")
        with gzip.open(tmp_path / "few.gz", "rt") as file:
            lines = file.read().splitlines()
        return list(zip(lines[1::3], lines[2::3], strict=True))

    captions = ["A dog, a hound", "one red ball", "runs", "a red ball"]
    for _ in range(2):  # unpacked, and from the cache
        # A phrase without words is kept: METEOR has ways of its own with punctuation.
        assert written(captions) == [ENTRIES[n] for n in (0, 1, 2, 4, 5)]
    assert written([]) == [(",", ".")]


@pytest.mark.parametrize(("gib", "expected"), [(5, 2), (100, 4), (1, 1), (None, 4)])
def test_meteor_starts_as_many_jvms_as_memory_holds_with_equal_parts_of_the_text(gib, expected, monkeypatch):
    parts = []

    def meteor(lines, paraphrases, timeout):
        parts.append(len(lines))
        return np.array([[int(line.split()[-1])] for line in lines])

    monkeypatch.setattr(java, "_meteor", meteor)
    monkeypatch.setattr(java, "write_paraphrases", lambda *_: None)
    monkeypatch.setattr(java, "why_no_meteor", lambda: None)
    monkeypatch.setattr(java, "cores", lambda: 4)
    monkeypatch.setattr(java, "available_memory", lambda: gib and gib * 2**30)
    hypotheses = [["a", f"{n:04d}"] for n in range(3000)]
    answers = java.meteor_statistics(hypotheses, [[["a"]]] * 3000, timeout=1)
    assert answers[:, 0].tolist() == list(range(3000))
    assert len(parts) == expected
    assert max(parts) - min(parts) <= 2


@pytest.mark.parametrize(
    ("status", "messages", "reason"),
    [
        (-signal.SIGKILL, "", "was killed by signal 9: somebody, or the system for lack of memory, ended it"),
        (-signal.SIGKILL, "[main] INFO loading", "was killed by signal 9: somebody, or the system"),
        (-signal.SIGKILL, "a fault", "was killed by signal 9: a fault"),
        (3, "", "exited with status 3: no message"),
        (3, "[main] INFO loading\none\ntwo\nthree\nfour", "exited with status 3: two / three / four"),
        (1, "java.lang.OutOfMemoryError: heap", "SPICE's Java heap of 4G was full"),
    ],
)
def test_why_spice_ended_is_one_line(status, messages, reason):
    program = SimpleNamespace(
        process=SimpleNamespace(wait=lambda: status), messages=io.BytesIO(messages.encode()), heap="4G"
    )
    line = spice._Program._why_it_ended(program)
    assert reason in line
    assert "INFO" not in line


@pytest.mark.parametrize("script", languages._SCRIPTS)
def test_whole_phrases_of_a_script_without_blanks_are_told_and_usual_words_are_not(script):
    language, usual = languages._SCRIPTS[script]
    letters = [
        c for c in map(chr, range(0x0E00, 0xA000)) if unicodedata.name(c, "").split(" ")[0].split("-")[0] == script
    ]
    phrase, word = "".join(letters[:10]), "".join(letters[:usual])
    assert languages.unsegmented([[phrase]] * 3) == (language, phrase)
    assert languages.unsegmented([[word]] * 3) is None
    assert languages.unsegmented([["dog", "runs"]] * 3) is None


def test_what_all_references_contradict_is_told():
    references = ["a red dog and two balls", "the red dogs"]
    assert contradictions("a blue dog and three balls", references) == {
        "colour": (["blue"], ["red"]),
        "count": ([], []),
    }
    assert contradictions("three red dogs", ["two dogs", "2 dogs"]) == {"colour": ([], []), "count": (["3"], ["2"])}
    assert contradictions("a violet dog", ["a purple dog"])["colour"] == ([], [])


def test_the_score_that_chooses_the_best_checkpoint_is_among_the_curves():
    chosen = {name for name in BEST.values() if name in SCORES}
    assert chosen
    assert all(SCORES[name].curve and SCORES[name].in_training for name in chosen)
