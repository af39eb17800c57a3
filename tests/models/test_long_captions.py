"""Paragraphs of more than 256 tokens are trained on whole, captioned to their end, and scored."""

import json

import pytest
import tiny

LENGTH = 270


@pytest.mark.slow
def test_a_paragraph_of_270_words_is_learnt_and_given_back_to_its_end(tmp_path):
    paragraphs = {f"p{n}": " ".join(f"w{n}x{i}" for i in range(LENGTH)) for n in range(2)}
    short = {"held0": ["w0x0 w0x1"], "held1": ["w1x0 w1x1"]}
    splits = dict.fromkeys(paragraphs, "train") | {"held0": "validation", "held1": "test"}
    source = tiny.write_photos(tmp_path / "photos", {name: [text] for name, text in paragraphs.items()} | short, splits)
    words = [word for text in paragraphs.values() for word in text.split()]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = {**tiny.CONFIG, "text_config": {**tiny.CONFIG["text_config"], "max_position_embeddings": 320}}
    (tmp_path / "model.json").write_text(json.dumps(config))
    scoring = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--num_beams", 1)
    tiny.run(
        "train.py", "--model_config", tmp_path / "model.json", "--tokenizer_vocab", tmp_path / "vocab.txt",
        "--dataset_name", source, "--output_dir", tmp_path / "run", "--max_txt_len", 300, "--max_new_tokens", 300,
        "--max_steps", 250, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
        "--learning_rate", 1e-2, "--label_smoothing_factor", 0, "--gradient_checkpointing", "false",
        "--eval_strategy", "no", "--save_strategy", "no", *scoring,
    )  # fmt: skip
    tiny.run(
        "evaluate.py", "--model_name_or_path", tmp_path / "run", "--dataset_name", source, "--split", "train",
        "--output_dir", tmp_path / "scores", *scoring,
    )  # fmt: skip
    predictions = json.loads((tmp_path / "scores/predictions.json").read_text())
    assert {row["image_id"]: row["caption"] for row in predictions} == {f"{k}.png": v for k, v in paragraphs.items()}
    scores = json.loads((tmp_path / "scores/coco_metrics.json").read_text())
    assert scores["Bleu_4"] > 0.999
    assert scores["corpus"]["mean_length"] == LENGTH
    result = tiny.run(
        "infer.py", tmp_path / "photos/p1.png", "--model_name_or_path", tmp_path / "run", "--num_beams", 1
    )
    assert result.stdout.split("\t")[1].strip() == paragraphs["p1"]
