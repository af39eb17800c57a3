"""Laws of objectives as train.py builds them from its flags."""

import inspect
import json

import datasets
import families
import pytest
import tiny
import torch
from PIL import Image
from small_run import CAPTIONS, SPLITS, flags
from transformers import LogitsProcessor, LogitsProcessorList

import data
import metrics
from arguments import MetricArguments, ObjectiveArguments
from captioner import Captioner
from collator import CaptionCollator
from models.loading import load_model
from objectives import build_objective
from objectives.cross_entropy import mean_log_probs
from objectives.dico import Dico
from objectives.grpo import Grpo
from objectives.scst import SelfCritical


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_the_loss_that_train_py_logs_is_that_of_the_definition_of_label_smoothing(smoothing, tmp_path):
    model = tiny.build_folder(tmp_path)
    dataset = tiny.write_photos(tmp_path / "photos", CAPTIONS, SPLITS)
    words = flags(
        tmp_path, dataset, tmp_path / "out", max_steps=1, learning_rate=0, label_smoothing_factor=smoothing,
        per_device_train_batch_size=12, gradient_accumulation_steps=1, captions_per_image=2, eval_strategy="no",
        save_strategy="no", report="false", model_name_or_path=model,
    )  # fmt: skip
    kept = [
        pair
        for pair in zip(words[::2], words[1::2], strict=True)
        if pair[0] not in ("--model_config", "--tokenizer_vocab")
    ]
    tiny.run("train.py", *[word for pair in kept for word in pair])
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    model, processor = load_model(str(model))
    pairs = data.CaptionPairs(data.load(dataset)["train"], 2)
    batch = CaptionCollator(processor, model.config)([pairs[n] for n in range(12)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        log_probs = model.eval()(**batch).logits[:, :-1].log_softmax(dim=-1)[labels >= 0]
    likely = log_probs[torch.arange(len(log_probs)), labels[labels >= 0]]
    expected = -((1 - smoothing) * likely + smoothing * log_probs.mean(dim=-1)).mean()
    assert state["log_history"][0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


CHINESE = {
    "1": ["一只狗在草地上跑", "草地上有一只狗"], "2": ["一个男人骑着红色的自行车", "骑自行车的男人"],
    "3": ["两个孩子在海边玩", "海边的孩子"], "4": ["一只猫坐在窗边", "窗边的猫"],
}  # fmt: skip


@pytest.mark.parametrize("objective", ["scst", "dico"])
def test_a_reward_is_the_score_that_an_evaluation_in_the_captions_language_gives(objective, tmp_path):
    model, processor = tiny.build(tmp_path)
    records = datasets.Dataset.from_dict({"image_id": list(CHINESE), "captions": list(CHINESE.values())})
    args = type("Args", (), {"objective": objective, "label_smoothing_factor": 0.0, "output_dir": None})
    written = {"1": "一只狗在海边", "2": "红色的自行车", "3": "一个男人", "4": "窗边的猫坐"}
    rewards = {}
    for language in ("zh", "en"):
        objective_args = ObjectiveArguments(reward="bleu:1.0")
        metric_args = MetricArguments(caption_language=language)
        built = build_objective(args, objective_args, Captioner(model, processor), records, (), metric_args)
        candidates, ended = [[text] for text in written.values()], [[False]] * len(written)
        rewards[language], _ = built.rewards(list(CHINESE), candidates, ended)
    _, rows = metrics.score(written, CHINESE, meteor=False, spice=False, bootstrap_samples=0, language="zh")
    # Without an end neither counts one, but the references' are a word longer, which only the length's penalty sees.
    exact = [row["Bleu_4"] > 1e-3 for row in rows.values()]
    assert exact == (rewards["zh"][:, 0] > 1e-3).tolist()
    assert rewards["zh"].max() > 0.1
    assert rewards["en"].max() < 1e-3


@pytest.mark.parametrize(("objective", "prefix"), [(SelfCritical, "scst_"), (Dico, "dico_"), (Grpo, "")])
def test_without_settings_an_objective_is_that_of_train_py_without_flags(objective, prefix):
    flags = vars(ObjectiveArguments()) | {"label_smoothing": 0.0}  # the only one that train.py has another default for
    own = {name: value.default for name, value in inspect.signature(objective).parameters.items()}
    own = {name: value for name, value in own.items() if value is not inspect.Parameter.empty}
    assert own == {name: flags.get(prefix + name, flags.get(name)) for name in own}


class Recorded(LogitsProcessor):
    """Of each step of a generate, the log-probabilities."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.log_softmax(dim=-1))
        return scores


@pytest.mark.parametrize("name", ["blip", "git", "blip2-t5", "vit-gpt2"])
def test_a_captions_score_is_the_mean_of_the_log_probabilities_that_generate_saw(name):
    model, processor = families.build(name)
    captioner = Captioner(model.eval(), processor, num_beams=1, max_new_tokens=6)
    images = [Image.effect_noise((40, 32), 100 * (1 + i)).convert("RGB") for i in range(2)]
    batch, recorded = captioner.collator([{"image": image, "image_id": "0"} for image in images]), Recorded()
    with torch.no_grad():
        rows = captioner.rows(captioner.generate_tokens(batch, logits_processor=LogitsProcessorList([recorded])))
        scores = mean_log_probs(model, captioner.training_batch(batch, rows))
    for i, row in enumerate(rows):
        likely = [recorded.steps[step][i, token].item() for step, token in enumerate(row)]
        assert scores[i].item() == pytest.approx(sum(likely) / len(row), abs=1e-4)
