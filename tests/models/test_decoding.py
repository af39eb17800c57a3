"""Shared-beam decoding returns what transformers' own generate returns: the peer is an untouched eager model."""

import pytest
import tiny
import torch
from PIL import Image
from test_blip_attention import SEP, START, eager_and_fast, random_images, real_photos, tiny_blip
from transformers import BlipForConditionalGeneration

from captioner import Captioner
from models.blip_attention import use_fast_attention
from models.decoding import generate
from models.vision import encode_images

OPTIONS = {
    "greedy": {},
    "beam 3": {"num_beams": 3},
    "beam 5, early stopping": {"num_beams": 5, "early_stopping": True},
    "beam 5, never stopping early": {"num_beams": 5, "early_stopping": "never", "length_penalty": 2.0},
    "short captions": {"num_beams": 4, "length_penalty": -1.0},
    "minimum length": {"num_beams": 4, "min_new_tokens": 9},
    "repetition penalty": {"num_beams": 4, "repetition_penalty": 1.5},
    "no repeated bigram": {"num_beams": 4, "no_repeat_ngram_size": 2},
    "all beams": {"num_beams": 5, "num_return_sequences": 5},
    "without cache": {"num_beams": 3, "use_cache": False},
    "one sample": {"do_sample": True},
    "five samples": {"do_sample": True, "num_return_sequences": 5, "top_p": 0.9, "temperature": 0.7},
    "top k": {"do_sample": True, "num_return_sequences": 3, "top_k": 10},
    "beam sampling": {"do_sample": True, "num_beams": 4, "num_return_sequences": 2},
    "greedy with repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_gives_the_librarys_token_ids_and_scores(options):
    eager, fast = eager_and_fast()
    images = random_images(12)
    arguments = {"max_new_tokens": 14, "output_scores": True, "return_dict_in_generate": True, **options}
    torch.manual_seed(7)
    theirs = eager.generate(pixel_values=images, **arguments)
    torch.manual_seed(7)
    ours = generate(fast, pixel_values=images, **arguments)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), rtol=1e-4, atol=1e-4)
    if "sequences_scores" in theirs:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.beam_indices, theirs.beam_indices)


@pytest.mark.parametrize(
    "options", [{"num_beams": 1}, {"num_beams": 5, "length_penalty": 0.0}], ids=["greedy", "beam 5"]
)
def test_hundreds_of_captions_are_identical(options):
    captions, ends = set(), set()
    for seed in range(10):
        eager, fast = eager_and_fast(seed=seed)
        # Random weights hardly ever say [SEP]: a longer embedding gives captions of all lengths.
        for model in (eager, fast):
            model.text_decoder.bert.embeddings.word_embeddings.weight.data[SEP] *= 3
        images = random_images(30, seed)
        theirs = eager.generate(pixel_values=images, max_new_tokens=12, **options)
        ours = generate(fast, pixel_values=images, max_new_tokens=12, **options)
        assert torch.equal(ours, theirs)
        captions |= {tuple(caption) for caption in theirs.tolist()}
        ends |= {caption.index(SEP) for caption in theirs.tolist() if SEP in caption}
    assert len(captions) > 150
    assert len(ends) > 8


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}], ids=["greedy", "beam 4"])
def test_prompts_of_different_lengths(options):
    eager, fast = eager_and_fast()
    prompts = torch.randint(4, START, (6, 5), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(prompts)
    for row in range(4):
        attention_mask[row, :row] = 0  # padding on the left
    arguments = {"pixel_values": random_images(6), "attention_mask": attention_mask, "max_new_tokens": 10, **options}
    theirs = eager.generate(input_ids=prompts.clone(), **arguments)
    before = prompts.clone()
    ours = generate(fast, input_ids=prompts, **arguments)
    assert torch.equal(ours, theirs)
    assert torch.equal(prompts, before)
    assert torch.equal(ours[:, 1:4], prompts[:, 1:4])


def test_one_encoding_serves_several_decodings():
    eager, fast = eager_and_fast()
    images = random_images(5)
    embeds = encode_images(fast, images)
    assert embeds.shape == (5, 17, 48)
    for options in ({}, {"num_beams": 5, "num_return_sequences": 5}):
        theirs = eager.generate(pixel_values=images, max_new_tokens=8, **options)
        assert torch.equal(generate(fast, pixel_values=embeds, max_new_tokens=8, **options), theirs)


def test_the_cache_holds_each_image_once():
    _, fast = eager_and_fast()
    output = generate(fast, pixel_values=random_images(3), num_beams=5, max_new_tokens=6, return_dict_in_generate=True)
    cache = output.cache if "cache" in output else output.past_key_values  # before transformers 5.24
    assert len(cache.cross_attention_cache.layers[0].keys) == 3
    assert len(cache.self_attention_cache.layers[0].keys) == 15


def test_eager_attention_takes_encoded_images_too():
    eager = tiny_blip()
    images = random_images(4)
    theirs = eager.generate(pixel_values=images, num_beams=3, max_new_tokens=8)
    model = use_fast_attention(tiny_blip(), False)
    ours = generate(model, pixel_values=encode_images(model, images), num_beams=3, max_new_tokens=8)
    assert torch.equal(ours, theirs)


def test_bfloat16_beams_are_the_ones_of_float32_almost_always():
    """bfloat16 tolerance: token agreement with float32 is no lower than eager bfloat16's, less 5 points."""
    eager, fast = eager_and_fast()
    images = random_images(64)
    exact = eager.generate(pixel_values=images, num_beams=3, min_new_tokens=8, max_new_tokens=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = eager.generate(pixel_values=images, num_beams=3, min_new_tokens=8, max_new_tokens=8)
        ours = generate(fast, pixel_values=images, num_beams=3, min_new_tokens=8, max_new_tokens=8)
    agreement = {"eager": (theirs == exact).float().mean(), "fast": (ours == exact).float().mean()}
    assert agreement["fast"] >= agreement["eager"] - 0.05


def test_attention_maps_are_refused_with_the_way_to_get_them():
    _, fast = eager_and_fast()
    with pytest.raises(ValueError, match="use_fast_attention"):
        generate(fast, pixel_values=random_images(1), output_attentions=True, return_dict_in_generate=True)


def test_eager_attention_still_gives_its_maps():
    model = use_fast_attention(use_fast_attention(tiny_blip()), False)
    output = generate(
        model,
        pixel_values=random_images(2),
        max_new_tokens=4,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert output.attentions[0][0].shape[:2] == (2, 4)  # images, heads


@pytest.mark.parametrize("options", [{}, {"num_beams": 5}], ids=["greedy", "beam 5"])
def test_real_photos_get_identical_captions(test_data, options):
    eager, fast = eager_and_fast()
    photos = real_photos(test_data, 100)
    theirs = eager.generate(pixel_values=photos, max_new_tokens=12, **options)
    assert torch.equal(generate(fast, pixel_values=photos, max_new_tokens=12, **options), theirs)
    assert len({tuple(caption) for caption in theirs.tolist()}) > 50


SETTINGS = {"beams": {"num_beams": 3}, "samples": {"num_beams": 1, "do_sample": True, "num_return_sequences": 3}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("prompt", ["", "a picture of"])
def test_a_loaded_captioner_says_what_the_library_says(settings, prompt, tmp_path):
    """The whole way from a folder to tokens, against an untouched model of the installed release."""
    folder = tiny.build_folder(tmp_path)
    ours = Captioner.from_pretrained(
        folder, device="cpu", bf16=False, prompt=prompt, max_new_tokens=9, min_new_tokens=4, **settings
    )
    library = BlipForConditionalGeneration.from_pretrained(folder).eval()
    for model in (ours.model, library):  # as sure of its words as a trained one
        for weight in model.text_decoder.parameters():
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel()))
    noise = torch.randint(0, 256, (5, 40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [{"image": Image.fromarray(pixels.numpy()), "image_id": str(i)} for i, pixels in enumerate(noise)]
    batch = ours.collator(pictures)
    torch.manual_seed(3)
    tokens = ours.generate_tokens(batch)
    before = batch["input_ids"]
    torch.manual_seed(3)
    theirs = library.generate(
        pixel_values=batch["pixel_values"],
        input_ids=torch.nn.functional.pad(before, (0, 1), value=ours.collator.end),
        **ours.settings,
    )
    assert torch.equal(tokens, theirs[:, -tokens.shape[1] :])
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    times = len(tokens) // len(before)
    if times > 1:  # their log-probabilities, as SCST and DiCO take them
        grouped = ours.training_batch(batch, ours.rows(tokens))
        inputs = {name: grouped[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        found = ours.model(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].repeat_interleave(times, dim=0)
        torch.testing.assert_close(found, library(**inputs).logits, rtol=1e-4, atol=1e-4)
