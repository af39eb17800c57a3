"""DiCO: the loss and its gradient by hand, the reference model, and training runs."""

import copy
import json
import math
import re
import shutil

import pytest
import tiny
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny_clip import write_clip

import data
import objectives.dico
from captioner import Captioner
from collator import CaptionCollator
from metrics.clip_scores import ClipScorer
from models.blip_attention import use_fast_attention
from objectives.cross_entropy import target_logits
from objectives.dico import Dico, dico_loss, preferences
from objectives.policy import draw
from objectives.rewards import RecordRows, Rewards


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_and_its_gradient_are_those_computed_by_hand():
    # One image of three candidates; the second wins. Worked with beta 0.5 and tau 2.
    policy = torch.tensor([[-4.0, -3.0, -6.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.5, -3.5, -5.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.3, 0.8, 0.5]], dtype=torch.float64)
    first, third = math.exp(2 * (0.8 - 0.3)), math.exp(2 * (0.8 - 0.5))
    gamma = first / (first + third), third / (first + third)
    margin = (-3.0 - (gamma[0] * -4.0 + gamma[1] * -6.0)) - (-3.5 - (gamma[0] * -4.5 + gamma[1] * -5.0))
    loss = dico_loss(policy, reference, rewards, beta=0.5, tau=2.0)
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.5 * margin)), abs=1e-12)
    loss.backward()
    slope = 0.5 * (1 - sigmoid(0.5 * margin))
    assert policy.grad[0].tolist() == pytest.approx([slope * gamma[0], -slope, slope * gamma[1]], abs=1e-12)


def test_it_is_the_mean_over_images_with_the_published_settings():
    # tau 300 makes the worst loser of an image nearly the only one.
    policy = torch.tensor([[-5.0, -7.0, -6.0], [-2.0, -1.0, -9.0]], dtype=torch.float64)
    reference = torch.tensor([[-5.5, -6.0, -6.5], [-2.0, -1.5, -8.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.4, 0.7]], dtype=torch.float64)
    first = 0.2 * ((-5.0 + 7.0) - (-5.5 + 6.0))
    second = 0.2 * ((-9.0 + 2.0) - (-8.0 + 2.0))
    expected = (-math.log(sigmoid(first)) - math.log(sigmoid(second))) / 2
    assert dico_loss(policy, reference, rewards).item() == pytest.approx(expected, abs=1e-12)


def test_at_the_start_the_loss_is_log_2_and_the_winner_is_pulled_up():
    policy = torch.tensor([[-5.0, -7.0]], dtype=torch.float64, requires_grad=True)
    loss = dico_loss(policy, policy.detach(), torch.tensor([[0.1, 0.2]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert policy.grad[0].tolist() == pytest.approx([0.1, -0.1], abs=1e-12)


def test_a_candidate_that_does_not_count_changes_nothing():
    policy = torch.tensor([[-4.0, -3.0, -6.0, -3.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.5, -3.5, -5.0, -3.5]], dtype=torch.float64)
    rewards = torch.tensor([[0.3, 0.8, 0.5, 0.8]], dtype=torch.float64)
    counted = torch.tensor([[True, True, True, False]])
    loss = dico_loss(policy, reference, rewards, 0.5, 2.0, counted)
    assert loss.item() == dico_loss(policy[:, :3], reference[:, :3], rewards[:, :3], 0.5, 2.0).item()
    loss.backward()
    assert policy.grad[0, 3] == 0


def test_an_image_with_one_candidate_teaches_nothing():
    policy = torch.tensor([[-4.0, -4.0], [-2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.5, -4.5], [-2.5, -2.5]], dtype=torch.float64)
    counted = torch.tensor([[True, False], [True, True]])
    loss = dico_loss(policy, reference, torch.tensor([[0.5, 0.5], [0.5, 0.4]]), counted=counted)
    expected = (math.log(2) - math.log(sigmoid(0.2 * 1.0))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert policy.grad[0].tolist() == [0, 0]


def test_of_equal_rewards_the_first_wins():
    _, chosen, rejected = preferences(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.5, 0.5]]), tau=300.0)
    assert (chosen.item(), rejected.item()) == (1.0, 3.0)


# The objective


class FixedRewards:
    """Rewards that depend on the caption's text alone."""

    def __call__(self, image_ids, candidates, ended):
        values = torch.tensor([[(sum(map(ord, text)) % 97) / 300 for text in group] for group in candidates])
        return values, {"fixed": values}


@pytest.fixture
def captioner(tmp_path):
    model, processor = tiny.build(tmp_path)
    model.train()
    return Captioner(model, processor, num_beams=3, max_new_tokens=5)


def batch_of(captioner, images, seed=1):
    collator = CaptionCollator(captioner.processor, captioner.model.config, prompts_only=Dico.prompts_only)
    return {
        "pixel_values": torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),
        "image_ids": [str(i) for i in range(images)],
        **collator.token_tensors([["a dog", "a red dog"]] * images),
    }


def disturb(model, size=0.02):
    """What training does: the weights are other ones than at the start."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)


def plain_log_probs(model, pixel_values, candidates, k, start):
    """Summed log-probabilities by the library's own forward pass, one caption at a time: (images, k)."""
    values = []
    for row, tokens in enumerate(candidates.tokens):
        image = pixel_values[row // k][None]
        logits = model(pixel_values=image, input_ids=torch.tensor([[start, *tokens]])).logits
        log_probs = logits[0].log_softmax(dim=-1)
        values.append(sum(log_probs[place, token] for place, token in enumerate(tokens)))
    return torch.stack(values).view(-1, k)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "vision frozen"])
def test_loss_and_gradients_are_those_of_two_plain_models(captioner, frozen, monkeypatch):
    model, batch = captioner.model, batch_of(captioner, 3)
    model.vision_model.requires_grad_(not frozen)
    start = copy.deepcopy(model).eval()
    objective = Dico(captioner, FixedRewards(), candidates=3, beta=0.7, tau=20.0)
    disturb(model)
    drawn = []
    monkeypatch.setattr(objectives.dico, "draw", lambda *a, **kw: drawn.append(draw(*a, **kw)) or drawn[-1])
    encoded = []
    model.vision_model.post_layernorm.register_forward_hook(lambda *_: encoded.append(1))
    result = objective(model, batch)
    passes = len(encoded)
    ours = gradients(model, result["loss"])

    (candidates,) = drawn
    first = model.config.text_config.bos_token_id
    use_fast_attention(model, False)
    use_fast_attention(start, False)
    policy = plain_log_probs(model, batch["pixel_values"], candidates, 3, first)
    reference = plain_log_probs(start, batch["pixel_values"], candidates, 3, first).detach()
    rewards, _ = FixedRewards()(None, candidates.texts, None)
    counted = torch.tensor([[text not in group[:i] for i, text in enumerate(group)] for group in candidates.texts])
    loss = dico_loss(policy, reference, rewards, 0.7, 20.0, counted)
    assert result["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert abs(result["margin"].item()) > 0.01
    theirs = gradients(model, loss)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-3)
    # Each call of the encoder normalises twice: all tokens, then the first. Frozen, images are encoded once in all.
    assert passes == (2 if frozen else 4)


def test_the_weights_are_the_models_own_again_after_a_step(captioner):
    objective = Dico(captioner, FixedRewards(), candidates=3)
    disturb(captioner.model)
    before = copy.deepcopy(captioner.model.state_dict())
    start = [value.clone() for value in objective.start.weights]
    logged = objective(captioner.model, batch_of(captioner, 2))
    assert all(value.equal(before[name]) for name, value in captioner.model.state_dict().items())
    assert all(one.equal(other) for one, other in zip(start, objective.start.weights, strict=True))
    assert logged["kl"] > 0.01
    # At the start there is no divergence, and nothing to prefer.
    fresh = Dico(captioner, FixedRewards(), candidates=3)(captioner.model, batch_of(captioner, 2))
    assert fresh["kl"].item() == pytest.approx(0, abs=1e-5)
    assert fresh["loss"].item() == pytest.approx(math.log(2), abs=1e-5)


def test_with_an_adapter_the_reference_is_the_network_without_it(captioner):
    plain = copy.deepcopy(captioner.model)
    captioner.model = get_peft_model(captioner.model, LoraConfig(r=2, target_modules=["query", "value"]))
    objective = Dico(captioner, FixedRewards(), candidates=3)
    assert sum(value.numel() for value in objective.start.weights) < 0.1 * sum(p.numel() for p in plain.parameters())
    disturb(captioner.model, size=0.5)
    batch = batch_of(captioner, 2)
    encoded = captioner.encode(batch)
    passed = captioner.training_batch(encoded, [[5, 6, 3]] * 4)
    reference = objective.start.logits(batch, encoded, [[5, 6, 3]] * 4).log_softmax(dim=-1)
    expected, _ = target_logits(plain, captioner.training_batch(batch, [[5, 6, 3]] * 4))
    torch.testing.assert_close(reference, expected.log_softmax(dim=-1), atol=1e-5, rtol=0)
    own, _ = target_logits(captioner.model, passed)
    assert not torch.allclose(own.log_softmax(dim=-1), reference, atol=1e-3)


def test_the_loss_is_a_mean_over_the_images_of_the_whole_effective_batch(captioner):
    objective = Dico(captioner, FixedRewards(), candidates=3)
    disturb(captioner.model)
    whole = batch_of(captioner, 4)
    expected = objective(captioner.model, whole)["loss"].item()
    parts = []
    for images in (slice(0, 3), slice(3, 4)):
        part = {name: value[images] for name, value in whole.items()}
        part |= {name: whole[name][2 * images.start : 2 * images.stop] for name in ("labels",)}
        parts.append(objective(captioner.model, part, objective.items(whole))["loss"].item())
    assert sum(parts) == pytest.approx(expected, rel=1e-5)


# The run around it

CAPTIONS = {
    f"photo{i}": [f"a {colour} {shape} on the grass.", f"the {colour} {shape} near water."]
    for i, (colour, shape) in enumerate((c, s) for c in ("red", "green", "blue") for s in ("circle", "square", "star"))
}
SPLITS = dict.fromkeys(CAPTIONS, "train") | dict.fromkeys(("photo3", "photo6"), "validation") | {"photo8": "test"}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Flags of a run that goes on from an untrained captioner, its CLIP, and its dataset."""
    folder = tmp_path_factory.mktemp("dico")
    values = {
        "model_name_or_path": tiny.build_folder(folder), "objective": "dico", "clip_model": write_clip(folder / "clip"),
        "dataset_name": tiny.write_photos(folder / "photos", CAPTIONS, SPLITS), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": "false", "num_beams": 2, "max_new_tokens": 8,
        "meteor": "false", "spice": "false", "bootstrap_samples": 0, "dico_candidates": 3, "num_train_epochs": 2,
        "logging_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    return values


def flags(started, output, **changed):
    return [w for k, v in (started | {"output_dir": output} | changed).items() for w in (f"--{k}", v)]


def test_a_run_logs_each_part_and_keeps_the_best_by_the_rewards_own_clip(started, tmp_path):
    output = tmp_path / "out"
    result = tiny.run("train.py", *flags(started, output, reward="clip-s:1.0 cider:0.1", gradient_accumulation_steps=2))
    assert "without PAC-S the best checkpoint is chosen by RefCLIP-S" in result.stderr
    state = json.loads((output / "trainer_state.json").read_text())
    training = [row for row in state["log_history"] if "loss" in row]
    for row in training:
        assert row["reward"] == pytest.approx(row["reward_clip-s"] + 0.1 * row["reward_cider"], abs=1e-4)
        assert row["reward_best"] >= row["reward"] - 1e-6
        assert row["margin"] == pytest.approx(row["chosen"] - row["rejected"], abs=1e-5)
        assert row.keys() >= {"kl", "distinct", "sample_length", "bad_endings", "repeated_bigrams", "unended"}
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert training[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert training[-1]["kl"] > 1e-4
    evaluations = [row["eval_RefCLIP-S"] for row in state["log_history"] if "eval_RefCLIP-S" in row]
    assert state["best_metric"] == max(evaluations)
    scores = json.loads((output / "coco_metrics.json").read_text())
    assert {"CLIP-S", "RefCLIP-S", "clip_weights"} <= set(scores)


def test_a_run_that_goes_on_has_the_reference_it_began_with(started, tmp_path):
    steps = {"reward": "clip-s", "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    steps |= {"max_steps": 4, "num_train_epochs": 1, "save_total_limit": 5}
    tiny.run("train.py", *flags(started, tmp_path / "whole", **steps))
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "broken/checkpoint-2")
    shutil.copy(tmp_path / "whole/run.json", tmp_path / "broken/run.json")
    tiny.run("train.py", *flags(started, tmp_path / "broken", **steps))
    whole, broken = (
        [
            row["kl"]
            for row in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "kl" in row
        ]
        for name in ("whole", "broken")
    )
    assert len(whole) == 4
    assert whole == pytest.approx(broken, abs=1e-6)
    assert whole[3] > 1e-4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": "pac-s"}, "pass --pac_checkpoint"),
        ({"reward": "clip-s", "clip_model": "nowhere/nothing"}, "cannot be loaded"),
        ({"reward": "clips"}, "'clips' is not a reward. Known: cider, bleu, rouge-l, meteor, spice, clip-s, pac-s"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_clear_message(started, tmp_path, changed, said):
    result = tiny.run("train.py", *flags(started, tmp_path / "out", **changed), fails=True)
    assert said in result.stderr


def test_clip_rewards_are_of_bare_captions_and_not_clipped(tmp_path):
    scorer = ClipScorer.load("clip-s", str(write_clip(tmp_path / "clip")))
    records = data.load(str(tiny.write_photos(tmp_path / "photos", CAPTIONS, SPLITS)))["train"]
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    rewards = Rewards({"clip-s": 1.0, "ref-clip-s": 2.0}, references, RecordRows(records), [scorer])
    ids, candidates = records["image_id"][1:3], [["a dog", "two cats"], ["a red ball", "a man"]]
    total, parts = rewards(ids, candidates, None)
    flat = [text for group in candidates for text in group]
    plain, with_references = ClipScorer.load("clip-s", str(tmp_path / "clip")).score(
        ids, [records[1]["image"], records[2]["image"]], flat, [references[i] for i in ids], prefix="", clip=False
    )
    assert parts["clip-s"].flatten().tolist() == pytest.approx(plain.tolist(), abs=1e-6)
    assert total.flatten().tolist() == pytest.approx((plain + 2 * with_references).tolist(), abs=1e-5)


# The columns of the table in docs/dico.md.
TABLE = (
    "CIDEr", "CLIP-S reward", "CLIP-S judge", "scene_facts", "kl", "distinct", "repeated_bigrams", "bad_endings",
    "mean_length",
)  # fmt: skip


def test_the_table_in_docs_is_what_the_results_say():
    results = json.loads((ROOT / "benchmarks/results/dico_scenes.json").read_text())["test"]
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/dico.md").read_text().splitlines() if line.startswith("| ")]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row[0].strip() in results}
    assert rows.keys() == results.keys()
    for method, cells in rows.items():
        for name, cell in zip(TABLE, cells, strict=True):
            mean, low, high = re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cell).groups()
            found = results[method][name]
            for text, value in ((mean, found["mean"]), (low, found["min"]), (high, found["max"])):
                assert text == f"{value:.{len(text.split('.')[1])}f}", (method, name)


def test_the_differences_in_docs_are_what_the_results_say():
    results = json.loads((ROOT / "benchmarks/results/dico_scenes_converged.json").read_text())["test"]
    table = (ROOT / "docs/dico.md").read_text().split("| from converged models |")[1]
    columns = ("CIDEr", "CLIP-S reward", "CLIP-S judge", "scene_facts", "repeated_bigrams", "bad_endings", "kl")
    rows = dict(re.findall(r"^\| ([\w -]+), less cross-entropy \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == {"SCST on CLIP-S", "DiCO on CLIP-S"}
    for method, cells in rows.items():
        found = [results[method][name] for name in columns]
        assert cells.split(" | ") == [f"{cell['change']:+.3f} ± {cell['change_sd']:.3f}" for cell in found]
