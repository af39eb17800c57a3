"""SCST: the gradient is that of the expected reward, and the run around it is one of train.py's."""

import json
import math
import shutil
from collections import Counter

import datasets
import families
import pytest
import tiny
import torch
from conftest import ROOT
from enumerated import REFERENCES, all_captions, batch_of, build, compare, true_gradient
from PIL import Image
from safetensors.torch import load_file, save_file

import objectives.scst
import train
from captioner import Captioner
from collator import IGNORE, CaptionCollator
from models.families import vision_encoder
from objectives import caption_loss
from objectives.cross_entropy import target_logits
from objectives.policy import SAMPLING, LastIsGreedy, draw
from objectives.rewards import Rewards
from objectives.scst import SelfCritical


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def captioner(tmp_path):
    return build(tmp_path)


SETTINGS = {
    "leave one out": {},
    "greedy baseline": {"baseline": "greedy"},
    "temperature and top-p": {"temperature": 1.5, "top_p": 0.8},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_gradient_is_the_true_policy_gradient(captioner, settings):
    rewards, batch = Rewards({"cider": 1.0, "bleu": 0.5}, REFERENCES), batch_of(captioner, ["0"])
    objective = SelfCritical(captioner, rewards, samples=250, **settings)
    distribution = {name: value for name, value in settings.items() if name != "baseline"}
    truth = true_gradient(captioner, rewards, batch, **distribution)
    cosine, distance = compare(objective, captioner, batch, truth)
    assert cosine > 0.98
    assert distance < 2  # about 1 where nothing but chance lies between the two


def test_log_probs_shifted_by_one_are_far_from_it(captioner, monkeypatch):
    rewards, batch = Rewards({"cider": 1.0, "bleu": 0.5}, REFERENCES), batch_of(captioner, ["0"])
    objective = SelfCritical(captioner, rewards, samples=250)
    truth = true_gradient(captioner, rewards, batch)

    def shifted(model, batch):
        """The published fault: each token is looked up in the output at its own place, which predicts the next."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        at = batch["labels"] != IGNORE
        return model(**inputs, logits_to_keep=at).logits, batch["labels"][at]

    monkeypatch.setattr(objectives.scst, "target_logits", shifted)
    cosine, distance = compare(objective, captioner, batch, truth)
    assert cosine < 0.7
    assert distance > 10


def test_the_two_parts_of_the_loss_are_weighed_and_accumulate(captioner):
    """Next to temperature 0 all samples are one caption, so that nothing but the cross-entropy part is left."""
    rewards = Rewards({"cider": 1.0}, REFERENCES)
    objective = SelfCritical(captioner, rewards, samples=2, temperature=1e-4, ce_weight=0.3)
    whole = batch_of(captioner, ["0", "1", "2"])
    expected = caption_loss(captioner.model, batch_of(captioner, ["0", "1", "2"], prompts_only=False)).item()
    result = objective(captioner.model, whole)
    assert result["loss"].item() == pytest.approx(0.3 * expected, rel=1e-5)
    assert result["ce_loss"].item() == pytest.approx(expected, rel=1e-5)
    items = whole["labels"][:, 1:].ne(IGNORE).sum()
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        part = {name: value[images] for name, value in whole.items()}
        part["labels"] = whole["labels"][2 * images.start : 2 * images.stop]
        parts.append(objective(captioner.model, part, items)["loss"])
    assert sum(parts).item() == pytest.approx(result["loss"].item(), rel=1e-5)


def test_samples_are_of_the_models_own_distribution_whatever_the_captioner_is_set_to(captioner):
    """generate's default top_k of 50, the settings of evaluation, and what else a checkpoint's generation_config.json holds
    would make the samples another policy's."""
    leftovers = {"typical_p": 0.5, "epsilon_cutoff": 0.05, "min_length": 4, "bad_words_ids": [[5]], "temperature": 0.3}
    for module in (captioner.model, captioner.model.text_decoder):
        module.generation_config.update(**leftovers)
    captioner = captioner.with_settings(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    batch = batch_of(captioner, ["0"])
    drawn = draw(captioner, batch, **SAMPLING, num_return_sequences=4000)
    captions = list(all_captions(captioner))
    rows = captioner.training_batch(captioner.encode(batch), captions)
    captioner.model.eval()
    with torch.no_grad():
        logits = captioner.model(pixel_values=batch["pixel_values"], input_ids=rows["input_ids"]).logits
    log_probs = logits.log_softmax(dim=-1)
    expected = [sum(log_probs[i, t, token] for t, token in enumerate(c)).exp() * 4000 for i, c in enumerate(captions)]
    counts = Counter(map(tuple, drawn.tokens))
    found = [(counts[tuple(c)], e.item()) for c, e in zip(captions, expected, strict=True) if e > 5]
    assert sum((n - e) ** 2 / e for n, e in found) < 2 * len(found)  # chi-square
    assert {len(tokens) for tokens in drawn.tokens} == {1, 2, 3}
    assert drawn.ended[0] == [tokens[-1] == captioner.collator.end for tokens in drawn.tokens]


def test_the_greedy_caption_is_decoded_with_the_samples(captioner):
    batch = captioner.encode(batch_of(captioner, ["0", "1"]))
    for settings in ({}, {"temperature": 2.0, "top_p": 0.5}):
        together = SAMPLING | settings | {"logits_processor": [LastIsGreedy(4)], "num_return_sequences": 4}
        drawn = draw(captioner, batch, **together)
        greedy = draw(captioner, batch, num_beams=1, early_stopping=False)
        assert [group[-1] for group in drawn.texts] == [text for (text,) in greedy.texts]
        assert drawn.tokens[3::4] == greedy.tokens
        assert drawn.first(3).tokens == [drawn.tokens[i] for i in (0, 1, 2, 4, 5, 6)]
    assert len({tuple(row) for row in drawn.first(3).tokens}) > 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_logged_is_of_the_samples_and_the_baseline_is_the_greedy_captions_reward(captioner, temperature):
    rewards, batch = Rewards({"cider": 1.0, "bleu": 0.5}, REFERENCES), batch_of(captioner, ["0", "1"])
    objective = SelfCritical(captioner, rewards, samples=3, baseline="greedy", temperature=temperature)
    torch.manual_seed(0)
    with torch.no_grad():
        logged = objective(captioner.model, batch)
    torch.manual_seed(0)
    encoded = captioner.encode(batch)
    drawn = draw(captioner, encoded, **objective.sampling)
    sampled, greedy = drawn.first(3), draw(captioner, encoded, num_beams=1, early_stopping=False)
    for name, candidates in (("reward", sampled), ("reward_baseline", greedy)):
        expected, _ = rewards(batch["image_ids"], candidates.texts, candidates.ended)
        assert logged[name].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    ended = [end for group in sampled.ended for end in group]
    assert logged["unended"].item() == pytest.approx(1 - sum(ended) / 6)
    lengths = [len(row) - end for row, end in zip(sampled.tokens, ended, strict=True)]
    assert logged["sample_length"].item() == pytest.approx(sum(lengths) / 6)
    with torch.no_grad():
        logits, _ = target_logits(captioner.model, captioner.training_batch(encoded, sampled.tokens))
    drawn_from = torch.distributions.Categorical(logits=logits / temperature)
    assert logged["entropy"].item() == pytest.approx(drawn_from.entropy().mean().item(), rel=1e-5)


def test_a_caption_of_one_word_counts_as_a_long_one():
    """In T5's labels the first one is a target. A reward that does not depend on the references, and so the same loss."""
    model, processor = families.build("blip2-t5")
    captioner = Captioner(model, processor, max_new_tokens=6)
    collator = CaptionCollator(processor, model.config, prompt=captioner.prompt, prompts_only=SelfCritical.prompts_only)
    objective = SelfCritical(captioner, lambda ids, texts, ended: (torch.eye(len(texts[0]))[:1], {}), samples=8)
    image, losses = Image.effect_noise((40, 32), 100).convert("RGB"), []
    for caption in ("a", "a dog runs on the grass"):
        batch = collator([{"image": image, "image_id": "0", "captions": [caption], "epoch": 0}])
        torch.manual_seed(0)
        losses.append(objective(model.train(), batch, 10)["loss"].item())
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_learns_from_its_own_captions(name):
    """The samples' gradient reaches the language model and, where it is trained, the encoder; dropout is off."""
    model, processor = families.build(name)
    captioner = Captioner(model, processor, num_beams=2, max_new_tokens=6)
    references = {"0": ["a dog runs on the grass", "a dog"], "1": ["two men in the water"]}
    images = [Image.effect_noise((40, 32), 100 * (1 + i)).convert("RGB") for i in range(2)]
    collator = CaptionCollator(processor, model.config, prompt=captioner.prompt, prompts_only=SelfCritical.prompts_only)
    batch = collator(
        [
            {"image": image, "image_id": i, "captions": references[i], "epoch": 0}
            for i, image in zip("01", images, strict=True)
        ]
    )
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.5)
    rewards = Rewards({"cider": 1.0, "bleu": 1.0}, references)
    objective = SelfCritical(captioner, rewards, samples=3, ce_weight=0.3)
    model.train()
    torch.manual_seed(0)
    result = objective(model, batch)
    result["loss"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    encoder = {name for name, module in model.named_modules() if module is vision_encoder(model)}
    assert any(name.startswith(tuple(encoder)) for name in moved)
    assert math.isfinite(result["loss"].item())
    # The greedy caption has the highest log-probability at each of its tokens, in training mode too.
    encoded = captioner.encode(batch)
    greedy = draw(captioner, encoded, num_beams=1, early_stopping=False)
    twice = [tokens for tokens in greedy.tokens for _ in range(2)]
    logits, targets = target_logits(model, captioner.training_batch(encoded, twice))
    assert logits.argmax(dim=-1).equal(targets)


# The run around it

CAPTIONS = {
    f"photo{i}": [f"a {colour} {shape} on the grass.", f"the {colour} {shape} near water."]
    for i, (colour, shape) in enumerate(
        (c, s) for c in ("red", "green", "blue", "yellow") for s in ("circle", "square", "star", "ball")
    )
}
SPLITS = dict.fromkeys(CAPTIONS, "train") | dict.fromkeys(("photo3", "photo6"), "validation") | {"photo9": "test"}
LOGGED = {
    "reward", "reward_cider", "reward_bleu", "reward_baseline", "advantage", "sample_length", "bad_endings", "unended",
    "entropy", "ce_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A dataset, and the folder of a captioner that was trained on it a little."""
    folder = tmp_path_factory.mktemp("scst")
    dataset = tiny.write_photos(folder / "photos", CAPTIONS, SPLITS)
    tiny.run(
        "train.py", "--model_config", tiny.write_config(folder), "--tokenizer_vocab", tiny.write_vocabulary(folder),
        "--num_train_epochs", 15, "--learning_rate", 3e-3, *flags(dataset, folder / "model"),
    )  # fmt: skip
    return dataset, folder / "model"


def flags(dataset, output, **changed):
    values = {
        "dataset_name": dataset, "output_dir": output, "per_device_train_batch_size": 4, "logging_steps": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": "false", "num_beams": 2, "max_new_tokens": 10,
        "meteor": "false", "spice": "false", "bootstrap_samples": 0,
    }  # fmt: skip
    return [word for name, value in (values | changed).items() for word in (f"--{name}", value)]


def scst_flags(started, output, **changed):
    values = {
        "model_name_or_path": started[1], "objective": "scst", "reward": "cider:1.0 bleu:0.5", "scst_samples": 3,
        "ce_weight": 0.3, "num_train_epochs": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    return flags(started[0], output, **(values | changed))


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_logs_each_part_and_keeps_the_best_by_cider(started, tmp_path):
    tiny.run("train.py", *scst_flags(started, tmp_path / "out", gradient_accumulation_steps=2))
    log = log_of(tmp_path / "out")
    training = [row for row in log if "loss" in row]
    assert training
    assert all(row.keys() >= LOGGED for row in training)
    for row in training:
        assert row["reward"] == pytest.approx(row["reward_cider"] + 0.5 * row["reward_bleu"], rel=1e-4)
        assert row["reward_baseline"] == pytest.approx(row["reward"], rel=1e-4)  # leave one out
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(row["eval_CIDEr"] for row in log if "eval_CIDEr" in row)


def test_a_broken_run_goes_on_as_if_it_was_not(started, tmp_path):
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    tiny.run("train.py", *scst_flags(started, tmp_path / "whole", **options))
    tiny.run("train.py", *scst_flags(started, tmp_path / "broken", **options))
    first = min((tmp_path / "broken").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert first.name == "checkpoint-3"
    for path in (tmp_path / "broken").iterdir():
        if path.name not in (first.name, "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = tiny.run("train.py", *scst_flags(started, tmp_path / "broken", **options))
    assert "resuming from" in result.stderr
    whole, broken = ([(r["step"], r["loss"], r["reward"]) for r in log_of(tmp_path / f) if "loss" in r]
                     for f in ("whole", "broken"))  # fmt: skip
    assert whole == broken
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "broken"))
    assert all(one[name].equal(other[name]) for name in one)


def test_two_processes_train(started, tmp_path):
    tiny.run("train.py", *scst_flags(started, tmp_path / "out", num_train_epochs=1), processes=2)
    assert all(row.keys() >= LOGGED for row in log_of(tmp_path / "out") if "loss" in row)


def test_a_kept_encoding_and_bfloat16_train_too(started, tmp_path):
    values = scst_flags(started, tmp_path / "out", num_train_epochs=1, scst_baseline="greedy", freeze_vision="true")
    tiny.run("train.py", *values, "--feature_cache", "memory", "--bf16", "true", "--scst_top_p", "0.9")
    training = [row for row in log_of(tmp_path / "out") if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in training)


def test_an_adapter_goes_through_the_stages_alone(started, tmp_path):
    first, last = tmp_path / "1", tmp_path / "3"
    lora = {"num_train_epochs": 1, "use_peft": "true"}
    tiny.run("train.py", *flags(started[0], first, model_name_or_path=started[1], learning_rate=1e-3, **lora))
    tiny.run("train.py", *scst_flags(started, last, model_name_or_path=first, learning_rate=1e-3, **lora))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, last))
    assert one.keys() == other.keys()
    assert not all(one[name].equal(other[name]) for name in one)
    assert not (last / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_config": ROOT / "recipes/quickstart/model.json"}, "starts from a trained captioner"),
        ({"streaming": "true"}, "leave out --streaming"),
        ({"reward": "cidre:1"}, "'cidre' is not a reward. Known: cider, bleu"),
        ({"reward": "cider:much"}, "the weight of cider is 'much', not a number"),
        ({"reward": ""}, "names no reward"),
        ({"scst_samples": 1}, "scst_samples 1 is too few"),
        ({"scst_baseline": "none"}, "neither leave_one_out nor greedy"),
        ({"ce_weight": 1.0}, "below 1"),
        ({"objective": "xe"}, "'xe' is not one of cross_entropy, scst"),
    ],
)
def test_a_wrong_flag_is_one_clear_message(changed, said, tmp_path, monkeypatch, capsys):
    values = scst_flags(("nowhere", "nothing"), tmp_path / "out", **changed)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, values)])
    with pytest.raises((SystemExit, ValueError)) as error:
        train.main()
    assert said in f"{error.value} {capsys.readouterr().err}"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(started, tmp_path):
    broken = shutil.copytree(started[1], tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors["vision_model.post_layernorm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    values = flags(started[0], tmp_path / "out", model_name_or_path=broken, max_train_samples=2)
    result = tiny.run("train.py", *values, fails=True)
    assert "the loss is nan at step 1" in result.stderr
    assert "photo0.png" in result.stderr
    assert "photo1.png" in result.stderr
