"""Images become pixel values as the processor would make them, only sooner; and memory that runs out."""

import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import BlipImageProcessor, CLIPImageProcessor

import data
from arguments import TrainArguments
from captioner import Captioner
from collator import CaptionCollator, ImageCollator, Pixels
from objectives import CrossEntropy
from training.trainer import CaptionTrainer


def noise(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 32, "width": 48}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"size": {"height": 32, "width": 32}, "do_normalize": False, "resample": 2},
        {"size": {"height": 32, "width": 32}, "do_rescale": False},
    ],
)
def test_pixel_values_are_the_processors_own_to_the_bit(settings):
    processor = BlipImageProcessor(**settings)
    if processor.backend != "pil":
        pytest.skip("torchvision is installed: its resize differs from Pillow's, which ours is")
    images = [
        noise(90, 60),
        noise(40, 77),
        noise(processor.size["width"], processor.size["height"]),
        Image.new("RGB", (1, 1), "red"),
    ]
    ours = Pixels(processor)
    assert ours.size is not None
    assert ours(images).equal(processor(images=images, return_tensors="pt")["pixel_values"].float())


def test_pixel_values_of_photos_are_the_processors_own(test_data):
    paths = sorted((test_data / "flickr8k" / "Flicker8k_Dataset").glob("*.jpg"))[:40]
    processor, images = BlipImageProcessor(), [data.open_image(path) for path in paths]
    if processor.backend != "pil":
        pytest.skip("torchvision is installed: its resize differs from Pillow's, which ours is")
    assert Pixels(processor)(images).equal(processor(images=images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("kind", [BlipImageProcessor, CLIPImageProcessor])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 32}},
    ],
)
def test_a_processor_that_does_more_is_left_to_do_it(settings, kind):
    processor = kind(**{"size": {"height": 32, "width": 32}, **settings})
    ours, image = Pixels(processor), noise(40, 40)
    assert ours.size is None
    assert ours([image]).equal(processor(images=[image], return_tensors="pt")["pixel_values"])


def test_fast_jpeg_keeps_pixels_within_its_tolerance():
    file = io.BytesIO()
    noise(1600, 1200).save(file, "JPEG", quality=90)
    processor = BlipImageProcessor(size={"height": 96, "width": 96})
    exact, fast = Pixels(processor), Pixels(processor, fast_jpeg=True)
    reduced = fast.open(file.getvalue())
    exact, fast = exact([exact.open(file.getvalue())]), fast([reduced])
    steps = (exact - fast).abs() * torch.tensor(processor.image_std).view(3, 1, 1) * 255
    assert reduced.size == (400, 300)
    assert 0 < steps.mean() < 2


def test_a_batch_is_the_same_on_several_threads(tmp_path):
    model, processor = tiny.build(tmp_path)
    samples = [{"image": noise(50 + i, 40), "image_id": str(i)} for i in range(9)]
    samples[4]["image"] = b"no image"
    batches = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        batches.append(ImageCollator(processor, model.config, skip_bad_images=True)(samples))
    torch.set_num_threads(before)
    assert batches[0]["pixel_values"].equal(batches[1]["pixel_values"])
    assert [list(batch["errors"]) for batch in batches] == [[4], [4]]
    assert batches[0]["image_ids"] == batches[1]["image_ids"]


class FailsOnce(CrossEntropy):
    """Runs out of memory in the first step of any batch of more than two images."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __call__(self, model, batch, num_items_in_batch=None):
        self.sizes.append(len(batch["pixel_values"]))
        if self.sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(model, batch, num_items_in_batch)


def test_auto_find_batch_size_goes_on_with_a_smaller_batch(tmp_path):
    captions = {f"photo{i}": ["a red ball.", "a dog runs."] for i in range(8)}
    records = data.load(tiny.write_photos(tmp_path / "photos", captions, dict.fromkeys(captions, "train")))["train"]
    model, processor = tiny.build(tmp_path)
    args = TrainArguments(
        output_dir=str(tmp_path / "out"), auto_find_batch_size=True, per_device_train_batch_size=4, num_train_epochs=1,
        gradient_accumulation_steps=1, gradient_checkpointing=False, eval_strategy="no", save_strategy="no",
        report_to=[], logging_steps=1,
    )  # fmt: skip
    objective = FailsOnce()
    trainer = CaptionTrainer(
        model=model, args=args, processing_class=processor, objective=objective,
        captioner=Captioner(model, processor), data_collator=CaptionCollator(processor, model.config),
        train_dataset=data.CaptionPairs(records, 2),
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer.train()
    trained = [size for size in objective.sizes if size <= 2]
    assert max(objective.sizes) == 4
    assert sum(trained) == len(records)
    assert trainer.state.global_step == len(trained)
    assert any(not weight.equal(before[name]) for name, weight in model.state_dict().items())
