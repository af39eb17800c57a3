"""evaluate.py --sweep: every setting's captions are those of an evaluation of its own, from one encoding an image."""

import json
import shutil

import families
import pytest
import tiny
import torch

from captioner import Captioner
from data import load
from reports.plots import plot_sweep
from reports.sweep import sweep_settings

CAPTIONS = {
    f"photo{i}": [f"a {colour} ball.", f"the {colour} circle on grass."]
    for i, colour in enumerate(("red", "green", "blue", "yellow"))
}
NO_JAVA = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", "100", "--max_new_tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of random weights whose captions depend on the image."""
    folder = tmp_path_factory.mktemp("model")
    blip, processor = tiny.build(folder, seed=3)
    with torch.no_grad():
        for name, weight in blip.named_parameters():
            if "crossattention" in name and "dense.weight" in name:
                weight *= 100
    blip.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), CAPTIONS, dict.fromkeys(CAPTIONS, "validation"))


def test_combinations_are_read_with_the_types_of_their_flags():
    assert sweep_settings("num_beams=1,3 length_penalty=1,1.4") == [
        {"num_beams": 1, "length_penalty": 1.0},
        {"num_beams": 1, "length_penalty": 1.4},
        {"num_beams": 3, "length_penalty": 1.0},
        {"num_beams": 3, "length_penalty": 1.4},
    ]
    assert sweep_settings("early_stopping=true,false") == [{"early_stopping": True}, {"early_stopping": False}]
    assert sweep_settings("num_beams=3,3") == [{"num_beams": 3}]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("num_beam=1,3", "'num_beam' cannot be swept. Did you mean num_beams?"),
        ("num_beams=1,x", "num_beams: expected int, got 'x'"),
        ("num_beams=1.5", "num_beams: expected int, got 1.5"),
        ("num_beams 1,3", "not of the form key=value,value"),
        ("num_beams=1, 3", "a value is missing"),
        ("num_beams=1 num_beams=3", "is given twice"),
        ("prompt=a", "'prompt' cannot be swept"),
        (" ", "no setting to sweep"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_clear_message(sweep, said):
    with pytest.raises(ValueError, match="sweep: ") as error:
        sweep_settings(sweep)
    assert said in str(error.value)


def test_each_setting_captions_as_by_itself_and_each_image_is_encoded_once(model, dataset):
    captioner = Captioner.from_pretrained(str(model), max_new_tokens=8)
    records = load(dataset, splits=("validation",))["validation"]
    settings = sweep_settings("num_beams=1,3,5 length_penalty=0.2,3.0")
    encoded, searches = [], []
    encoder = captioner.model.vision_model.encoder
    encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    plain = captioner.model.generate
    captioner.model.generate = lambda *args, **kwargs: searches.append(kwargs["num_beams"]) or plain(*args, **kwargs)
    found = captioner.sweep_split(records, [captioner.with_settings(**setting) for setting in settings], batch_size=2)
    assert len(encoded) == 2, "two batches, whatever the settings"
    assert searches == [1, 3, 3, 5, 5] * 2, "the length penalty means nothing to a greedy search: one is enough"
    alone = [
        Captioner.from_pretrained(str(model), max_new_tokens=8, **setting).caption_split(records, batch_size=2)
        for setting in settings
    ]
    assert found == alone
    assert len({tuple(captions.values()) for captions in found}) > 1, "the settings make a difference here"
    assert len(set(found[0].values())) > 1, "and so do the images"


@pytest.mark.parametrize("family", ["git", "blip2-opt", "llava", "vit-gpt2", "pix2struct", "mllama"])
def test_every_family_can_be_swept(family, dataset, caplog):
    model, processor = families.build(family)
    captioner = Captioner(model.eval(), processor, max_new_tokens=4)
    records = load(dataset, splits=("validation",))["validation"]
    settings = [{"num_beams": 1}, {"num_beams": 2}]
    with caplog.at_level("INFO", "captioner"):
        found = captioner.sweep_split(records, [captioner.with_settings(**setting) for setting in settings])
    assert found == [captioner.with_settings(**setting).caption_split(records) for setting in settings]
    assert ("takes no encoded images" in caplog.text) == (family == "mllama")


def test_the_best_setting_is_scored_in_full_and_kept_when_asked(model, dataset, tmp_path):
    mine = shutil.copytree(model, tmp_path / "mine")
    command = ["--dataset_name", dataset, "--split", "validation", "--model_name_or_path", mine, *NO_JAVA]
    out = tmp_path / "out"
    result = tiny.run(
        "evaluate.py", *command, "--output_dir", out, "--sweep", "num_beams=1,2 length_penalty=0.5,3.0",
        "--sweep_metric", "ROUGE_L", "--save_best_sweep",
    )  # fmt: skip
    sweep = json.loads((out / "sweep.json").read_text())
    rows = sweep["settings"]
    assert [row["settings"] for row in rows] == sweep_settings("num_beams=1,2 length_penalty=0.5,3.0")
    assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4]
    best = rows[sweep["best"]]
    assert best["rank"] == 1
    assert best["scores"]["ROUGE_L"] == max(row["scores"]["ROUGE_L"] for row in rows)
    assert best["p"] is None
    equal = [row["p"] == 1.0 and row["scores"] == best["scores"] for row in rows]  # the same captions
    assert all(row["p"] is None or same for row, same in zip(rows, equal, strict=True)), "so few images have no p"
    scores = json.loads((out / "coco_metrics.json").read_text())
    assert scores["ROUGE_L"] == best["scores"]["ROUGE_L"]
    assert scores["generation"]["num_beams"] == best["settings"]["num_beams"]
    tried = json.loads((out / "sweep_captions.json").read_text())
    predictions = {row["image_id"]: row["caption"] for row in json.loads((out / "predictions.json").read_text())}
    assert tried[sweep["best"]] == {"settings": best["settings"], "captions": predictions}
    assert "ROUGE-L 0." in result.stderr
    assert (out / "sweep.png").stat().st_size > 1000
    assert '<section id="sweep"' in (out / "report.html").read_text()

    kept = json.loads((mine / "generation_config.json").read_text())
    before = json.loads((model / "generation_config.json").read_text())
    assert before.items() - kept.items() <= {("num_beams", before.get("num_beams"))} | set(before.items())
    tiny.run("evaluate.py", *command, "--output_dir", tmp_path / "again")
    again = json.loads((tmp_path / "again/coco_metrics.json").read_text())
    assert again["generation"] == scores["generation"]
    assert again["ROUGE_L"] == scores["ROUGE_L"]


def test_what_cannot_end_well_is_refused_before_captioning(dataset, model, tmp_path):
    command = ["--dataset_name", dataset, "--split", "validation", "--output_dir", tmp_path, *NO_JAVA]
    sweep = ("--sweep", "num_beams=1,2")
    result = tiny.run("evaluate.py", *command, *sweep, "--sweep_metric", "Cider", fails=True)
    assert "--sweep_metric Cider: choose one of CIDEr," in result.stderr
    result = tiny.run("evaluate.py", *command, *sweep, "--save_best_sweep", "--model_name_or_path", "a/b", fails=True)
    assert "a/b is not a folder" in result.stderr
    result = tiny.run("evaluate.py", *command, "--sweep", "num_beem=1", fails=True)
    assert "Did you mean num_beams?" in result.stderr


@pytest.mark.parametrize(
    "sweep",
    [
        "num_beams=1,3,5",
        "num_beams=1,3 length_penalty=0.5,1",
        "num_beams=1,3 length_penalty=0.5,1 repetition_penalty=1,2 early_stopping=true,false",
    ],
)
def test_any_number_of_keys_is_drawn(sweep, tmp_path):
    rows = [{"settings": setting, "scores": {"CIDEr": 0.1 * n}} for n, setting in enumerate(sweep_settings(sweep))]
    plot_sweep({"metric": "CIDEr", "settings": rows}, tmp_path)
    assert "</svg>" in (tmp_path / "sweep.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.png", "sweep.svg"]
