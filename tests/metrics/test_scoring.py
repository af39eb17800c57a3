"""evaluate.py on captions that exist: files as people have them, languages, CHAIR, subsets, the gate, groups of seeds."""

import csv
import json
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import tiny

import metrics
from common.errors import UserError
from data.caption_files import load_predictions, read_references
from data.tokens import check_captions_can_be_written
from metrics.coco_caption.languages import UNSPACED, tokens_of, unsegmented
from models.loading import _tokenizer
from reports.outputs import below_bars

FAST = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", "100")
IMAGES = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "domain": ("in", "out")[n % 2]} for n in (7, 8, 42, 43)]
CAPTIONS = {7: "a dog on a couch", 8: "two cats sit", 42: "a man with a dog", 43: "a red car on the road"}
COCO = {
    "images": IMAGES,
    "annotations": [{"image_id": n, "caption": text} for n, one in CAPTIONS.items() for text in (one, f"{one} here")],
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def references(tmp_path):
    return read_references(write(tmp_path / "captions_val2014.json", COCO))


def test_predictions_find_their_images_in_every_form(tmp_path, references):
    names = {image["id"]: image["file_name"] for image in IMAGES}
    expected = {str(n): text for n, text in CAPTIONS.items()}
    rows = [{"image": f"/photos/val2014/{names[n]}", "caption": text} for n, text in CAPTIONS.items()]
    jsonl = write(tmp_path / "o.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_predictions(jsonl, references) == expected
    windows = [row | {"image": row["image"].replace("/", "\\")} for row in rows]
    assert load_predictions(write(tmp_path / "w.json", windows), references) == expected
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["file_name", "caption"], *([names[n].removesuffix(".jpg"), text] for n, text in CAPTIONS.items())]
        )
    assert load_predictions(tmp_path / "p.csv", references) == expected
    table = {"image_id": list(CAPTIONS), "caption": list(CAPTIONS.values())}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    assert load_predictions(tmp_path / "p.parquet", references) == expected
    images = [{"path": names[n], "bytes": b"x"} for n in CAPTIONS]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": images, "text": list(CAPTIONS.values())}), tmp_path / "i.parquet"
    )
    assert load_predictions(tmp_path / "i.parquet", references) == expected


def test_error_rows_are_counted_and_refused_only_where_they_are_needed(tmp_path, references, caplog):
    rows = [{"image": image["file_name"], "caption": CAPTIONS[image["id"]]} for image in IMAGES]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    spare = json.dumps({"image": "elsewhere.jpg", "error": "not an image"}) + "\n"
    assert len(load_predictions(write(tmp_path / "a.jsonl", lines + spare), references)) == 4
    assert "left out 1 images with an error, such as 'elsewhere.jpg'" in caplog.text
    rows[2] = {"image": rows[2]["image"], "error": "truncated"}
    needed = write(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"1 images of the references have an error .*'42': truncated"):
        load_predictions(needed, references)


def test_a_base_name_of_two_images_is_not_guessed(tmp_path):
    found = read_references(write(tmp_path / "r.json", {"a/1.jpg": ["a dog"], "b/1.jpg": ["a cat"]}))
    with pytest.raises(UserError, match=r"'1\.jpg' is the name of several images"):
        load_predictions(write(tmp_path / "p.json", {"1.jpg": "a dog"}), found)
    assert load_predictions(write(tmp_path / "q.json", {"b/1.jpg": "x", "a/1.jpg": "y"}), found) == {
        "b/1.jpg": "x",
        "a/1.jpg": "y",
    }


def test_karpathys_json_gives_the_references_of_a_split(tmp_path):
    content = {
        "images": [
            {
                "filename": f"{n}.jpg",
                "cocoid": n,
                "split": split,
                "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}],
            }
            for n, split in ((1, "test"), (2, "restval"), (3, "val"))
        ]
    }
    path = write(tmp_path / "dataset_coco.json", content)
    assert read_references(path, "test").captions == {"1": ["A dog."]}
    assert load_predictions(write(tmp_path / "p.json", {"1.jpg": "x"}), read_references(path, "test")) == {"1": "x"}
    content["images"] = content["images"][1:]
    with pytest.raises(UserError, match="no image of split 'test'"):
        read_references(write(path, content), "test")


def test_evaluate_scores_infers_output_with_chair_subsets_and_a_gate(tmp_path):
    references = write(tmp_path / "captions_val2014.json", COCO)
    rows = [{"image": image["file_name"], "caption": CAPTIONS[image["id"]]} for image in IMAGES]
    predictions = write(tmp_path / "o.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    instances = {
        "images": IMAGES,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "pizza"}],
        "annotations": [{"image_id": 7, "category_id": 2}],
    }
    files = ["--predictions", predictions, "--references", references]
    files += ["--instances", write(tmp_path / "instances.json", instances), "--output_dir", tmp_path / "out"]
    result = tiny.run("evaluate.py", *files, *FAST, "--fail_under", "CIDEr=1 Bleu_4=1.5", fails=3)
    scores = json.loads((tmp_path / "out/coco_metrics.json").read_text(encoding="utf-8"))
    assert f"fail_under: Bleu_4 is {scores['Bleu_4']:.4f}, {1.5 - scores['Bleu_4']:.4f} below 1.5" in result.stderr
    assert "CIDEr is" not in result.stderr
    assert scores["CHAIRs"] == scores["CHAIRi"] == 0
    assert scores["object_recall"] == 6 / 7
    assert scores["subsets"]["in"]["counts"]["images"] == scores["subsets"]["out"]["counts"]["images"] == 2
    alone, _ = metrics.score(
        {str(n): CAPTIONS[n] for n in (8, 42)},
        {str(n): [CAPTIONS[n], f"{CAPTIONS[n]} here"] for n in (8, 42)},
        meteor=False,
        spice=False,
        bootstrap_samples=0,
    )
    assert scores["subsets"]["in"]["CIDEr"] == alone["CIDEr"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "object missed" in page
    assert "CHAIRs" in page


def test_a_bar_for_no_score_is_refused():
    scores = {"CIDEr": 0.5, "CHAIRi": 0.2, "SPICE": None, "unavailable": {"SPICE": "no Java"}}
    assert below_bars("CIDEr=0.5 CHAIRi=0.2", scores) == []
    assert below_bars("CHAIRi=0.1", scores) == ["CHAIRi is 0.2000, 0.1000 above 0.1"]
    assert below_bars("SPICE=0.1", scores) == ["SPICE is null (no Java), its bar is 0.1"]
    with pytest.raises(UserError, match="no score 'Cider' here"):
        below_bars("Cider=1", scores)
    with pytest.raises(UserError, match="not of the form"):
        below_bars("CIDEr>1", scores)


# -------------------------------------------------------------------------------------------------------------- languages

UNSPACED_TEXTS = {
    "ja": ["赤い服の女性が海辺で笑っている。", "二匹の犬が草の上を走る", "男の人が椅子に座っています"],
    "zh": ["一个穿红衣服的女人在海边微笑。", "两只狗在草地上跑", "一个男人坐在椅子上"],
    "th": ["ผู้หญิงยิ้มที่ชายหาด", "สุนัขสองตัววิ่งบนหญ้า", "ผู้ชายนั่งบนเก้าอี้"],
}


@pytest.mark.parametrize("language", UNSPACED_TEXTS)
def test_scripts_without_blanks_score_as_pycocoevalcap_on_spaced_characters(language):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    texts = UNSPACED_TEXTS[language]
    predictions = {str(n): text[:-2] for n, text in enumerate(texts)}
    references = {str(n): [text, text[1:]] for n, text in enumerate(texts)}

    def spaced(text):
        return " ".join(text.replace("。", ""))

    gts = {n: [spaced(text) for text in group] for n, group in references.items()}
    res = {n: [spaced(text)] for n, text in predictions.items()}
    scores, _ = metrics.score(predictions, references, language=language, bootstrap_samples=0)
    expected = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [scores[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-9)
    assert scores["CIDEr"] == pytest.approx(float(Cider().compute_score(gts, res)[0]), abs=1e-9)
    assert scores["ROUGE_L"] == pytest.approx(float(Rouge().compute_score(gts, res)[0]), abs=1e-9)
    assert scores["METEOR"] is scores["SPICE"] is None
    assert f"caption_language is {language}" in scores["unavailable"]["METEOR"]
    assert scores["sacrebleu"] > 0
    assert f"tok:{UNSPACED[language][1]}" in scores["sacrebleu_signature"]


@pytest.mark.parametrize("language", UNSPACED_TEXTS)
def test_without_the_flag_whole_captions_as_words_are_told(language, caplog):
    texts = UNSPACED_TEXTS[language]
    rows = {str(n): text for n, text in enumerate(texts)}
    metrics.score(rows, {n: [text] for n, text in rows.items()}, meteor=False, spice=False, bootstrap_samples=0)
    assert f"--caption_language {language}" in caplog.text


def test_what_is_cut_into_words_is_not_warned_of():
    for text in (
        "một người đàn ông",
        "Ein Hund läuft über die Wiese",
        "собака бежит по траве",
        "개가 잔디 위를 달린다",
        "dog",
        "",
    ):
        assert unsegmented(metrics.tokenize([text] * 3)) is None
    for text in ("一个 男人 坐在 椅子 上", "一 个 男 人"):
        assert unsegmented(metrics.tokenize([text] * 3)) is None
    assert tokens_of(["a man's dog"], "en") == metrics.tokenize(["a man's dog"])
    assert tokens_of(["3只狗和iPhone"], "zh") == [["3", "只", "狗", "和", "iphone"]]


def test_no_language_code_is_one_line(tmp_path):
    files = [
        "--predictions",
        write(tmp_path / "p.json", {"1": "a"}),
        "--references",
        write(tmp_path / "r.json", {"1": ["a"]}),
    ]
    result = tiny.run(
        "evaluate.py", *files, "--output_dir", tmp_path, "--caption_language", "klingon!", *FAST, fails=True
    )
    assert "'klingon!' is not a language code" in result.stderr


def test_what_a_tokenizer_cannot_write_is_told_before_training(test_data, caplog):
    bert = _tokenizer(str(test_data / "bert-base-uncased/vocab.txt"), [])
    vietnamese = ["một người đàn ông đang chơi bóng đá", "hai con chó chạy trên bãi biển"]
    english = ["A man rides a horse on the beach.", "Two dogs, running!"]
    check_captions_can_be_written(bert, english * 50)
    assert not caplog.text
    check_captions_can_be_written(bert, english * 20 + vietnamese)
    assert "'một' becomes 'mot'" in caplog.text or "'người' becomes 'nguoi'" in caplog.text
    with pytest.raises(UserError, match="cannot write"):
        check_captions_can_be_written(bert, vietnamese)
    own = _tokenizer(None, vietnamese)
    assert own.decode(own(vietnamese[0])["input_ids"], skip_special_tokens=True) == vietnamese[0]
    check_captions_can_be_written(own, vietnamese)
    plain = _tokenizer(None, vietnamese, strip_accents=True)
    assert "mot nguoi" in plain.decode(plain(vietnamese[0])["input_ids"])


# ------------------------------------------------------------------------------------------------------------- many runs


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Folders of two recipes over three seeds each: b names more of the right words."""
    from arguments import MetricArguments
    from reports import outputs

    folder = tmp_path_factory.mktemp("seeds")
    flags = MetricArguments(meteor=False, spice="false", bootstrap_samples=0)
    words = ["dog", "cat", "car", "man", "ball", "tree", "road", "grass", "horse", "bench"]
    references = {str(n): [f"a {words[n % 10]} near a {words[(n * 3 + 1) % 10]}"] for n in range(60)}
    for name, wrong in (("a_1", 2), ("b", 5)):
        for seed in range(3):
            captions = {
                n: one[0] if (int(n) + seed) % wrong else "two birds sit on a wire" for n, one in references.items()
            }
            scores, rows = outputs.score_captions(captions, references, flags, 1)
            (folder / f"{name}-{seed}").mkdir()
            outputs.write_scores(folder / f"{name}-{seed}", scores, rows)
    return folder


def test_groups_of_seeds_give_mean_deviation_and_tables(seeds, tmp_path):
    command = ["evaluate.py", "--compare", f"A_1={seeds}/a_1-*", f"B & co={seeds}/b-*", "--output_dir", tmp_path]
    tiny.run(*command, "--bootstrap_samples", 200)
    found = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    values = [json.loads((seeds / f"b-{n}/coco_metrics.json").read_text())["CIDEr"] for n in range(3)]
    mean = sum(values) / 3
    group = found["groups"]["B & co"]["scores"]["CIDEr"]
    assert group["values"] == pytest.approx(values)
    assert group["mean"] == pytest.approx(mean)
    assert group["std"] == pytest.approx((sum((value - mean) ** 2 for value in values) / 2) ** 0.5)
    test = found["differences"]["B & co"]["CIDEr"]
    assert test["difference"] == pytest.approx(mean - found["groups"]["A_1"]["scores"]["CIDEr"]["mean"])
    assert test["real"]
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    row = next(row for row in rows if row["run"] == "B & co" and row["score"] == "CIDEr")
    assert float(row["mean"]) == pytest.approx(mean)
    assert row["runs"] == "3"
    note = "60 images; mean ± standard deviation of 3 runs; bold: the best; *: differs from A_1, p < 0.05"
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith("| | CIDEr | BLEU-4 | ")
    assert f"| B & co | **{mean:.3f}** ± {group['std']:.3f}* |" in text
    assert text.endswith(f"\n\n{note}\n")
    table = (tmp_path / "comparison.tex").read_text(encoding="utf-8")
    assert f"B \\& co & $\\mathbf{{{mean:.3f}}} \\pm {group['std']:.3f}^{{*}}$ &" in table
    assert "mean $\\pm$ standard deviation of 3 runs; bold: the best; $^{*}$: differs from A\\_1, p $<$ 0.05}" in table
    assert "A\\_1" in table


def test_the_latex_table_compiles(seeds, tmp_path):
    tex = shutil.which("pdflatex") or shutil.which("tectonic")
    if tex is None:
        pytest.skip("no TeX here")
    tiny.run("evaluate.py", "--compare", f"A_1={seeds}/a_1-*", f"B={seeds}/b-*", "--output_dir", tmp_path)
    table = (tmp_path / "comparison.tex").read_text(encoding="utf-8")
    page = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{table}\n\\end{{document}}"
    write(tmp_path / "page.tex", page)
    options = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in tex else []
    subprocess.run([tex, *options, "page.tex"], cwd=tmp_path, check=True, capture_output=True, timeout=300)


def test_a_group_without_folders_is_refused(seeds, tmp_path):
    result = tiny.run(
        "evaluate.py", "--compare", f"A={seeds}/a_1-*", f"B={seeds}/none-*", "--output_dir", tmp_path, fails=True
    )
    assert "no folder that matches" in result.stderr
