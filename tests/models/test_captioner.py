"""A captioner says what it does: its settings, its precision, its count of captions that were cut."""

import pytest
import tiny
import torch
from PIL import Image
from transformers import BlipConfig

import data
from captioner import Captioner, UnfitLengths, check_lengths
from models.decoding import DEFAULTS, WITHOUT_BEAMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner.from_pretrained(folder, device="cpu", bf16=False)


def pictures(count):
    return [Image.effect_noise((40, 32), 50 + n).convert("RGB") for n in range(count)]


def test_what_is_not_asked_for_is_the_default_and_what_is_asked_for_is_recorded(captioner):
    plain = {"prompt": "", "keep_prompt": False, **DEFAULTS, "precision": "float32", "fast_jpeg": False}
    assert captioner.description() == plain
    changed = captioner.with_settings(prompt="a", num_beams=1, max_new_tokens=7).description()
    without = {name: value for name, value in plain.items() if name not in WITHOUT_BEAMS}
    assert changed == without | {"prompt": "a", "num_beams": 1, "max_new_tokens": 7}
    two = Captioner(captioner.model, captioner.processor, num_beams=2, length_penalty=2, remove_illegal_characters=True)
    assert two.description() == plain | {"num_beams": 2, "length_penalty": 2.0, "remove_illegal_characters": True}
    assert isinstance(two.settings["length_penalty"], float)  # generate refuses others
    assert isinstance(two.settings["num_beams"], int)


def test_the_precision_is_the_one_asked_for(folder):
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        loaded = Captioner.from_pretrained(folder, device="cpu", bf16=bf16)
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
        assert loaded.autocast is None
        assert f"torch.{loaded.description()['precision']}" == str(dtype)


def test_lengths_are_refused_just_where_the_positions_end():
    config = BlipConfig(text_config={"max_position_embeddings": 20})

    def check(prompt, new, least=None):
        check_lengths(config, prompt, {"min_new_tokens": least, "max_new_tokens": new})

    check(5, 16)  # the last token is not read again
    with pytest.raises(UnfitLengths, match=r"5 tokens and max_new_tokens, 17, are more than the 20 positions"):
        check(5, 17)
    check(5, 7, least=7)
    with pytest.raises(UnfitLengths, match="min_new_tokens, 8, is more than max_new_tokens, 7"):
        check(5, 7, least=8)


def test_captions_that_were_cut_are_counted(captioner):
    short = captioner.with_settings(max_new_tokens=1, suppress_tokens=[captioner.collator.end])
    short(pictures(3))
    short(pictures(2))
    assert (short.written, short.cut) == (5, 5)
    short.count_anew()
    assert (short.written, short.cut) == (0, 0)
    ended = captioner.with_settings(max_new_tokens=5, sequence_bias=[[[captioner.collator.end], 1e4]])
    assert ended(pictures(2)) == ["", ""]
    assert (ended.written, ended.cut) == (2, 0)


def test_a_split_says_once_how_many_of_its_captions_were_cut(captioner, dataset, caplog):
    short = captioner.with_settings(max_new_tokens=1, suppress_tokens=[captioner.collator.end])
    with caplog.at_level("INFO", logger="captioner"):
        short.caption_split(data.load(dataset)["train"].select(range(3)), batch_size=2)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 3 captions were cut at max_new_tokens, 1: they have no end of their own"
    ]
    assert not short.fast_jpeg


@pytest.mark.parametrize("remove", [False, True])
def test_illegal_characters_are_removed_if_that_is_asked(captioner, remove, monkeypatch):
    monkeypatch.setattr(captioner.processor, "batch_decode", lambda tokens, **_: ["a dog \ufffd runs"])
    asked = Captioner(captioner.model, captioner.processor, remove_illegal_characters=remove)
    assert asked.texts([[1]]) == ["a dog runs" if remove else "a dog \ufffd runs"]


def test_several_captions_of_an_image_stand_together(captioner):
    several = captioner.with_settings(num_beams=3, num_return_sequences=2, max_new_tokens=4)
    batch = captioner.collator([{"image": image, "image_id": str(n)} for n, image in enumerate(pictures(3))])
    together = several.caption_batch(batch)
    alone = [
        several.caption_batch(captioner.collator([sample]))
        for sample in ({"image": image, "image_id": "0"} for image in pictures(3))
    ]
    assert [len(captions) for captions in together] == [2, 2, 2]
    assert together == [captions for (captions,) in alone]


def test_the_prompt_stands_before_a_caption_if_it_is_kept(captioner):
    bare, kept = (
        Captioner(captioner.model, captioner.processor, prompt="a picture of ", keep_prompt=keep, max_new_tokens=4)(
            pictures(2)
        )
        for keep in (False, True)
    )
    assert kept == [f"a picture of {text}".strip() for text in bare]
    assert bare != kept


def test_a_split_is_captioned_in_its_order_and_the_model_stays_in_its_mode(captioner, dataset):
    captioner = captioner.with_settings(max_new_tokens=4)
    records = data.load(dataset)["train"].select(range(5))
    captions = {}
    for training in (True, False):
        captioner.model.train(training)
        captions[training] = captioner.caption_split(records, batch_size=2)
        assert captioner.model.training == training
    assert captions[True] == captions[False]
    assert list(captions[True]) == records["image_id"][:]
    assert captioner.written == 5
