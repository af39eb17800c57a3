"""What a run learns from is the same in every way of running it: the samples of each step, how they are augmented, the
learning rate, and the loss. benchmarks/quality/laws.py makes the whole table of ways and options."""

import json

import laws
import pytest
from ranks import ROOT
from small_run import equal_weights

from benchmarks.quality.laws import OPTIONS, table

pytestmark = laws.NEEDS_FORKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with laws.Runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


@pytest.fixture(scope="module")
def unbroken(runs):
    return runs.run("unbroken", **laws.AUGMENTED)[0]


def test_every_epoch_has_each_pair_once_and_is_augmented_anew(unbroken):
    pixels = []
    for epoch in range(3):
        assert unbroken.images(epoch) == sorted(laws.training_pairs())
        pixels += [sample["pixels"] for sample in unbroken.samples(epoch)]
    assert len(set(pixels)) > 0.95 * len(pixels)


WAYS = {
    "two workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": "true"},
    "more accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "two processes": {"processes": 2},
    "FSDP2": {"processes": 2, "config": ROOT / "recipes/accelerate/fsdp2.yaml"},
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_see_the_same(way, runs, unbroken):
    other, _ = runs.run(way, **laws.AUGMENTED, **WAYS[way])
    assert other.steps() == unbroken.steps()
    for name in ("loss", "eval_loss"):
        assert other.logged(name) == pytest.approx(unbroken.logged(name), abs=1e-5)


def test_similar_lengths_come_together_and_in_the_same_order_everywhere(runs):
    flags = {
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    one, _ = runs.run("lengths", **flags)
    assert one.images(0) == one.images(1) == sorted(laws.training_pairs())
    assert [step["samples"] for step in one.steps().values()][:4] != [s["samples"] for s in one.steps().values()][4:8]
    two, _ = runs.run("lengths in two processes", processes=2, **flags)
    runs.run("lengths after a kill", **flags, moment="step 6", code=-9)
    resumed, _ = runs.run("lengths after a kill", **flags)
    assert two.steps() == resumed.steps() == one.steps()


@pytest.mark.parametrize(("processes", "moment"), [(1, "step 6"), (2, "step 7"), (1, "save 2")])
def test_a_killed_run_goes_on_as_if_it_had_not_been(processes, moment, runs, unbroken):
    flags = laws.AUGMENTED | {"processes": processes, "eval_strategy": "steps", "save_strategy": "steps"}
    flags |= {"eval_steps": 2, "save_steps": 2}
    whole, _ = runs.run(f"{processes} whole", **flags)
    name = f"{processes} killed at {moment}"
    runs.run(name, **flags, moment=moment, code=-9)
    other, logs = runs.run(name, **flags)
    assert "resuming from" in logs[0]
    assert other.steps() == whole.steps() == unbroken.steps()
    assert other.logged("loss") == whole.logged("loss")
    assert equal_weights(other.output, whole.output)


def test_noise_does_not_depend_on_workers(runs):
    flags = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no"}
    none, _ = runs.run("noise", **flags)
    two, _ = runs.run("noise of workers", **flags, **WAYS["two workers"])
    assert two.noise() == none.noise()


def test_losses_and_noise_do_not_depend_on_how_often_one_evaluates(runs):
    flags = {"num_train_epochs": 2, "save_strategy": "no", "load_best_model_at_end": "false", "num_beams": 1}
    never, _ = runs.run("never evaluated", **flags, eval_strategy="no")
    often, _ = runs.run("evaluated at each step", **flags, eval_strategy="steps", eval_steps=1)
    assert len(often.logged("eval_loss")) > 4
    assert often.noise() == never.noise()
    assert often.logged("loss") == never.logged("loss")
    assert equal_weights(often.output, never.output)


def test_processes_draw_their_own_noise(runs):
    flags = {"num_train_epochs": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    run, _ = runs.run("noise of two", processes=2, **flags)
    assert all(one != other for one, other in run.noise().values())


@pytest.mark.parametrize("objective", ["dico", "scst"])
def test_rewards_are_of_each_image_once_in_any_number_of_processes(objective, runs, unbroken):
    """DiCO's candidates are of a beam search. SCST's samples are drawn, by each process for itself."""
    flags = laws.FROM_A_MODEL | {"model_name_or_path": unbroken.output, "objective": objective, "reward": "cider:1.0"}
    flags |= {"num_train_epochs": 2, "logging_steps": 100, "ce_weight": 0.2, "dico_candidates": 2, "num_beams": 2}
    one, _ = runs.run(f"{objective} one", **flags)
    two, _ = runs.run(f"{objective} two", processes=2, **flags)
    assert two.steps() == one.steps()
    assert len(one.images(0)) == len(set(one.images(0))) == 13
    for run in (one, two):  # samples are drawn of it: no two batches of any process have the same
        noise = [state for of_step in run.noise().values() for state in of_step]
        assert len(set(noise)) == len(noise) >= 8
    if objective == "dico":
        for name in ("loss", "reward", "eval_loss"):
            assert two.logged(name) == pytest.approx(one.logged(name), abs=1e-5), name


GRPO = {"objective": "grpo", "reward": "cider:1.0", "num_generations": 2, "num_iterations": 3, "beta": 0.1}
GRPO |= laws.FROM_A_MODEL | {"num_train_epochs": 3, "num_beams": 1, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def twice(runs, unbroken):
    """A run of GRPO whose steps come three times: of 13 images, 8 of them do, then 5 once."""
    return runs.run("grpo", model_name_or_path=unbroken.output, **GRPO, save_strategy="no")[0]


def test_a_step_that_is_repeated_has_the_same_images_and_the_next_has_others(twice):
    images = [sorted(sample["image"] for sample in step["samples"]) for step in twice.steps().values()]
    assert [len(step) for step in images] == [8, 8, 8, 5] * 3
    for epoch in (images[:4], images[4:8], images[8:]):
        assert epoch[0] == epoch[1] == epoch[2]
        assert len({*epoch[2], *epoch[3]}) == 13
    rewards = [*twice.logged("reward").values()]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[4]
    noise = list(twice.noise().values())
    assert noise[1] == noise[2]  # nothing is drawn


@pytest.mark.parametrize("moment", ["step 3", "step 7"])
def test_a_run_that_is_killed_between_updates_of_the_same_captions_goes_on_with_them(moment, runs, unbroken, twice):
    flags = GRPO | {"model_name_or_path": unbroken.output, "save_strategy": "steps", "save_steps": 1}
    name = f"grpo killed at {moment}"
    runs.run(name, **flags, moment=moment, code=-9)
    other, logs = runs.run(name, **flags)
    assert "resuming from" in logs[0]
    assert other.steps() == twice.steps()
    for logged in ("loss", "reward", "kl"):
        assert other.logged(logged) == twice.logged(logged), logged
    assert equal_weights(other.output, twice.output)


def test_other_processes_go_on_with_the_same_captions(runs, unbroken):
    flags = GRPO | {"model_name_or_path": unbroken.output, "save_strategy": "steps", "save_steps": 1}
    whole, _ = runs.run("grpo of two", processes=2, **flags)
    runs.run("grpo by fewer", processes=2, **flags, moment="step 3", code=-9)
    fewer, _ = runs.run("grpo by fewer", **flags, allow_other_processes="true")
    assert fewer.steps() == whole.steps()
    for name in ("loss", "reward"):  # other values are means over batches, which are others
        ours, theirs = fewer.logged(name), whole.logged(name)
        assert [ours[step] for step in (1, 2, 3)] == pytest.approx([theirs[step] for step in (1, 2, 3)], abs=1e-5), name


# The loss, of which a high one is wanted here, falls from the first evaluation on.
PATIENT = {"num_train_epochs": 12, "patience": 5, "metric_for_best_model": "loss", "greater_is_better": "true"}
PATIENT |= {"learning_rate": 1e-4, "save_total_limit": 20}


@pytest.fixture(scope="module")
def patient(runs):
    return runs.run("patient", **PATIENT)[0]


MOMENTS = [("save 4", "SIGKILL", -9), ("evaluation 6", "SIGTERM", 143)]


@pytest.mark.parametrize(("moment", "signal", "code"), MOMENTS)
def test_patience_is_kept_by_a_resumed_run(moment, signal, code, runs, patient):
    assert list(patient.logged("eval_loss")) == [4 * epoch for epoch in range(1, 7)]
    name = f"patient, {signal} in {moment}"
    runs.run(name, **PATIENT, moment=moment, signal=signal, code=code)
    other, _ = runs.run(name, **PATIENT)
    assert other.logged("eval_loss") == patient.logged("eval_loss")
    assert other.steps() == patient.steps()
    assert equal_weights(other.output, patient.output)


def test_a_run_that_patience_ended_is_not_trained_further(runs):
    flags = PATIENT | {"patience": 1}
    ended, _ = runs.run("ended", **flags)
    weights, steps = (ended.output / "model.safetensors").read_bytes(), ended.logged("loss")
    again, _ = runs.run("ended", **flags)
    assert (again.output / "model.safetensors").read_bytes() == weights
    assert again.logged("loss") == steps
    assert max(steps) == 8


def test_another_number_of_processes_is_refused_unless_told_and_then_sees_the_same(runs, unbroken):
    flags = laws.AUGMENTED | laws.OFTEN
    runs.run("fewer", processes=2, **flags, moment="step 7", code=-9)
    told = {"allow_other_processes": "true"}
    assert "written by 2 process(es), and here are 1. Start as many" in laws.refusal(
        runs.run("fewer", **flags, per_device_train_batch_size=2, code=2)[1]
    )
    assert "keep 8 images a step, which are now 4" in laws.refusal(
        runs.run("fewer", **flags, **told, per_device_train_batch_size=2, code=2)[1]
    )
    fewer, _ = runs.run("fewer", **flags, **told)
    assert fewer.steps() == unbroken.steps()
    assert fewer.logged("loss") == pytest.approx(unbroken.logged("loss"), abs=1e-5)
    assert json.loads((fewer.output / "run.json").read_text())["processes"] == {"from step 0": 2, "from step 6": 1}


def test_a_checkpoint_without_an_optimizer_is_not_resumed_from(runs):
    flags = {"save_only_model": "true", "eval_strategy": "no"}
    runs.run("weights", **flags, moment="step 6", code=-9)
    assert "checkpoint-4 has weights and no optimizer (--save_only_model)" in laws.refusal(
        runs.run("weights", **flags, code=2)[1]
    )
    named = {"resume_from_checkpoint": runs.folder / "weights/checkpoint-4"}
    assert "has weights and no optimizer" in laws.refusal(runs.run("elsewhere", **flags, **named, code=2)[1])


def test_the_table_in_docs_is_what_the_results_say():
    results = json.loads((ROOT / "benchmarks/results/laws.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- laws -->\n")[2].partition("<!-- /laws -->")[0]
    assert shown.strip() == table(
        {option: results["table"][option] for option in OPTIONS if option in results["table"]}
    )
    assert "DIFFERENT" not in shown
    assert results["random_kills"]["same_sequence_and_bits"] == results["random_kills"]["kills"] == 20
