"""The parts of rewrite.py: prompts that fit, checks of texts, rows of every source."""

import csv
import json
from types import SimpleNamespace

import pytest
import tiny
from conftest import ROOT

from common.errors import DataError
from data.text_rows import json_list
from metrics.coco_caption.text_checks import (
    illegal_characters,
    remove_illegal_characters,
    repetition,
    scripts,
    unsupported_facts,
)
from rewriting.checks import Checker, copied, tidy
from rewriting.prompts import Prompt, Tokens, fill, fit, load_prompt
from rewriting.rows import open_source


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from rewriting.backends import load_tokenizer

    return load_tokenizer(str(tiny.build_llm(tmp_path_factory.mktemp("llm"))))


# ---------------------------------------------------------------- prompts


def test_the_published_prompt_is_word_for_word_that_of_capsfusion():
    text = fill(load_prompt("fuse"), {"raw": "RAW {x}", "synthetic": "SYN"})
    assert text.startswith("Please merge and refine the information from the two given sentences. Sentence 1 provides ")
    assert text.endswith(
        "Avoid simply concatenating the sentences.\n\nSentence 1: RAW {x}\nSentence 2: SYN\nNew Sentence:"
    )
    assert load_prompt("fuse").sha256 == "cc6f6f8c114c"  # of the string that the official script builds


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Join {raw}.", "the field {synthetic} is missing"),
        ("Join {raw} and {synthetic} and {caption}", "{caption} is not a field"),
        ("Join {raw!r} and {synthetic}", "{raw!r} is not a field"),
        ("Join {raw and {synthetic}", "Write a brace that is not a field twice"),
        ("Join {} {raw} {synthetic}", "{} is not a field"),
    ],
)
def test_a_prompt_file_with_wrong_fields_is_named(template, said, tmp_path):
    (tmp_path / "p.txt").write_text(f"# a comment\n{template}")
    with pytest.raises(ValueError, match=r"p\.txt") as error:
        load_prompt("fuse", tmp_path / "p.txt")
    assert said in str(error.value)


def test_literal_braces_and_changed_wording_give_another_hash(tmp_path):
    (tmp_path / "a.txt").write_text("# one\nJSON {{}} of {captions}\n")
    (tmp_path / "b.txt").write_text("# two\nJSON {{}} of {captions}")
    (tmp_path / "c.txt").write_text("JSON {{}} of these {captions}")
    a, b, c = (load_prompt("paragraph", tmp_path / f"{name}.txt") for name in "abc")
    assert fill(a, {"captions": ["x", "y"]}) == "JSON {} of - x\n- y"
    assert a.sha256 == b.sha256 != c.sha256


@pytest.mark.parametrize("real", [True, False])
def test_prompts_fit_to_the_token_at_every_limit_and_no_caption_is_emptied(real, tokenizer):
    tokens = Tokens(tokenizer if real else None)
    prompt = Prompt("Join {raw} and {synthetic}:", "")
    raw, synthetic = "Grüße 🐘🐘 from the elephant house in 日本 " * 8, "an elephant, in a house"
    whole = len(tokens.encode(fill(prompt, {"raw": raw, "synthetic": synthetic})))
    shortest = len(tokens.encode(fill(prompt, {"raw": "G", "synthetic": "a"}))) + 1
    kept = []
    for limit in range(shortest, whole + 2):
        text, ids = fit(prompt, {"raw": raw, "synthetic": synthetic}, tokens, limit)
        assert ids == tokens.encode(text)
        assert len(ids) <= limit
        left, right = text.removeprefix("Join ").removesuffix(":").rsplit(" and ", 1)
        assert left.strip()
        assert right.strip()
        assert "\ufffd" not in text
        assert raw.startswith(left)
        assert synthetic.startswith(right)
        assert right == synthetic or len(tokens.pieces(left)) <= 4  # the synthetic one is cut last
        kept.append(len(left) + len(right))
    assert fit(prompt, {"raw": raw, "synthetic": synthetic}, tokens, whole)[0] == f"Join {raw} and {synthetic}:"
    assert fit(prompt, {"raw": raw, "synthetic": synthetic}, tokens, whole - 1)[1] != whole
    assert kept[-3] > 0.9 * kept[-1]  # no more is cut than has to be
    with pytest.raises(ValueError, match="leaves no room"):
        fit(prompt, {"raw": raw, "synthetic": synthetic}, tokens, 3)


def test_of_several_captions_the_longest_is_cut(tokenizer):
    prompt, tokens = Prompt("{captions}", ""), Tokens(tokenizer)
    captions = ["a red dog runs on the grass in the evening sun", "a dog", "a red dog"]
    text, ids = fit(prompt, {"captions": captions}, tokens, 30)
    assert len(ids) <= 30
    assert text.splitlines()[1:] == ["- a dog", "- a red dog"]
    assert captions[0].startswith(text.splitlines()[0].removeprefix("- "))


# ---------------------------------------------------------------- checks

RAW, SYNTHETIC = "Sailing ship Stock Image 1998", "A boat with blue sails is floating."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A sailing ship with blue sails is floating in this stock image of 1998.", None),
        ("", "empty"),
        ("...", "empty"),
        ("A ship\u200b with blue sails floats.", "illegal"),
        ("A ship with \ufffd sails floats.", "illegal"),
        ("I'm sorry, but I cannot merge these.", "refusal"),
        ("As an AI language model, I see a ship.", "refusal"),
        ("Here is the merged text: A ship with blue sails.", "chatter"),
        ("Sure! A ship with blue sails.", "chatter"),
        ("**Ship** with blue sails.", "chatter"),
        ("The ship showcases detailed real-world knowledge.", "prompt_leak"),
        ("The ship exhibits nice sentence structure.", "prompt_leak"),
        ("A ship as mentioned in Sentence 2 has blue sails.", "prompt_leak"),
        ("A ship is floating, while the second sentence has sails.", "prompt_leak"),
        ("A ship with blue sails, a ship with blue sails, a ship with blue sails.", "repetition"),
        ("A ship has blue sails. A ship has blue sails.", "repetition"),
        ("A sailing ship with blue sails is floating on the", "cut_off"),
        ("Парусник с синими парусами.", "language"),
        ("Ein Schiff mit blauen Segeln schwimmt auf dem weiten Meer.", "language"),
        ("A boat with blue sails is floating.", "copy"),
        ("Sailing ship Stock Image 1998 A boat with blue sails is floating.", "copy"),
    ],
)
def test_each_fault_of_a_text_has_its_reason(text, reason):
    assert Checker(load_prompt("fuse")).fault(tidy(text), [RAW, SYNTHETIC]) == reason


def test_203_texts_are_accepted_and_rejected_as_a_person_would():
    checkers = {task: Checker(load_prompt(task)) for task in ("fuse", "paragraph")}
    wrong, count = [], 0
    for group in json.loads((ROOT / "tests/fixtures/rewritten_texts.json").read_text(encoding="utf-8")):
        for reason, texts in {None: group["accepted"], **group["rejected"]}.items():
            faults = [checkers[group["task"]].fault(tidy(text), group["inputs"]) for text in texts]
            wrong += [(text, fault, reason) for text, fault in zip(texts, faults, strict=True) if fault != reason]
            count += len(texts)
    assert wrong == []
    assert count == 203


def test_wording_that_an_input_has_is_no_leak_and_an_input_that_repeats_may_be_repeated():
    checker = Checker(load_prompt("fuse"))
    assert checker.fault("A book on real-world knowledge.", ["real-world knowledge", "a book"]) is None
    assert checker.fault("New York New York New York is shown.", ["New York New York New York", "a city"]) is None


def test_another_language_passes_when_asked_for_but_not_another_script_than_the_inputs():
    checker = Checker(load_prompt("fuse"), language="any")
    german = ["Ein Schiff mit blauen Segeln", "ein Boot auf dem Meer vor der Stadt"]
    assert checker.fault("Ein Schiff mit blauen Segeln schwimmt auf dem weiten Meer.", german) is None
    assert checker.fault("Ein Schiff 船 schwimmt auf dem weiten Meer vor der Stadt.", german) == "language"


def test_a_copy_is_no_fault_where_the_others_say_nothing_more():
    assert copied("A red dog runs.", ["a red dog runs", "a dog in the water"])
    assert not copied("A red dog runs.", ["a red dog runs", "a dog"])
    assert not copied("A red dog runs.", ["a red dog runs"])


def test_thoughts_and_quotes_around_the_text_are_left_out():
    assert tidy("<think>Let me\nsee</think>\n\n“A red  dog.”") == "A red dog."
    assert tidy('"Dog" and "cat"') == '"Dog" and "cat"'
    assert tidy("<think>no end") == ""
    assert tidy("The user wants one sentence.\n</think>\nA red dog.") == "A red dog."
    assert tidy("<reasoning>Two</reasoning>A red dog.") == "A red dog."


def test_names_and_numbers_that_no_input_has_are_listed():
    sources = ["two dogs in New-York, iPhone6 for $1,200", "the White House's lawn"]
    assert unsupported_facts("Two dogs and 3 cats sit in New York near the White House.", sources) == ["3"]
    assert unsupported_facts("In Paris, 2 dogs use an iPhone 6. It cost 1200 in May.", sources) == ["Paris", "May"]


def test_illegal_characters_are_found_and_removed_but_no_letter_of_any_language():
    assert illegal_characters("naïve 日本 🧥 👨‍👩‍👧 “quoted” – 5 °C\n") == []
    assert illegal_characters("a\x00b\ufffdc\ue000d\u200be\x7f") == ["\x00", "\ufffd", "\ue000", "\u200b", "\x7f"]
    assert remove_illegal_characters("a \ufffd\ufffd dog\u200b runs") == "a dog runs"
    assert scripts("Aß 日本 Экз") == {"LATIN": 2, "CJK": 2, "CYRILLIC": 3}


def test_loops_are_repetition_and_parallel_phrases_are_not():
    assert repetition("the dog the dog the dog runs") == "the dog"
    assert repetition("no no no no") == "no"
    assert repetition("a red dog, a red cat and a red bird near a red house") is None


# ---------------------------------------------------------------- rows


def flags(**values):
    names = (
        "data_format dataset_config_name split streaming image_dir image_column caption_column raw_column "
        "synthetic_column synthetic_file skip_bad_samples"
    )
    return SimpleNamespace(**{**dict.fromkeys(names.split()), "data_format": "auto", "streaming": False, **values})


def inputs(task, path, **values):
    source = open_source(task, str(path), flags(**values))
    return [source.inputs(row) for row in source.read(source.columns)]


def test_json_jsonl_csv_and_parquet_of_the_same_rows_are_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"laion_2b": f'a "b", {n}\n c', "laion_coco": f"d {n}", "capsfuion_official": "e"} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    expected = [{"raw": f'a "b", {n} c', "synthetic": f"d {n}"} for n in range(3)]
    for kind in ("json", "jsonl", "csv", "parquet"):
        assert inputs("fuse", tmp_path / f"a.{kind}") == expected


def test_what_infer_py_and_rewrite_py_keep_in_their_folders_is_no_data(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "out/_answers").mkdir(parents=True)
    pq.write_table(pa.table({"raw": ["a"], "synthetic": ["b"]}), tmp_path / "out/00000-0123456789ab01234567.parquet")
    for name in ("_settings.json", "_report.json", "_answers/0123456789ab.jsonl"):
        (tmp_path / "out" / name).write_text("{}\n")
    assert inputs("fuse", tmp_path / "out") == [{"raw": "a", "synthetic": "b"}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_a_json_list_is_read_piece_by_piece(chunk, tmp_path):
    values = [{"a": [1, {"b": "]},["}]}, 12, "x,]", [], None]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent))
        assert list(json_list(tmp_path / "a.json", chunk)) == values
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2')
    with pytest.raises(DataError, match="entry 1: not valid JSON"):
        list(json_list(tmp_path / "a.json", chunk))
    (tmp_path / "a.json").write_text("[]")
    assert list(json_list(tmp_path / "a.json", chunk)) == []


def test_all_captions_of_an_image_come_together_and_a_table_without_images_has_one_a_row(tmp_path):
    source = tiny.write_photos(
        tmp_path / "photos", {"p1": ["a dog", "a red dog", "a dog"], "p2": ["a cat"], "p3": ["b"]}
    )
    rows = [
        {"image": f"photos/p{n}.png", "caption": c} for n, c in ((1, "a dog"), (2, "a cat"), (1, "a red dog"), (3, "b"))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.jsonl").write_text('{"captions": ["a", "b"]}\n{"captions": ["a"]}')
    (tmp_path / "urls.csv").write_text("image,caption_0,caption_1\nhttp://x.org/1.jpg,a,b\n")
    expected = [{"captions": ["a dog", "a red dog"]}, {"captions": ["a cat"]}, {"captions": ["b"]}]
    for path in (source, tmp_path / "pairs.jsonl"):
        assert sorted(map(str, inputs("paragraph", path))) == sorted(map(str, expected))
    (tmp_path / "odd.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace('"caption"', '"words"'))
    assert sorted(map(str, inputs("paragraph", tmp_path / "odd.jsonl", caption_column="words"))) == sorted(
        map(str, expected)
    )
    assert inputs("paragraph", tmp_path / "texts.jsonl") == [{"captions": ["a", "b"]}, {"captions": ["a"]}]
    assert inputs("paragraph", tmp_path / "urls.csv") == [{"captions": ["a", "b"]}]


def test_coco_annotations_are_read_without_their_images(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
    annotations = [{"image_id": n, "caption": f"{word} {n}"} for word in ("a dog", "the dog") for n in range(4)]
    for split in ("train", "val", "test"):
        shift = {"train": 0, "val": 10, "test": 20}[split]
        content = {
            "images": [{"id": i["id"] + shift, "file_name": f"{split}{i['file_name']}"} for i in images],
            "annotations": [{**a, "image_id": a["image_id"] + shift} for a in annotations],
        }
        (tmp_path / f"captions_{split}2014.json").write_text(json.dumps(content))
    source = open_source("paragraph", str(tmp_path), flags())
    rows = list(source.read(None))
    assert [row["image_id"] for row in rows if row["split"] == "validation"] == ["10", "11", "12", "13"]
    assert source.inputs(rows[0]) == {"captions": ["a dog 0", "the dog 0"]}
    assert len(inputs("paragraph", tmp_path, split="test")) == 4


def test_the_published_files_are_read_as_they_are(test_data):
    found = inputs("fuse", test_data / "capsfusion/example_data.json")
    assert len(found) == 2000
    assert found[0] == {"raw": "Defensive Heart", "synthetic": "The poster for Drotthy E. Shaw's defensive heart."}
    assert len(inputs("paragraph", test_data / "flickr8k")) == 800
    assert len(inputs("paragraph", test_data / "flickr8k")[0]["captions"]) == 5


def test_the_checks_flag_the_official_outputs_that_leak_and_few_others(test_data):
    rows = json.loads((test_data / "capsfusion/example_data.json").read_text())
    checker = Checker(load_prompt("fuse"))
    given = [([row["laion_2b"], row["laion_coco"]], tidy(row["capsfuion_official"])) for row in rows]
    reasons = [checker.fault(text, captions) for captions, text in given]
    assert 95 <= reasons.count("prompt_leak") <= 105
    assert 1830 <= reasons.count(None) <= 1850
    for (_, text), reason in zip(given, reasons, strict=True):
        assert reason == "prompt_leak" if "real-world knowledge" in text else True
