"""evaluate.py: captions a split, or scores captions that exist, and says what does not fit."""

import json
import re

import pytest
import tiny

import metrics

CAPTIONS = {
    f"photo{i}": [f"a {colour} ball.", f"the {colour} circle on grass."]
    for i, colour in enumerate(("red", "green", "blue", "yellow"))
}
SPLITS = {"photo0": "train", "photo1": "validation", "photo2": "test", "photo3": "test"}
NO_JAVA = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", "20")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), CAPTIONS, SPLITS)


def test_a_split_is_captioned_and_scored(model, dataset, tmp_path):
    result = tiny.run(
        "evaluate.py", "--model_name_or_path", model, "--dataset_name", dataset, "--split", "test",
        "--output_dir", tmp_path, "--num_beams", 2, "--seen_in_training", *NO_JAVA,
    )  # fmt: skip
    scores = json.loads((tmp_path / "coco_metrics.json").read_text())
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image_id"] for row in predictions] == ["photo2.png", "photo3.png"]
    assert scores["counts"] == {"images": 2, "references": 4, "cut_captions": 2}
    assert "2 of 2 captions were cut at max_new_tokens, 30" in result.stderr
    assert scores["generation"]["num_beams"] == 2
    assert scores["split"] == "test"
    assert scores["corpus"]["seen_in_training"] is not None
    assert f"bad_endings {scores['corpus']['bad_endings']:.3f}" in result.stderr
    # What was written can be scored again, with the same result.
    again = tmp_path / "again"
    references = tmp_path / "references.json"
    references.write_text(json.dumps({f"{name}.png": CAPTIONS[name] for name in ("photo2", "photo3")}))
    tiny.run(
        "evaluate.py", "--predictions", tmp_path / "predictions.json", "--references", references,
        "--output_dir", again, *NO_JAVA,
    )  # fmt: skip
    rescored = json.loads((again / "coco_metrics.json").read_text())
    assert all(
        rescored[name] == scores[name] for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "sacrebleu", "intervals")
    )


def test_photographs_with_text_are_scored_apart(model, tmp_path):
    tiny.write_photos(tmp_path, CAPTIONS)
    rows = [
        {
            "image": f"{name}.png",
            "image_id": number,
            "captions": texts,
            "text_detected": number % 2 == 0,
            "split": "val",
        }
        for number, (name, texts) in enumerate(CAPTIONS.items())
    ]
    (tmp_path / "processed_val.json").write_text(json.dumps(rows))
    result = tiny.run(
        "evaluate.py", "--model_name_or_path", model, "--dataset_name", tmp_path / "processed_val.json",
        "--image_dir", tmp_path, "--split", "validation", "--output_dir", tmp_path / "out", *NO_JAVA,
    )  # fmt: skip
    subsets = json.loads((tmp_path / "out/coco_metrics.json").read_text())["subsets"]
    predictions = {
        str(row["image_id"]): row["caption"] for row in json.loads((tmp_path / "out/predictions.json").read_text())
    }
    for name, numbers in (("text_detected", (0, 2)), ("no_text_detected", (1, 3))):
        alone, _ = metrics.score(
            {str(n): predictions[str(n)] for n in numbers},
            {str(n): rows[n]["captions"] for n in numbers},
            meteor=False,
            spice=False,
            bootstrap_samples=20,
            seed=42,
        )
        assert subsets[name]["counts"] == {"images": 2, "references": 4}
        for score in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "sacrebleu", "intervals"):
            assert subsets[name][score] == alone[score]
        assert re.search(rf"{name}, 2 images: .*BLEU-1 {alone['Bleu_1']:.4f}", result.stderr)


def test_corrupted_images_are_what_the_model_sees_with_any_number_of_workers(model, dataset):
    import data
    from captioner import Captioner
    from collator import ImageCollator

    captioner = Captioner.from_pretrained(
        str(model), bf16=False, corruption=data.corruption(["gaussian_noise:40", "jpeg:10"])
    )
    records, seen = data.load(dataset)["test"], []
    captioner.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    for workers in (0, 1):
        captioner.caption_split(records, num_workers=workers)
    assert seen[0].equal(seen[1])
    plain = ImageCollator(captioner.processor, captioner.model.config)(list(records))
    corrupted = [captioner.corruption(data.open_image(row["image"]), 0, row["image_id"]) for row in records]
    assert seen[0].equal(captioner.collator.pixels(corrupted))
    assert (seen[0] - plain["pixel_values"]).abs().mean(dim=(1, 2, 3)).gt(0.1).all()
    assert captioner.description()["corrupt"] == ["gaussian_noise:40", "jpeg:10"]


def test_what_the_images_were_corrupted_with_stands_beside_the_scores(model, dataset, tmp_path):
    command = ["--model_name_or_path", model, "--dataset_name", dataset, "--max_new_tokens", 4, *NO_JAVA]
    tiny.run("evaluate.py", *command, "--output_dir", tmp_path, "--corrupt", "jpeg:10", "blur:2")
    generation = json.loads((tmp_path / "coco_metrics.json").read_text())["generation"]
    assert generation["corrupt"] == ["jpeg:10", "blur:2"]
    assert "QUALITY 1 to 100" in tiny.run("evaluate.py", *command, "--corrupt", "jpeg:0", fails=True).stderr
    assert (
        "Known: gaussian_noise, blur, jpeg" in tiny.run("evaluate.py", *command, "--corrupt", "fog", fails=True).stderr
    )


def test_finished_captions_cannot_be_corrupted(tmp_path):
    for name in ("predictions", "references"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"a": "a dog" if name == "predictions" else ["a dog"]}))
    result = tiny.run(
        "evaluate.py", "--predictions", tmp_path / "predictions.json", "--references", tmp_path / "references.json",
        "--output_dir", tmp_path / "out", "--corrupt", "jpeg:10", *NO_JAVA, fails=True,
    )  # fmt: skip
    assert "--corrupt changes the images to caption" in result.stderr


def test_two_processes_give_the_captions_of_one(model, dataset, tmp_path):
    command = ["--model_name_or_path", model, "--dataset_name", dataset, "--max_new_tokens", 8, *NO_JAVA]
    tiny.run("evaluate.py", *command, "--output_dir", tmp_path / "one")
    tiny.run("evaluate.py", *command, "--output_dir", tmp_path / "two", processes=2)
    assert (tmp_path / "one/predictions.json").read_text() == (tmp_path / "two/predictions.json").read_text()


@pytest.mark.slow
def test_an_untrained_model_scores_nothing_on_real_captions(test_data, tmp_path):
    from models.loading import build_model

    model, processor = build_model(
        str(tiny.write_config(tmp_path)), str(test_data / "bert-base-uncased" / "vocab.txt"), []
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tiny.run(
        "evaluate.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", test_data / "flickr8k",
        "--output_dir", tmp_path / "out", "--max_samples", 100, *NO_JAVA,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out/coco_metrics.json").read_text())
    assert scores["counts"]["images"] == 100
    assert scores["sacrebleu"] < 5


def test_scores_of_real_captions_need_no_java(test_data, tmp_path):
    folder = test_data / "coco_karpathy_test"
    result = tiny.run(
        "evaluate.py", "--predictions", folder / "predictions_contrastive.json",
        "--references", folder / "captions_karpathy_test.json", "--output_dir", tmp_path, "--bootstrap_samples", 20,
        CAPTION_NO_JAVA="1",
    )  # fmt: skip
    scores = json.loads((tmp_path / "coco_metrics.json").read_text())
    assert scores["counts"]["images"] == 5000
    assert scores["CIDEr"] > 0
    assert scores["METEOR"] is None
    assert scores["SPICE"] is None
    assert {"METEOR", "SPICE"} <= set(scores["unavailable"])
    assert "METEOR will be null" in result.stderr


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ({"a": "a dog"}, "'b'"),
        ({"a": "a dog", "b": "a cat", "c": "a ball"}, "'c'"),
        (
            [{"image_id": "a", "caption": "x"}, {"image_id": "a", "caption": "y"}, {"image_id": "b", "caption": "z"}],
            "a",
        ),
        ({"a": "a dog", "b": 3}, "b"),
        ("{", "predictions.json"),
    ],
    ids=["missing id", "extra id", "two captions", "no text", "no JSON"],
)
def test_predictions_that_do_not_fit_are_one_clear_message(predictions, said, tmp_path):
    (tmp_path / "predictions.json").write_text(predictions if isinstance(predictions, str) else json.dumps(predictions))
    (tmp_path / "references.json").write_text(json.dumps({"a": ["a dog"], "b": ["a cat"]}))
    result = tiny.run(
        "evaluate.py", "--predictions", tmp_path / "predictions.json", "--references", tmp_path / "references.json",
        "--output_dir", tmp_path / "out", *NO_JAVA, fails=True,
    )  # fmt: skip
    assert said in result.stderr
    assert not (tmp_path / "out/coco_metrics.json").exists()


def test_the_images_that_both_have_are_scored_on_request(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"a": "a dog", "b": "a cat", "x": "a ball"}))
    (tmp_path / "r.json").write_text(json.dumps({name: ["a dog", "the dog"] for name in "abcd"}))
    command = ["evaluate.py", "--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", "--output_dir"]
    assert "--common" in tiny.run(*command, tmp_path / "all", *NO_JAVA, fails=True).stderr
    result = tiny.run(*command, tmp_path / "out", *NO_JAVA, "--common")
    assert "2 images in common; left out 1 predictions and 2 images with references" in result.stderr
    assert json.loads((tmp_path / "out/coco_metrics.json").read_text())["counts"]["images"] == 2


def test_a_wrong_split_lists_the_right_ones(model, dataset, tmp_path):
    result = tiny.run(
        "evaluate.py", "--model_name_or_path", model, "--dataset_name", dataset, "--split", "tset",
        "--output_dir", tmp_path, fails=True,
    )  # fmt: skip
    assert "there is no split 'tset'. Splits are called train, validation, test" in result.stderr


def test_a_folder_that_is_no_model_is_refused(dataset, tmp_path):
    from transformers import BertConfig

    command = ["--dataset_name", dataset, "--output_dir", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    assert (
        "is not a model folder"
        in tiny.run("evaluate.py", "--model_name_or_path", tmp_path / "empty", *command, fails=True).stderr
    )
    BertConfig().save_pretrained(tmp_path / "bert")
    result = tiny.run("evaluate.py", "--model_name_or_path", tmp_path / "bert", *command, fails=True)
    assert "is of family 'bert'. Known families: blip" in result.stderr
    assert "no/model" in tiny.run("evaluate.py", "--model_name_or_path", "no/model", *command, fails=True).stderr


def test_damaged_weights_and_a_model_of_another_task_are_refused(model, dataset, tmp_path):
    import shutil

    command = ["--dataset_name", dataset, "--output_dir", tmp_path / "out", "--model_name_or_path"]
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    assert "are damaged" in tiny.run("evaluate.py", *command, damaged, fails=True).stderr
    answers = shutil.copytree(model, tmp_path / "answers")
    config = json.loads((answers / "config.json").read_text())
    (answers / "config.json").write_text(json.dumps(config | {"architectures": ["BlipForQuestionAnswering"]}))
    assert "is a BlipForQuestionAnswering" in tiny.run("evaluate.py", *command, answers, fails=True).stderr


@pytest.mark.parametrize("common", [[], ["--common"]])
def test_answers_to_a_second_question_are_not_scored_against_all_answers(common, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"x.png": "red", "x.png#2": "a dog"}))
    turns = [[{"from": "human", "value": f"{word}?"}, {"from": "gpt", "value": word}] for word in ("red", "a dog")]
    talk = [{"image": "x.png", "conversations": conversation} for conversation in turns]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    command = ["--predictions", tmp_path / "p.json", "--references", tmp_path / "talk.jsonl", *common, *NO_JAVA]
    result = tiny.run("evaluate.py", *command, "--output_dir", tmp_path / "out", fails=True)
    assert "'x.png#2' answers another question" in result.stderr
    assert "evaluate.py --model_name_or_path" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out/coco_metrics.json").exists()


def test_predictions_without_references_are_refused(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    result = tiny.run("evaluate.py", "--predictions", tmp_path / "p.json", "--output_dir", tmp_path, fails=True)
    assert "go together" in result.stderr


def test_illegal_characters_and_loops_are_counted_and_left_out_when_told(tmp_path):
    predictions = {"1": "a \ufffd\ufffd dog\u200b runs", "2": "a cat a cat a cat"}
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    (tmp_path / "r.json").write_text(json.dumps({"1": ["a dog runs"], "2": ["a cat sits"]}))
    command = ["--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", *NO_JAVA]
    found = []
    for name, more in (("plain", []), ("filtered", ["--remove_illegal_characters"])):
        tiny.run("evaluate.py", *command, "--output_dir", tmp_path / name, *more)
        found.append(json.loads((tmp_path / name / "coco_metrics.json").read_text()))
    assert [scores["corpus"]["illegal_characters"] for scores in found] == [0.5, 0]
    assert [scores["corpus"]["repetition"] for scores in found] == [0.5, 0.5]
