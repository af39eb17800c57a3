"""evaluate.py --human_judgments: published files as they are, Kendall's tau as defined, the published table."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import ROOT

from common.errors import DataError
from metrics.agreement import Kendall, accuracy_on_pairs, agreement_with_ratings, pairs_of_ratings
from metrics.judgments import read_judgments

RESULTS = json.loads((ROOT / "benchmarks/results/human_judgments.json").read_text(encoding="utf-8"))


def test_tau_is_that_of_its_definition_for_any_numbers_of_copies():
    generator = np.random.default_rng(0)
    for size, values, levels in itertools.product((2, 7, 40), (2, 5, 1000), (2, 3, 90)):
        x, y = generator.integers(0, values, size), generator.integers(0, levels, size)
        copies = generator.integers(0, 3, (2, size))
        taus = np.array(Kendall(x.astype(float), y.astype(float)).tau(copies.astype(float)))
        for row, found in zip(copies, taus.T, strict=True):
            a, b = np.repeat(x, row), np.repeat(y, row)
            pairs = list(itertools.combinations(range(len(a)), 2))
            signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
            difference = sum(s * t for s, t in signs)
            untied = sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs)
            classes = min(len(set(a)), len(set(b)))
            expected = [difference / untied**0.5 if untied else np.nan]
            expected.append(2 * difference * classes / (len(a) ** 2 * (classes - 1)) if classes > 1 else np.nan)
            assert found == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_pairwise_accuracy_of_made_pairs_is_an_independent_count():
    generator = np.random.default_rng(1)
    first, second = generator.integers(0, 6, (2, 500)).astype(float)
    first[3] = np.nan
    preferred, images = generator.integers(-1, 2, 500), generator.integers(0, 40, 500)
    found = accuracy_on_pairs(first, second, preferred, images, 200, 0)
    right = ties = count = 0
    for a, b, people in zip(first, second, preferred, strict=True):
        if people and a == a:
            count, ties, right = count + 1, ties + (a == b), right + (a > b if people > 0 else a < b)
    assert (found["pairs"], found["ties"], found["value"]) == (count, ties, (right + ties / 2) / count)
    assert found["interval"][0] < found["value"] < found["interval"][1]
    # Of ratings: captions of one image whose mean ratings differ.
    pairs, signs = pairs_of_ratings(np.array([0, 0, 1, 2, 3]), np.array([1.0, 4, 2, 2.5, 9]), np.array([0, 0, 0, 0, 1]))
    assert (pairs.tolist(), signs.tolist()) == ([[0, 1], [1, 2]], [1, -1])


def test_intervals_are_over_images():
    """Judgments that are copied within their images say nothing new: the interval stays as wide."""
    generator = np.random.default_rng(2)
    scores = generator.normal(size=60)
    ratings, images = np.round(scores + generator.normal(size=60)), np.arange(60) // 2
    once, often = (
        agreement_with_ratings(*(np.repeat(v, times) for v in (scores, ratings, images)), 400, 0) for times in (1, 9)
    )
    widths = [of_one["tau_c"]["interval"][1] - of_one["tau_c"]["interval"][0] for of_one in (once, often)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


TOKEN = "a.jpg#0\tA dog .\na.jpg#1\tA red dog .\nb.jpg#0\tA cat , it says .\nb.jpg#1\tTwo cats .\n"
REFS = [("a.jpg", ("A dog .", "A red dog .")), ("b.jpg", ("A cat , it says .", "Two cats ."))]


def test_published_files_as_they_are(tmp_path):
    write(tmp_path, "Flickr8k.token.txt", TOKEN)
    experts = write(tmp_path, "ExpertAnnotations.txt", "a.jpg\tb.jpg#0\t1\t1\t2\nb.jpg\tb.jpg#1\t4\t4\t4\n")
    found = read_judgments(experts)
    assert [caption[:2] for caption in found.captions] == [("a.jpg", "A cat , it says ."), ("b.jpg", "Two cats .")]
    assert found.ratings == [(0, 1.0), (0, 1.0), (0, 2.0), (1, 4.0), (1, 4.0), (1, 4.0)]
    assert found.without_copies
    assert found.captions[0][2] == REFS[0][1]
    crowd = write(
        tmp_path, "CrowdFlowerAnnotations.txt", "a.jpg\tb.jpg#0\t0\t0\t3\na.jpg\tb.jpg#1\t0.333333333333\t1\t2\n"
    )
    assert read_judgments(crowd).ratings == [(0, 0.0), (1, 0.333333333333)]
    content = {"a": {"ground_truth": ["A dog ."], "human_judgement": [{"caption": "A cat .", "rating": 1.5}]}}
    found = read_judgments(write(tmp_path, "flickr8k.json", json.dumps(content)))
    assert (found.captions, found.ratings) == ([("a", "A cat .", ("A dog .",))], [(0, 1.5)])
    composite = write(
        tmp_path,
        "8k_correctness.csv",
        "HITId;Input.image_url;Input.text1;Input.text2;Answer.Q1Answer;Answer.Q2Answer\n"
        'x;http://h/i/a.jpg;a dog, red;"a; cat";4;1\ny;;;;;\n',
    )
    found = read_judgments(composite)
    assert [caption[:2] for caption in found.captions] == [("a.jpg", "a dog, red"), ("a.jpg", "a; cat")]
    assert found.ratings == [(0, 4.0), (1, 1.0)]
    polaris = write(
        tmp_path, "polaris_test.csv", 'mt,refs,score,imgid\na dog,"[\'a dog runs\', ""it\'s a dog""]",0.75,7.jpg\n'
    )
    found = read_judgments(polaris)
    assert (found.captions, found.ratings) == ([("7.jpg", "a dog", ("a dog runs", "it's a dog"))], [(0, 0.75)])
    nebula = pyarrow.table(
        {"img": [{"bytes": b"x", "path": None}], "imgid": ["7"], "mt": ["a dog"], "refs": [["r"]], "human_score": [0.5]}
    )
    pq.write_table(nebula, tmp_path / "test.parquet")
    found = read_judgments(str(tmp_path / "test.parquet"))
    assert (found.captions, found.ratings) == ([("7", "a dog", ("r",))], [(0, 0.5)])


def test_pascal_50s(tmp_path):
    io = pytest.importorskip("scipy.io")
    pairs, votes = [], []
    for place, first_votes in enumerate((30, 10)):
        pairs.append((f"{place}.jpg", f"a{place} ", f"b{place}"))
        for vote in range(48):
            texts = (np.array([[text]], dtype=object) for text in (f"ref {vote}", f"a{place}", f"b{place}"))
            votes.append((*texts, 1 if vote < first_votes else -1))
    pairs = np.array([pairs], dtype=[("image", object), ("sent1", object), ("sent2", object)])
    triplets = np.array([votes], dtype=[("s1", object), ("s2", object), ("s3", object), ("winner", object)])
    io.savemat(tmp_path / "pair_pascal.mat", {"new_input": pairs, "category": np.array([[1, 4]])})
    io.savemat(tmp_path / "consensus_pascal.mat", {"triplets": triplets})
    found = read_judgments(str(tmp_path / "pair_pascal.mat"))
    assert found.pairs == [(0, 1, 1, "HC"), (2, 3, -1, "MM")]
    assert found.captions[0] == ("0.jpg", "a0", tuple(f"ref {vote}" for vote in range(48)))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "image,caption,rating\na,dog,good\n", "line 2: 'good' is not a number"),
        ("t.csv", "image,caption\na,dog\n", "no column of the judgment"),
        ("t.csv", "image,rating\na,1\n", "no column of the caption"),
        ("t.csv", "image,caption_a,caption_b,preference\na,x,y,0\na,x,z,1\n", "0 and 1, which does not say whose"),
        ("t.csv", "image,caption_a,caption_b,preference\na,x,y,left\n", "'left' is not a, b or tie"),
        ("t.csv", "image,caption,rating\na,dog,\n", "no judgments"),
        ("t.json", '{"a": 1}', "no human_judgement"),
        ("ExpertAnnotations.txt", "a.jpg\tb.jpg#0\t1\t1\t2\n", "Flickr8k.token.txt, which is not next to it"),
        ("t.xml", "<a/>", "are read from CSV"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, words):
    with pytest.raises(DataError) as error:
        read_judgments(write(tmp_path, name, text))
    assert words in str(error.value)


def test_pairs_of_a_table_and_scores_of_ones_own(tmp_path):
    rows = [
        {"image": "1", "caption_a": "a dog runs", "caption_b": "a cat", "preference": "a", "category": "x", "m_a": 2, "m_b": 1},
        {"image": "1", "caption_a": "a cat", "caption_b": "the dog runs", "preference": 2, "category": "y", "m_a": 2, "m_b": 1},
        {"image": "2", "caption_a": "a red ball", "caption_b": "a ball", "preference": "tie", "category": "y", "m_a": 2, "m_b": 1},
    ]  # fmt: skip
    table = write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    references = write(tmp_path, "r.json", json.dumps({"1": ["a dog runs fast", "the dog"], "2": ["a red ball"]}))
    tiny.run(
        "evaluate.py", "--human_judgments", table, "--references", references, "--score_columns", "m", "--meteor", "false",
        "--spice", "false", "--output_dir", tmp_path / "out", "--bootstrap_samples", 20,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out/human_judgments.json").read_text())["scores"]
    assert scores["Bleu_1"]["pairwise_accuracy"]["value"] == 1
    assert scores["Bleu_1"]["pairwise_accuracy"]["pairs"] == 2
    assert scores["m"]["pairwise_accuracy"]["value"] == 0.5
    assert {name: part["value"] for name, part in scores["m"]["by_category"].items()} == {"x": 1.0, "y": 0.0}


def test_the_table_of_flickr8k_expert(test_data, tmp_path):
    """The published table is held by benchmarks.quality.human_judgments, which takes minutes; its first images here."""
    assert set(RESULTS["difference"].values()) == {0.0}
    judgments = test_data / "flickr8k_expert/judgments.jsonl"
    lines = judgments.read_text(encoding="utf-8").splitlines(keepends=True)
    part = write(tmp_path, "judgments.jsonl", "".join(lines[: RESULTS["first_judgments"]["ratings"]]))
    result = tiny.run(
        "evaluate.py", "--human_judgments", part, "--references", judgments.with_name("references.json"),
        "--meteor", "false", "--spice", "false", "--output_dir", tmp_path / "out", "--bootstrap_samples", 100,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out/human_judgments.json").read_text())["scores"]
    for name, expected in RESULTS["first_judgments"]["tau_c"].items():
        assert scores[name]["tau_c"]["value"] == pytest.approx(expected, abs=1e-9)
        assert scores[name]["tau_c"]["interval"][0] < expected < scores[name]["tau_c"]["interval"][1]
    assert "agreement with people" in result.stderr
