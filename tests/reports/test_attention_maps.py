import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from captioner import Captioner
from models.blip_attention import use_fast_attention
from reports.attention_maps import attention_maps, cross_attention, overlay

CAPTION = "a red circle near dogs"  # "dogs" is a word of the vocabulary, "circles" is circle ##s


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def captioner(tmp_path):
    model, processor = tiny.build(tmp_path)
    return Captioner(model.eval(), processor)


def eager_attentions(captioner, picture, caption) -> torch.Tensor:
    """(layers, heads, length, patches + 1) of transformers' own eager attention."""
    tokens = captioner.collator.target_ids([caption])[0][:-1]
    batch = captioner.training_batch(captioner.collator([{"image": picture, "image_id": "0"}]), [tokens])
    model = use_fast_attention(captioner.model, False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        image = model.vision_model(batch["pixel_values"]).last_hidden_state
        out = model.text_decoder.bert(
            **inputs, encoder_hidden_states=image, output_attentions=True, is_decoder=True, use_cache=False
        )
    use_fast_attention(model)
    return torch.cat(out.cross_attentions)


@pytest.mark.parametrize("prompt", ["", "a picture of "])
@pytest.mark.parametrize("fast", [True, False])
def test_probabilities_are_those_of_eager_attention(fast, prompt, captioner, picture):
    captioner = Captioner(captioner.model, captioner.processor, prompt=prompt)
    expected = eager_attentions(captioner, picture, CAPTION)
    use_fast_attention(captioner.model, fast)
    tokens = captioner.collator.target_ids([CAPTION])[0][:-1]
    batch = captioner.training_batch(captioner.collator([{"image": picture, "image_id": "0"}]), [tokens])
    found = cross_attention(captioner.model, batch)
    assert found.shape == (2, 2, 1, len(tokens) + 1 + len(prompt.split()), 17)
    torch.testing.assert_close(found[:, :, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_a_words_map_is_the_mean_of_its_pieces_where_they_are_predicted(prompt, captioner, picture):
    captioner = Captioner(captioner.model, captioner.processor, prompt=prompt)
    words, maps = attention_maps(captioner, picture, "Two  circles, a dog .")
    assert words == ["Two", "circles,", "a", "dog", "."]
    assert maps.shape == (5, 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    pieces = eager_attentions(captioner, picture, "two circles , a dog .")[1, :, len(prompt.split()) :, 1:].numpy()
    pieces = (pieces / pieces.sum(-1, keepdims=True)).mean(0).reshape(-1, 4, 4)  # two circle ##s , a dog .
    for word, members in enumerate(([0], [1, 2], [4], [5], [6])):
        np.testing.assert_allclose(maps[word], pieces[members].mean(0), rtol=1e-4)


def test_the_model_is_left_as_it_was(captioner, picture):
    captioner.model.train()
    attention_maps(captioner, picture, CAPTION)
    assert captioner.model.training
    assert not any(module._forward_hooks for module in captioner.model.modules())


def test_other_families_and_empty_captions_are_refused(captioner, picture):
    with pytest.raises(ValueError, match="no word"):
        attention_maps(captioner, picture, " ")
    words, maps = attention_maps(captioner, picture, "a \u200b dog")  # a word that the tokenizer drops
    assert words == ["a", "dog"]
    assert np.isfinite(maps).all()
    git = Captioner(*families.build("git"))
    with pytest.raises(ValueError, match="this is a git"):
        attention_maps(git, picture, CAPTION)


def test_an_overlay_keeps_colours_where_the_map_is_high_and_darkens_the_rest():
    picture = Image.new("RGB", (64, 32), (200, 100, 50))
    heat = np.zeros((2, 4))
    heat[0, 0] = 0.3
    shaded = np.asarray(overlay(picture, heat, strength=0.5))
    assert shaded.shape == (32, 64, 3)
    assert abs(shaded[2, 2].astype(int) - (200, 100, 50)).max() <= 6
    assert tuple(shaded[-1, -1]) == (100, 50, 25)
