"""Rewards are the scores of an evaluation, with the caption's end as one more word."""

import json
import random

import datasets
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from small_run import CAPTIONS, SPLITS

from common.caches import cache_folder
from common.errors import UserError
from metrics import ends_badly, score, tokenize
from metrics.coco_caption.cider import END_OF_SEQUENCE
from metrics.coco_caption.java import why_no_meteor
from objectives.own_reward import own_function
from objectives.rewards import Rewards, check_java, parse_rewards

WORDS = [
    "a",
    "the",
    "man",
    "dog",
    "red",
    "runs",
    "on",
    "in",
    "with",
    "hat",
    "grass",
    "water",
    "two",
    "small",
    "ball",
    "near",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpus():
    """{image id: captions} as people write them, with capitals and a period."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(4, 10))) for _ in range(120)]
    return {f"image{i}": [f"{text.capitalize()}." for text in texts[3 * i : 3 * i + 3]] for i in range(40)}


def candidates_of(corpus, count):
    """Captions near the references: some words of one of them, and not always to its end."""
    chance = random.Random(1)
    found = []
    for captions in corpus.values():
        words = [chance.choice(captions).rstrip(".").lower().split() for _ in range(count)]
        found.append([" ".join(line[: chance.randint(2, len(line))]) for line in words])
    ended = [[chance.random() < 0.6 for _ in group] for group in found]
    return found, ended


def spelled_out(caption, end=True):
    return " ".join(tokenize([caption])[0] + [END_OF_SEQUENCE] * end)


def coco(scorer, corpus, candidates, ended, k):
    """pycocoevalcap's per-image scores of each image's k-th candidate, the end spelled out as a word."""
    references = {i: [spelled_out(text) for text in captions] for i, captions in corpus.items()}
    hypotheses = {i: [spelled_out(group[k], ends[k])] for i, group, ends in zip(corpus, candidates, ended, strict=True)}
    return scorer.compute_score(references, hypotheses)[1]


def test_cider_is_that_of_the_coco_code_with_the_end_as_a_word(corpus):
    candidates, ended = candidates_of(corpus, 3)
    total, parts = Rewards({"cider": 1.0}, corpus)(list(corpus), candidates, ended)
    assert total.shape == (40, 3)
    for k in range(3):
        expected = torch.tensor(coco(Cider(), corpus, candidates, ended, k), dtype=torch.float)
        torch.testing.assert_close(parts["cider"][:, k], expected)
    assert total.max() > 3


def test_bleu_is_that_of_the_coco_code_with_the_end_as_a_word(corpus):
    candidates, ended = candidates_of(corpus, 2)
    _, parts = Rewards({"bleu": 1.0}, corpus)(list(corpus), candidates, ended)
    for k in range(2):
        expected = torch.tensor(coco(Bleu(4), corpus, candidates, ended, k)[3], dtype=torch.float)
        torch.testing.assert_close(parts["bleu"][:, k], expected)
    assert 0.3 < parts["bleu"].max() <= 1


def test_rewards_cut_captions_as_their_language_is_cut():
    """Chinese, cut into characters: what the COCO code gives for characters with spaces between them. Read as English, each
    caption is one word, and no candidate of another wording earns anything."""
    corpus = {
        "1": ["一个男人骑着马在沙滩上", "一个人骑马"],
        "2": ["两只狗在雪地里奔跑", "雪地里的两只狗"],
        "3": ["桌子上有一盘食物", "一盘食物放在木桌上"],
    }
    candidates = [["一个人骑着马"], ["雪地里有两只狗"], ["木桌上有一盘食物"]]
    spaced = {image: [" ".join(text) for text in captions] for image, captions in corpus.items()}
    apart = [[" ".join(text) for text in group] for group in candidates]
    ended = [[True]] * 3
    _, parts = Rewards({"cider": 1.0, "bleu": 1.0}, corpus, language="zh-Hans")(list(corpus), candidates, ended)
    expected = {"cider": coco(Cider(), spaced, apart, ended, 0), "bleu": coco(Bleu(4), spaced, apart, ended, 0)[3]}
    for name, values in expected.items():
        torch.testing.assert_close(parts[name][:, 0], torch.tensor(values, dtype=torch.float))
    assert parts["cider"].min() > 0.5
    assert Rewards({"bleu": 1.0}, corpus)(list(corpus), candidates, ended)[0].max() < 1e-3


def test_an_images_reward_does_not_depend_on_the_batch(corpus):
    """CIDEr's frequencies are the training corpus's: within the batch, that of one image would be 0."""
    candidates, ended = candidates_of(corpus, 3)
    rewards = Rewards({"cider": 1.0, "bleu": 0.5}, corpus)
    together, parts = rewards(list(corpus), candidates, ended)
    alone = [rewards([i], [c], [e])[0] for i, c, e in zip(corpus, candidates, ended, strict=True)]
    torch.testing.assert_close(torch.cat(alone), together)
    torch.testing.assert_close(together, parts["cider"] + 0.5 * parts["bleu"])
    assert together[0].max() > 0


def test_a_caption_that_is_broken_off_earns_less_than_one_that_ends_there(corpus):
    rewards = Rewards({"cider": 1.0}, corpus)
    image_id, captions = next(iter(corpus.items()))
    (ended, cut), = rewards([image_id], [[captions[0], captions[0]]], [[True, False]])[0].tolist()  # fmt: skip
    assert ended > cut > 0


def test_bad_endings_are_found():
    assert [ends_badly(caption.split()) for caption in ("a man with a", "a man with", "a man", "")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("cider", {"cider": 1}),
        ("cider:1.0 bleu:0.5", {"cider": 1, "bleu": 0.5}),
        ("bleu:2,cider:1", {"bleu": 2, "cider": 1}),
    ],
)
def test_rewards_are_named_with_their_weights(text, weights):
    assert parse_rewards(text) == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cidre:1", "'cidre' is not a reward. Known: cider, bleu"),
        ("cider:much", "the weight of cider is 'much', not a number"),
        ("", "names no reward"),
        ("cider:0", "names no reward"),
        ("cider cider", "named twice"),
    ],
)
def test_a_wrong_reward_is_one_clear_message(text, said):
    with pytest.raises(ValueError, match=said):
        parse_rewards(text)


class Rows(dict):
    columns = ("image_id", "image", "captions", "subject")


@pytest.fixture
def own(tmp_path):
    """(write(code) -> a reward's name, rows)"""

    def write(code: str) -> str:
        (tmp_path / "mine.py").write_text(f"def reward({code}")
        own_function.cache_clear()
        return f"{tmp_path}/mine.py:reward"

    image = Image.new("RGB", (4, 4), "red")
    return write, Rows({f"image{i}": {"image": image, "subject": f"dog{i}"} for i in range(2)})


REFERENCES = {"image0": ["a dog"], "image1": ["a cat", "two cats"]}
CANDIDATES = [["a dog", "a"], ["a cat", "cats"]]


def test_a_function_gets_what_its_parameters_are_named_after(own):
    write, rows = own
    name = write("""candidates, references, image_ids, images, subject):
    assert image_ids == ["image0", "image0", "image1", "image1"]
    assert subject == ["dog0", "dog0", "dog1", "dog1"]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0)] * 4
    return [len(text) if text in texts else None for text, texts in zip(candidates, references)]""")
    total, parts = Rewards({name: 0.5, "length": -1.0}, REFERENCES, rows)([*REFERENCES], CANDIDATES, None)
    assert total.tolist() == [[0.5, -1.0], [0.5, -1.0]]  # None counts as 0
    assert parts["reward"].nanmean() == 5
    assert parts["length"].tolist() == [[2, 1], [2, 1]]


def test_a_function_may_return_numbers_of_numpy(own):
    write, rows = own
    name = write("""candidates):
    import numpy
    return numpy.arange(4, dtype=numpy.float32)""")
    assert Rewards({name: 1.0}, REFERENCES, rows)([*REFERENCES], CANDIDATES, None)[0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("candidates): return [1]", "returned 1 values for 4 candidates"),
        ("candidates): return [float('nan')] * 4", "returned nan for 'a dog', which is neither a number nor None"),
        ("candidates): return ['1'] * 4", "returned '1' for 'a dog'"),
        ("candidates): return 1 / 0", r"failed: ZeroDivisionError: division by zero \(.*mine.py line 1\)"),
        ("candidates): return None", "failed: TypeError"),
        ("candidates, subjects): return []", "its parameter subjects is none of candidates, .*, subject"),
    ],
)
def test_what_a_function_may_not_do_is_one_line(own, code, said):
    write, rows = own
    with pytest.raises(UserError, match=said) as failed:
        Rewards({write(code): 1.0}, REFERENCES, rows)([*REFERENCES], CANDIDATES, None)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("code", "suffix", "said"),
    [
        ("", ":1", "cannot be run: SyntaxError"),
        ("): pass", "s:1", "has no function rewards"),
        ("): pass", ":many", "the weight of .*mine.py:reward is 'many'"),
        ("): pass", " other/mine.py:reward", "reward is named twice|there is no file other/mine.py"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_is_loaded(own, code, suffix, said):
    name = own[0](code) + suffix
    with pytest.raises(UserError, match=said):
        parse_rewards(name)


SLOW = pytest.mark.slow  # METEOR's table, and a parser of English
NAMED = [
    ("rouge-l", "ROUGE_L"),
    pytest.param("meteor", "METEOR", marks=SLOW),
    pytest.param("spice", "SPICE", marks=SLOW),
]


@pytest.mark.parametrize(("reward", "name"), NAMED)
def test_a_reward_of_the_name_of_a_score_is_that_of_an_evaluation(reward, name, corpus, request, monkeypatch):
    if reward != "rouge-l" and why_no_meteor():
        pytest.skip(why_no_meteor())
    if reward == "spice":
        pytest.importorskip("jpype")
        monkeypatch.setenv("CORENLP_DIR", str(request.getfixturevalue("test_data") / "corenlp"))
    corpus = dict([*corpus.items()][:6])
    candidates, _ = candidates_of(corpus, 2)
    check_java({reward: 1.0}, "en")
    _, parts = Rewards({reward: 1.0}, corpus)(list(corpus), candidates, None)
    asked = {"meteor": reward == "meteor", "spice": reward == "spice", "bootstrap_samples": 0}
    for k in range(2):
        predictions = {image: texts[k] for image, texts in zip(corpus, candidates, strict=True)}
        _, rows = score(predictions, corpus, **asked, cache=cache_folder() / "metrics")
        assert parts[reward][:, k].tolist() == pytest.approx([row[name] for row in rows.values()], abs=1e-6)
    assert 0 < parts[reward].max() <= 1


def test_java_that_is_not_there_or_fails_is_one_line(monkeypatch):
    check_java({"cider": 1.0}, "vi")
    with pytest.raises(UserError, match="reward: METEOR cannot be computed: METEOR is made for English"):
        check_java({"meteor": 1.0}, "vi")
    rewards = Rewards({"meteor": 1.0}, REFERENCES)
    monkeypatch.setenv("CAPTION_NO_JAVA", "1")
    with pytest.raises(UserError, match="reward: METEOR cannot be computed: no Java found"):
        check_java({"meteor": 1.0}, "en")
    with pytest.raises(UserError, match="reward: no Java found"):
        rewards([*REFERENCES], CANDIDATES, None)


def test_chair_counts_the_objects_that_are_not_there():
    """In image0 there is a dog by its reference and a ball by its instances."""
    candidates = [["a dog with a ball", "a cat, a dog and two cats"], ["a cat", "a man on a horse"]]
    rewards = Rewards({"chair": -0.5, "length": 0.0}, REFERENCES, instances={"image0": {"sports ball"}})
    total, parts = rewards([*REFERENCES], candidates, None)
    assert parts["chair"].tolist() == [[0, 2], [0, 2]]
    assert total.tolist() == [[0, -1], [0, -1]]
    assert Rewards({"chair": 1.0}, REFERENCES)([*REFERENCES], candidates, None)[0].tolist() == [[1, 2], [0, 2]]


def test_the_function_in_docs_is_trained_with(tmp_path, monkeypatch):
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    (tmp_path / "rewards.py").write_text(page.split("```python\n")[1].split("```")[0])
    dataset = tiny.write_photos(tmp_path / "photos", CAPTIONS, SPLITS)
    model = tiny.build_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny.run(
        "train.py", dataset, "--objective", "scst", "--model_name_or_path", model, "--output_dir", "out", "--max_steps", 2,
        "--reward", "cider rewards.py:short:0.1", "--scst_samples", 2, "--logging_steps", 1, "--eval_strategy", "no",
        "--save_strategy", "no", "--load_best_model_at_end", "false", "--max_new_tokens", 5, "--meteor", "false",
        "--spice", "false", "--report", "false", "--bootstrap_samples", 0,
    )  # fmt: skip
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    for row in history[:2]:
        assert row["reward"] == pytest.approx(row["reward_cider"] + 0.1 * row["reward_short"], abs=1e-6)
        assert row["reward_short"] <= 0
