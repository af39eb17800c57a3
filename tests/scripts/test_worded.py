"""What infer.py adds to captions and removes, and the limits and the attention that a model is loaded with."""

import json
import types

import pytest
import tiny
import transformers
from PIL import Image
from places import script

from captioner import Captioner
from captioning.rows import worded
from common.errors import UserError
from models.loading import limit_pixels


@pytest.mark.parametrize(
    ("text", "strip", "written"),
    [
        ("This image shows a dog", ["This image shows"], "<a dog>"),
        ("this image shows: a dog", ["This image shows"], "<a dog>"),
        ("This image showsa dog", ["This image shows"], "<This image showsa dog>"),
        ("a dog. This image shows", ["This image shows"], "<a dog. This image shows>"),
        ("The image (b) a dog", ["The image (a)", "The image (b)"], "<a dog>"),
        ("a dog", [], "<a dog>"),
    ],
)
def test_words_are_removed_from_the_front_and_text_is_put_around(text, strip, written):
    assert worded(text, types.SimpleNamespace(strip=strip, prefix="<", suffix=">")) == written


def test_infer_writes_captions_with_prefix_and_suffix_and_does_not_mix(tmp_path):
    folder = tiny.build_folder(tmp_path)
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "0.png")
    plain = Captioner.from_pretrained(str(folder))([str(tmp_path / "0.png")])[0]
    words = (tmp_path / "0.png", "--model_name_or_path", folder, "--output", tmp_path / "o.jsonl")
    script("infer", *words, "--prefix", "ohwx, ", "--suffix", " end", "--strip", "no such words")
    assert json.loads((tmp_path / "o.jsonl").read_text())["caption"] == f"ohwx, {plain} end"
    done = tiny.run("infer.py", *words, "--prefix", "other, ", fails=True)
    assert "prefix" in done.stderr


def processor(kind):
    return types.SimpleNamespace(image_processor=kind())


def test_pixels_are_limited_where_the_processor_has_limits():
    image = Image.new("RGB", (640, 480))
    limited = processor(transformers.Qwen2VLImageProcessorPil)
    patches = lambda: len(limited.image_processor(images=[image], return_tensors="np")["pixel_values"])  # noqa: E731
    before = patches()
    limit_pixels(limited, {"max_pixels": 28 * 28 * 16, "min_pixels": None})
    assert patches() <= 16 * 4 < before
    limit_pixels(limited, {"max_pixels": 28 * 28 * 400, "min_pixels": 28 * 28 * 395})
    assert patches() > before * 0.9
    with pytest.raises(UserError, match=r"--min_pixels, \d+, is more than --max_pixels, 784"):
        limit_pixels(limited, {"max_pixels": 784, "min_pixels": None})
    with pytest.raises(UserError, match=r"--max_pixels: BlipImageProcessor.* has no such limit"):
        limit_pixels(processor(transformers.BlipImageProcessor), {"max_pixels": 784, "min_pixels": None})


def test_attention_is_the_librarys_by_its_name(tmp_path):
    import families

    model, processor = families.build("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(str(tmp_path), loading={"attn_implementation": "eager"})
    assert loaded.model.config.get_text_config()._attn_implementation == "eager"
    images = [Image.effect_noise((32, 32), 50).convert("RGB")]
    assert loaded(images) == Captioner.from_pretrained(str(tmp_path))(images)
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(UserError, match=f"--attn_implementation {name}: ") as error:
            Captioner.from_pretrained(str(tmp_path), loading={"attn_implementation": name})
        assert "\n" not in str(error.value)
