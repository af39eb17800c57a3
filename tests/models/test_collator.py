"""The batch is the model's: labels, start token, masking, and a model that learns from it and gives it back."""

import copy

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import data
from captioner import Captioner
from collator import CaptionCollator, ImageCollator
from data import Augmentation, TextAugmentation
from objectives import CrossEntropy, caption_loss

WORDS = [
    "a dog runs on the grass", "two men in the water", "a woman sits on a ball", "the red circle", "a child jumps",
    "a cat near the road", "three dogs under a star", "the small blue square", "a man and a woman", "a large yellow ball",
]  # fmt: skip


def samples(captions=WORDS):
    """One noise picture a caption (or group of captions)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, caption in enumerate(captions):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
        group = [caption] if isinstance(caption, str) else caption
        found.append({"image": image, "image_id": str(number), "captions": group, "epoch": 0})
    return found


@pytest.fixture
def model_and_processor(tmp_path):
    return tiny.build(tmp_path)


def test_the_labels_of_a_batch_are_exact(model_and_processor):
    model, processor = model_and_processor
    ids = processor.tokenizer.convert_tokens_to_ids
    batch = CaptionCollator(processor, model.config, prompt="a picture of ")(
        samples(["a dog runs", "a cat sits on the grass"])
    )
    dec, sep, pad = ids("[DEC]"), ids("[SEP]"), ids("[PAD]")
    prompt = ids(["a", "picture", "of"])
    assert batch["input_ids"].tolist() == [
        [dec, *prompt, *ids(["a", "dog", "runs"]), sep, pad, pad, pad],
        [dec, *prompt, *ids(["a", "cat", "sits", "on", "the", "grass"]), sep],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8 + [0] * 3, [1] * 11]
    assert batch["labels"].tolist() == [
        [-100] * 4 + [*ids(["a", "dog", "runs"]), sep] + [-100] * 3,
        [-100] * 4 + [*ids(["a", "cat", "sits", "on", "the", "grass"]), sep],
    ]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)


def test_the_docstring_shows_a_real_row(test_data, tmp_path):
    """The ids in CaptionCollator's docstring are those of BLIP's own vocabulary."""
    from models.loading import build_model

    vocabulary = test_data / "bert-base-uncased" / "vocab.txt"
    model, processor = build_model(str(tiny.write_config(tmp_path)), str(vocabulary), [])
    collator = CaptionCollator(processor, model.config, prompt="a picture of ")
    batch = collator.token_tensors([["a dog runs"], ["a dog runs fast"]])
    for name in ("input_ids", "attention_mask", "labels"):
        row = next(line for line in CaptionCollator.__doc__.splitlines() if line.split()[:1] == [name])
        assert batch[name][0].tolist() == [int(word) for word in row.split()[1:]]


def test_captions_of_an_image_share_its_pixels_and_missing_ones_have_no_label(model_and_processor):
    model, processor = model_and_processor
    batch = CaptionCollator(processor, model.config)(samples([["a dog", "the dog runs"], ["a cat"]]))
    assert batch["pixel_values"].shape[0] == 2
    assert batch["input_ids"].shape[0] == 4
    assert batch["labels"][3].eq(-100).all()
    assert batch["labels"][:3].ne(-100).any(dim=1).all()


def test_a_caption_that_is_cut_has_no_end(model_and_processor):
    model, processor = model_and_processor
    batch = CaptionCollator(processor, model.config, max_txt_len=5).token_tensors(
        [["a dog runs on the grass"], ["a dog"]]
    )
    assert batch["input_ids"].shape[1] == 5
    sep = processor.tokenizer.sep_token_id
    assert sep not in batch["labels"][0]
    assert sep in batch["labels"][1]


def test_a_batch_to_caption_has_no_caption_in_it(model_and_processor):
    model, processor = model_and_processor
    batch = ImageCollator(processor, model.config)(samples())
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids", "errors"}
    assert batch["input_ids"].tolist() == [[model.config.text_config.bos_token_id]] * 10
    assert not any(word in str(batch["image_ids"]) for word in ("dog", "cat"))


def test_generation_sees_the_start_token_and_the_prompt_and_nothing_else(model_and_processor, monkeypatch):
    model, processor = model_and_processor
    seen = []
    forward = model.text_decoder.generate

    def record(*args, **kwargs):
        seen.append(kwargs["input_ids"].clone())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.text_decoder, "generate", record)
    start = model.config.text_config.bos_token_id
    Captioner(model, processor).caption_batch(ImageCollator(processor, model.config)(samples()))
    Captioner(model, processor, prompt="a picture of ").caption_batch(
        ImageCollator(processor, model.config, prompt="a picture of ")(samples())
    )
    prompt = processor.tokenizer("a picture of", add_special_tokens=False)["input_ids"]
    assert seen[0].tolist() == [[start]] * 10
    assert seen[1].tolist() == [[start, *prompt]] * 10


def fit(model, batch, steps=250):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = CrossEntropy()(model, batch)["loss"]
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_ten_pairs_are_memorised_and_given_back(model_and_processor, prompt):
    model, processor = model_and_processor
    fit(model, CaptionCollator(processor, model.config, prompt=prompt)(samples()))
    # With early stopping, five short captions of other images can end the search before the one right caption ends.
    captioner = Captioner(model, processor, prompt=prompt, early_stopping=False)
    assert captioner([sample["image"] for sample in samples()]) == WORDS
    kept = Captioner(model, processor, prompt=prompt, keep_prompt=True, num_beams=1)([samples()[0]["image"]])
    assert kept == [prompt + WORDS[0]]
    one_at_a_time = [captioner([sample["image"]])[0] for sample in samples()]
    assert one_at_a_time == WORDS


def test_the_loss_is_the_librarys_where_they_mean_the_same(model_and_processor):
    """Equal to the model's own loss (eager, unsmoothed), whose labels it shifts itself."""
    model, processor = model_and_processor
    batch = CaptionCollator(processor, model.config)(samples())
    assert model.config.text_config.label_smoothing == 0
    with torch.no_grad():
        assert caption_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_label_smoothing_is_torchs(model_and_processor):
    model, processor = model_and_processor
    batch = CaptionCollator(processor, model.config)(samples())
    with torch.no_grad():
        logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
        )
        assert CrossEntropy(0.1)(model, batch)["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)


def gradients(model, processor, groups):
    """Gradients after micro-batches `groups`, each loss divided by the targets of all."""
    model.zero_grad()
    batches = [CaptionCollator(processor, model.config)(group) for group in groups]
    targets = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches)
    losses = [CrossEntropy()(model, batch, targets)["loss"] for batch in batches]
    sum(losses).backward()
    return sum(losses).item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_four_by_one_and_two_by_two_accumulation_are_the_same(model_and_processor):
    model, processor = model_and_processor
    four = samples(WORDS[:4])
    loss, one = gradients(model, processor, [four])
    for groups in ([four[:2], four[2:]], [[sample] for sample in four]):
        other_loss, other = gradients(model, processor, groups)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert all(one[name].allclose(other[name], atol=1e-6) for name in one)


def test_grouped_captions_have_the_loss_and_gradients_of_single_pairs(model_and_processor):
    model, processor = model_and_processor
    grouped = samples([WORDS[:3], WORDS[3:5]])
    single = [{**sample, "captions": [caption]} for sample in grouped for caption in sample["captions"]]
    loss, one = gradients(model, processor, [grouped])
    other_loss, other = gradients(model, processor, [single])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert all(one[name].allclose(other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_moves_and_no_other(model_and_processor, frozen):
    model, processor = model_and_processor
    model.vision_model.requires_grad_(not frozen)
    before = copy.deepcopy(model.state_dict())
    fit(model, CaptionCollator(processor, model.config)(samples()), steps=3)
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted - moved == set()
    assert moved <= wanted
    assert any(name.startswith("vision_model") for name in moved) != frozen


def test_each_epoch_and_image_is_augmented_anew_and_the_same_one_alike(model_and_processor):
    model, processor = model_and_processor
    augmentations = {
        "augmentation": Augmentation(["random_resized_crop:0.5:1.0"], (32, 32)),
        "text_augmentation": TextAugmentation(["synonym:0.5"]),
    }
    collate = CaptionCollator(processor, model.config, **augmentations)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    caption = "a small dog jumps near the large sofa and the little kid"

    def drawn(epoch, image_id):
        sample = {"image": Image.fromarray(pixels), "image_id": image_id, "epoch": epoch, "captions": [caption]}
        batch = collate([sample])
        return batch["pixel_values"].numpy().tobytes(), batch["labels"].numpy().tobytes()

    draws = {(epoch, image_id): drawn(epoch, image_id) for epoch in range(6) for image_id in "ab"}
    assert len({picture for picture, _ in draws.values()}) == 12
    assert len({text for _, text in draws.values()}) > 3
    assert all(drawn(*key) == before for key, before in draws.items())
    plain = collate.for_evaluation()
    batches = [
        plain([{"image": Image.fromarray(pixels), "image_id": "a", "epoch": e, "captions": [caption]}]) for e in (0, 1)
    ]
    assert batches[0]["pixel_values"].equal(batches[1]["pixel_values"])


def test_a_prompt_that_fills_the_caption_is_refused(model_and_processor):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match="leaves no room"):
        CaptionCollator(processor, model.config, max_txt_len=4, prompt="a picture of ")
    with pytest.raises(ValueError, match="leaves no room"):  # for the end alone
        CaptionCollator(processor, model.config, max_txt_len=5, prompt="a picture of ")
    collate = CaptionCollator(processor, model.config, max_txt_len=6, prompt="a picture of ")
    assert (collate(samples(["dog"]))["labels"] != -100).sum() == 2


def test_images_are_decoded_whole_and_corrupted_by_their_ids(model_and_processor):
    model, processor = model_and_processor
    assert CaptionCollator(processor, model.config).images.pixels.decoded_size is None
    corruption, sample = data.corruption(["gaussian_noise:40"]), samples()[0]
    expected = ImageCollator(processor, model.config)([sample | {"image": corruption(sample["image"], 0, "0")}])
    found = ImageCollator(processor, model.config, corruption=corruption)([sample])
    assert found["pixel_values"].equal(expected["pixel_values"])


def test_after_a_prompts_word_a_caption_is_tokenized_as_inside_a_sentence():
    """Byte-level BPE has another token for a word after a space."""
    model, processor = families.build("blip2-opt")
    prompt, tokenizer = "a picture of", processor.tokenizer
    ids = CaptionCollator(processor, model.config, prompt=prompt).images.target_ids(["a dog runs"])
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert before + ids[0][:-1] == tokenizer("a picture of a dog runs", add_special_tokens=False)["input_ids"]
    assert ids != CaptionCollator(processor, model.config).images.target_ids(["a dog runs"])


def test_the_limit_counts_the_caption_and_its_end_in_a_chat():
    model, processor = families.build("llava")
    batch = CaptionCollator(processor, model.config, max_txt_len=4)(samples(["a dog runs on the grass"]))
    assert (batch["labels"] != -100).sum() == 4


def test_words_of_a_caption_see_the_image_tiles_that_the_prompt_sees():
    """In Mllama's cross-attention mask each word of a caption has the row of the prompt's last token."""
    model, processor = families.build("mllama")
    batch = CaptionCollator(processor, model.config)(samples(["a dog runs", "a cat"]))
    mask, length = batch["cross_attention_mask"], batch["prompt_length"]
    assert mask.shape[:2] == batch["input_ids"].shape
    assert mask.shape[1] > length
    assert mask[:, length:].equal(mask[:, length - 1 : length].expand_as(mask[:, length:]))
