"""GRPO: loss and gradient are TRL's, SCST's and those of all captions; and the run around it."""

import collections
import importlib.util
import json
import math
import tempfile
import types
from pathlib import Path

import datasets
import enumerated
import families
import pytest
import tiny
import torch
from conftest import ROOT
from enumerated import LENGTH, REFERENCES, batch_of, flat_gradient
from PIL import Image
from small_run import CAPTIONS, SPLITS

from captioner import Captioner
from collator import CaptionCollator
from models.blip_attention import use_fast_attention
from objectives.grpo import Group, Grpo, clipped_loss, divergence, moments
from objectives.rewards import Rewards
from objectives.scst import SelfCritical

TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def captioner(tmp_path):
    return enumerated.build(tmp_path)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """For tests that do not train it."""
    return enumerated.build(tmp_path_factory.mktemp("unchanged"))


def rewards():
    return Rewards({"cider": 1.0, "bleu": 0.5}, REFERENCES)


def step(objective, batch, again=False):
    objective.begin_step([batch], again)
    return objective(objective.captioner.model, batch)


# By hand


def test_a_ratio_is_clipped_only_on_the_side_that_its_advantage_leads_to():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    losses, ratio = clipped_loss(log_probs, torch.zeros(5), advantages, epsilon=0.2, epsilon_high=0.28)
    assert losses.tolist() == pytest.approx([-1.28 * 2, 1.5 * 2, -0.5 * 2, 0.8 * 2, -1.1])
    losses.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0, 1.5 * 2, -0.5 * 2, 0, -1.1])
    assert ratio.tolist() == pytest.approx(ratios.tolist())


def test_the_divergence_at_a_token_is_that_of_the_whole_vocabulary_on_average():
    own, reference = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    expected = (own * (own / reference).log()).sum()
    each = divergence(own.log(), reference.log())
    assert (own * each).sum().item() == pytest.approx(expected.item())
    assert each.min() >= 0


def test_moments_leave_out_what_is_not_known():
    values = torch.tensor([[1.0, 2.0, torch.nan, 4.0], [3.0, 3.0, 3.0, torch.nan]])
    mean, deviation = moments(values, dim=1)
    assert mean[:, 0].tolist() == pytest.approx([7 / 3, 3])
    assert deviation[:, 0].tolist() == pytest.approx([torch.tensor([1.0, 2.0, 4.0]).std().item(), 0])
    known = values[~values.isnan()]
    assert [m.item() for m in moments(values)] == pytest.approx([known.mean().item(), known.std().item()])


REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5], [3.0, 0.0, torch.nan]])
PARTS = {"a": REWARDS - 1, "b": torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 50.0], [0.0, 10.0, torch.nan]])}


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_computed_by_hand(unchanged, scale, aggregation):
    weighted = Rewards({"length": 1.0, "repetition": 0.5}, {})
    options = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    objective = Grpo(unchanged, weighted, num_generations=3, **options)
    objective.begin_step([])
    found = objective.advantages(REWARDS, PARTS)
    sums, expected = REWARDS.tolist(), []
    if aggregation == "normalize_then_sum":
        parts = []
        for part in PARTS.values():
            known = [[v for v in row if not math.isnan(v)] for row in part.tolist()]
            parts.append(
                [
                    [(v - sum(k) / len(k)) / (torch.tensor(k).std().item() + 1e-4) for v in row]
                    for row, k in zip(part.tolist(), known, strict=True)
                ]
            )
        sums = [[a + 0.5 * b for a, b in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
    known = [v for row in sums for v in row if not math.isnan(v)]
    whole = torch.tensor(known)
    for row in sums:
        of_row = torch.tensor([v for v in row if not math.isnan(v)])
        mean = whole.mean() if aggregation == "normalize_then_sum" else of_row.mean()
        divided = {"group": of_row.std() + 1e-4, "batch": whole.std() + 1e-4, "none": 1.0}[scale]
        divided = whole.std() + 1e-4 if aggregation == "normalize_then_sum" else divided
        expected.append([0.0 if math.isnan(v) else ((v - mean) / divided).item() for v in row])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


# Made-up log-probabilities of 3 images of 4 captions each, and what TRL makes of them with each of OPTIONS. Written by
# PYTHONPATH=.:tests:tests/helpers python tests/objectives/test_grpo.py
RECORDED = ROOT / "tests/fixtures/grpo_trl.json"


def groups_of(objective, recorded):
    """(groups, log-probabilities with a gradient, entropies, tokens of each image)."""
    groups = []
    for row in recorded["groups"]:
        old, reference = (torch.tensor(row[name], dtype=torch.float64) for name in ("old", "reference"))
        advantages, tokens = torch.tensor(row["advantages"]), [[5] * length for length in row["lengths"]]
        groups.append(Group(tokens, ["a"] * 4, row["ended"], advantages, {}, advantages, old, reference))
    ends = [end or not objective.mask_truncated for group in groups for end in group.ended]
    rows = [row for group in groups for row in group.tokens]
    objective.captions, objective.tokens = len(rows), sum(len(row) for row, end in zip(rows, ends, strict=True) if end)
    log_probs = torch.tensor(recorded["log_probs"], dtype=torch.float64, requires_grad=True)
    return groups, log_probs, torch.ones(len(log_probs)), [sum(row["lengths"]) for row in recorded["groups"]]


@pytest.fixture
def recorded():
    return json.loads(RECORDED.read_text(encoding="utf-8"))


OPTIONS = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo", "epsilon_high": 0.28},
    {"loss_type": "dr_grpo", "epsilon": 0.1},
    {"loss_type": "dapo", "beta": 0.04, "mask_truncated_completions": True},
    {"loss_type": "grpo", "beta": 0.3, "mask_truncated_completions": True},
    {"loss_type": "dr_grpo", "beta": 0.1, "mask_truncated_completions": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_of_a_step_is_the_sum_of_its_batches_losses(unchanged, options, recorded):
    objective = Grpo(unchanged, rewards(), num_generations=4, **options)
    groups, log_probs, entropy, sizes = groups_of(objective, recorded)
    whole = objective.loss(groups, log_probs, entropy)["loss"]
    parts, cut = log_probs.split([sizes[0] + sizes[1], sizes[2]]), entropy.split([sizes[0] + sizes[1], sizes[2]])
    losses = [objective.loss(g, p, e)["loss"] for g, p, e in zip((groups[:2], groups[2:]), parts, cut, strict=True)]
    assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-12)
    assert whole.item() != 0


# TRL's own function, where it is installed: python -m pytest tests/objectives/test_grpo.py -k trl


def trl_loss(objective, groups, log_probs):
    """(loss, what it logs) by TRL of (rows, longest) log-probabilities that are made of ours."""
    from trl import GRPOTrainer

    lengths = [len(tokens) for group in groups for tokens in group.tokens]
    pad = lambda flat: torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)  # noqa: E731
    mask = pad(torch.ones(sum(lengths), dtype=torch.long))
    ended = torch.tensor([end for group in groups for end in group.ended])
    if objective.mask_truncated:
        mask = mask * ended[:, None]
    own = pad(log_probs)
    one = types.SimpleNamespace(
        gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1, gather_for_metrics=lambda t: t
    )
    args = types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    metrics = {"train": collections.defaultdict(list)}
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (own, torch.zeros_like(own), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=objective.beta,
        loss_type=objective.loss_type, epsilon_low=objective.epsilon, epsilon_high=high, args=args, use_vllm=False,
        vllm_importance_sampling_correction=False, model=types.SimpleNamespace(training=True), accelerator=one,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, _metrics=metrics,
        max_completion_length=objective.captioner.settings["max_new_tokens"],
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask,
        "advantages": torch.cat([group.advantages for group in groups]), "num_items_in_batch": mask.sum(),
        "old_per_token_logps": pad(torch.cat([group.old for group in groups])),
    }  # fmt: skip
    if objective.beta:
        inputs["ref_per_token_logps"] = pad(torch.cat([group.reference for group in groups]))
    return GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


def by_trl(objective, recorded) -> dict:
    groups, log_probs, _, _ = groups_of(objective, recorded)
    loss, logged = trl_loss(objective, groups, log_probs)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return {
        "loss": loss.item(),
        "gradient": gradient.tolist(),
        **{name: logged[name][0] for name in KEYS if name in logged},
    }


KEYS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl")


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_loss_gradient_and_log_are_trls(unchanged, number, recorded):
    objective = Grpo(unchanged, rewards(), num_generations=4, **OPTIONS[number])
    groups, log_probs, entropy, _ = groups_of(objective, recorded)
    result = objective.loss(groups, log_probs, entropy)
    (gradient,) = torch.autograd.grad(result["loss"], log_probs)
    theirs = [recorded["by_trl"][number], *([by_trl(objective, recorded)] if importlib.util.find_spec("trl") else [])]
    for expected in theirs:
        assert gradient.tolist() == pytest.approx(expected["gradient"], abs=1e-6)
        for name in ("loss", *KEYS):
            assert result.get(name, torch.tensor(0.0)).item() == pytest.approx(expected.get(name, 0.0), abs=1e-6), name
        assert min(expected["clip_ratio/low_mean"], expected["clip_ratio/high_mean"]) > 0


def family_step(name, **options):
    """(objective, batch) of a tiny model of a family, after a step that moved its weights."""
    model, processor = families.build(name)
    captioner = Captioner(model.train(), processor, num_beams=2, max_new_tokens=6)
    references = {"0": ["a dog runs on the grass", "a dog"], "1": ["two men in the water"]}
    collator = CaptionCollator(processor, model.config, prompt=captioner.prompt, prompts_only=Grpo.prompts_only)
    batch = collator([
        {"image": Image.effect_noise((40, 32), 100 * (1 + int(i))).convert("RGB"), "image_id": i, "captions": captions, "epoch": 0}
        for i, captions in references.items()
    ])  # fmt: skip
    objective = Grpo(captioner, Rewards({"cider": 1.0, "bleu": 1.0, "length": 0.1}, references), **options)
    torch.manual_seed(0)
    step(objective, batch)["loss"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad.sign() * parameter.abs().mean()
    return objective, batch


@TRL
@pytest.mark.parametrize("name", ["blip", "git", "qwen2_vl"])
@pytest.mark.parametrize("options", [OPTIONS[0], {"loss_type": "grpo", "beta": 0.3}])
def test_on_a_model_loss_and_gradient_are_trls(name, options, monkeypatch):
    if name == "qwen2_vl":
        pytest.importorskip("torchvision")
    objective, batch = family_step(name, num_generations=4, num_iterations=2, **options)
    model, seen, log_probs_of = objective.captioner.model, [], objective.distribution.log_probs
    monkeypatch.setattr(objective.distribution, "log_probs", lambda *a: seen.append(log_probs_of(*a)) or seen[-1])
    result = step(objective, batch, again=True)
    ((log_probs, _),) = seen
    groups = [objective.groups[image_id] for image_id in batch["image_ids"]]
    theirs, logged = trl_loss(objective, groups, log_probs)
    assert result["loss"].item() == pytest.approx(theirs.item(), abs=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (result["loss"], theirs)
    ]
    moved = 0
    for ours, expected in zip(*gradients, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
            moved += int(ours.abs().max() > 1e-4)
    assert moved > 5
    assert logged["clip_ratio/region_mean"][0] > 0


# On a model


def test_without_scale_divergence_and_second_updates_it_is_scst(captioner):
    """The mean of a group holds a sample's own reward, leave_one_out does not: a factor of (K - 1) / K. The constants that the
    two are divided by are the references' tokens in SCST, and here K captions of LENGTH tokens for each image."""
    k, batch = 5, batch_of(captioner, ["0", "1", "2"])
    scst = SelfCritical(captioner, rewards(), samples=k)
    grpo = Grpo(captioner, rewards(), num_generations=k, scale_rewards="none", loss_type="dr_grpo")
    found = {}
    for name, objective in (("scst", scst), ("grpo", grpo)):
        torch.manual_seed(5)
        if name == "grpo":
            grpo.begin_step([batch])
        found[name] = objective(captioner.model, batch)
    assert found["grpo"]["reward"].item() == pytest.approx(found["scst"]["reward"].item(), rel=1e-6)
    items, references, images = batch["labels"][:, 1:].ne(-100).sum(), 2, 3
    factor = references * images * LENGTH * k / (items * (k - 1))
    theirs = flat_gradient(captioner.model, found["scst"]["loss"])
    ours = factor * flat_gradient(captioner.model, found["grpo"]["loss"])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert theirs.abs().max() > 1e-3
    # The losses: SCST's is advantage x log-probability of a caption, here it is advantage x ratio of each token, which is 1.
    groups = grpo.groups.values()
    lengths = [len(tokens) for group in groups for tokens in group.tokens]
    advantages = torch.cat([group.advantages for group in groups])
    expected = -(advantages * torch.tensor(lengths)).sum().item() / (images * k * LENGTH)
    assert found["grpo"]["loss"].item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_that_of_all_captions(captioner):
    batch, k = batch_of(captioner, ["0"]), 250
    objective = Grpo(captioner, rewards(), num_generations=k, scale_rewards="none", loss_type="dr_grpo")
    truth = enumerated.true_gradient(captioner, rewards(), batch)

    def as_scst(model, batch):
        """`compare` divides the loss by SCST's constants."""
        items, captions = batch["labels"][:, 1:].ne(-100).sum(), len(batch["labels"])
        return {"loss": step(objective, batch)["loss"] * captions / items * LENGTH * k / (k - 1)}

    cosine, distance = enumerated.compare(as_scst, captioner, batch, truth)
    assert cosine > 0.98
    assert distance < 2


def token_log_probs(model, batch, groups, start):
    """[image][caption] list of tensors, by the library's own forward pass, one caption at a time."""
    found = []
    for number, group in enumerate(groups):
        found.append([])
        for tokens in group.tokens:
            logits = (
                model(pixel_values=batch["pixel_values"][number][None], input_ids=torch.tensor([[start, *tokens]]))
                .logits[0]
                .log_softmax(dim=-1)
            )
            found[-1].append([logits[place, token] for place, token in enumerate(tokens)])
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "vision frozen"])
def test_a_second_update_learns_from_the_same_captions_and_is_clipped(captioner, frozen):
    model, batch = captioner.model, batch_of(captioner, ["0", "1"])
    model.vision_model.requires_grad_(not frozen)
    start_token = model.config.text_config.bos_token_id
    objective = Grpo(
        captioner, rewards(), num_generations=6, num_iterations=2, beta=0.1, epsilon=0.05, epsilon_high=0.1
    )
    torch.manual_seed(1)
    first = step(objective, batch)
    assert first["kl"].item() == pytest.approx(0, abs=1e-6)
    assert first["clip_ratio/region_mean"] == 0
    groups = [objective.groups[i] for i in "01"]
    use_fast_attention(model, False)
    with torch.no_grad():
        before = token_log_probs(model, batch, groups, start_token)
    use_fast_attention(model, True)
    direction = flat_gradient(model, first["loss"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / direction.norm()
    state = torch.get_rng_state()
    second = step(objective, batch, again=True)
    assert state.equal(torch.get_rng_state())
    assert all(objective.groups[i] is group for i, group in zip("01", groups, strict=True))
    ours = flat_gradient(model, second["loss"])

    use_fast_attention(model, False)
    now, total, tokens, low, high = token_log_probs(model, batch, groups, start_token), 0.0, 0, 0, 0
    for group, old_rows, rows in zip(groups, before, now, strict=True):
        reward = group.rewards
        for j, (old_row, row) in enumerate(zip(old_rows, rows, strict=True)):
            advantage = ((reward[j] - reward.mean()) / (reward.std() + 1e-4)).item()
            for old, log_prob in zip(old_row, row, strict=True):
                ratio = (log_prob - old).exp()
                bounded = min(max(ratio.item(), 0.95), 1.1)
                if ratio.item() * advantage <= bounded * advantage:
                    total = total - ratio * advantage
                else:  # a constant
                    total = total - bounded * advantage
                    low, high = low + (advantage < 0), high + (advantage > 0)
                total = total + 0.1 * ((old - log_prob).exp() - (old - log_prob) - 1)  # it started from there
                tokens += 1
    assert second["loss"].item() == pytest.approx((total / tokens).item(), abs=1e-6)
    torch.testing.assert_close(ours, flat_gradient(model, total / tokens), atol=1e-5, rtol=1e-3)
    assert min(low, high) > 0
    assert second["clip_ratio/low_mean"].item() == pytest.approx(low / tokens, abs=1e-6)
    assert second["clip_ratio/high_mean"].item() == pytest.approx(high / tokens, abs=1e-6)
    assert second["kl"] > 1e-4


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_learns_from_two_updates(name):
    objective, batch = family_step(name, num_generations=3, num_iterations=2, beta=0.1)
    result = step(objective, batch, again=True)
    assert result["kl"] > 0
    assert math.isfinite(result["loss"].item())
    objective.captioner.model.zero_grad()
    result["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in objective.captioner.model.parameters())


# The run around it

LOGGED = {
    "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "entropy",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl", "bad_endings", "repeated_bigrams",
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return tiny.write_photos(folder / "photos", CAPTIONS, SPLITS), tiny.build_folder(folder)


def run(started, output, fails=False, processes=1, **changed):
    values = {
        "dataset_name": started[0], "output_dir": output, "model_name_or_path": started[1], "objective": "grpo",
        "reward": "cider:1.0 length:-0.1", "num_generations": 3, "num_iterations": 2, "beta": 0.1, "num_train_epochs": 2,
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "gradient_checkpointing": "false", "num_beams": 1, "max_new_tokens": 6, "meteor": "false", "spice": "false",
        "bootstrap_samples": 0, "report": "false", "report_to": "none",
    }  # fmt: skip
    words = [word for name, value in (values | changed).items() for word in (f"--{name}", value)]
    return tiny.run("train.py", *words, fails=fails, processes=processes)


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def test_a_run_logs_trls_keys_and_repeats_whole_steps(started, tmp_path):
    run(started, tmp_path / "out")
    log = log_of(tmp_path / "out")
    # 12 images of an epoch are 3 steps of 4 images, each taken twice.
    assert len(log) == 12
    for first, second in zip(log[::2], log[1::2], strict=True):
        assert first.keys() >= LOGGED | {"rewards/cider/mean", "rewards/cider/std", "rewards/length/mean"}
        assert first["reward"] == pytest.approx(
            first["rewards/cider/mean"] - 0.1 * first["rewards/length/mean"], abs=1e-5
        )
        for name in ("reward", "completions/mean_length"):
            assert first[name] == second[name]
        assert first["clip_ratio/region_mean"] == 0
    assert max(row["clip_ratio/region_mean"] for row in log) > 0
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["kl"] > 1e-4
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["best_metric"] == max(row["eval_CIDEr"] for row in state["log_history"] if "eval_CIDEr" in row)


def test_an_adapter_learns_with_every_option(started, tmp_path):
    options = {
        "scale_rewards": "batch",
        "loss_type": "dr_grpo",
        "epsilon_high": 0.28,
        "mask_truncated_completions": "true",
    }
    options |= {"multi_objective_aggregation": "normalize_then_sum", "use_peft": "true", "num_train_epochs": 1}
    run(started, tmp_path / "out", **options)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path / "out"))
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, not 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, not 0"),
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"loss_type": "bnpo"}, "loss_type"),
        ({"scale_rewards": "true"}, "scale_rewards"),
    ],
)
def test_a_wrong_flag_is_one_line(started, tmp_path, changed, said):
    result = run(started, tmp_path / "out", fails=True, **changed)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def record() -> None:
    import trl

    generator, groups = torch.Generator().manual_seed(0), []
    for _ in range(3):
        lengths = torch.randint(1, LENGTH + 1, (4,), generator=generator).tolist()
        numbers = -3 * torch.rand(2, sum(lengths), generator=generator, dtype=torch.float64)
        ended = (torch.rand(4, generator=generator) < 0.6).tolist()
        advantages = torch.randn(4, generator=generator).tolist()
        groups.append({"lengths": lengths, "ended": ended, "advantages": advantages})
        groups[-1] |= dict(zip(("old", "reference"), numbers.tolist(), strict=True))
    old = torch.tensor([value for group in groups for value in group["old"]], dtype=torch.float64)
    moved = old + torch.randn(len(old), generator=generator, dtype=torch.float64) / 3
    recorded = {"trl": trl.__version__, "groups": groups, "log_probs": moved.tolist()}
    with tempfile.TemporaryDirectory() as folder:
        small = enumerated.build(Path(folder))
        options = [Grpo(small, rewards(), num_generations=4, **option) for option in OPTIONS]
        recorded["by_trl"] = [by_trl(objective, recorded) for objective in options]
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
