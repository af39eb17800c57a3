"""Every row of a stream once per pass, in an order that only the seed decides, whatever reads it."""

import io
import itertools
import tarfile
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from PIL import Image

import data
from common.errors import DataError
from training.streams import AsTheyCome, StreamBatches

ROWS = 22  # and two captions of every third one


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captions_of(number: int) -> list[str]:
    return [f"caption {number}.{part}" for part in range(2 if number % 3 == 0 else 1)]


ALL = sorted((f"{number:03d}.png", text) for number in range(ROWS) for text in captions_of(number))


def table(numbers) -> datasets.Dataset:
    images = [{"bytes": picture(number), "path": f"{number:03d}.png"} for number in numbers]
    return datasets.Dataset.from_dict({"image": images, "captions": [captions_of(number) for number in numbers]})


def write_parquet(folder, shards: int):
    for shard in range(shards):
        table(range(shard, ROWS, shards)).to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    table([100]).to_parquet(folder / "validation-00000-of-00001.parquet")


def write_saved(folder, shards: int):
    splits = datasets.DatasetDict({"train": table(range(ROWS)), "validation": table([100])})
    splits.save_to_disk(folder, num_shards={"train": shards, "validation": 1})


def write_tars(folder, shards: int):
    for shard in range(shards):
        write_tar(folder / f"train-{shard}.tar", range(shard, ROWS, shards))
    write_tar(folder / "validation-0.tar", [100])


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            text = "{" + f'"captions": {captions_of(number)}'.replace("'", '"') + "}"
            for name, content in ((f"{number:03d}.png", picture(number)), (f"{number:03d}.json", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


FORMATS = {"parquet": write_parquet, "tars": write_tars, "saved": write_saved}


@pytest.fixture(params=[(name, shards) for name in FORMATS for shards in (1, 5)], ids=lambda p: f"{p[0]} {p[1]}")
def records(request, tmp_path):
    name, shards = request.param
    FORMATS[name](tmp_path, shards)
    return data.load(str(tmp_path), streaming=True)["train"]


def pairs(samples) -> list[tuple[str, str]]:
    return [(sample["image_id"], text) for sample in samples for text in sample["captions"]]


def loader(stream, rank=0, processes=1, workers=0, batch_size=4):
    args = SimpleNamespace(process_index=rank, world_size=processes)
    batches = StreamBatches(stream, args, batch_size)
    return torch.utils.data.DataLoader(AsTheyCome(), batch_sampler=batches, collate_fn=list, num_workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_processes_see_one_sequence_with_each_row_once_a_pass(records):
    expected = list(itertools.islice(data.CaptionStream(records, 1, seed=3, buffer_size=5).passes(), 3 * len(ALL)))
    for epoch in range(3):
        of_pass = expected[epoch * len(ALL) : (epoch + 1) * len(ALL)]
        assert sorted(pairs(of_pass)) == ALL
        assert {sample["epoch"] for sample in of_pass} == {epoch}
    for processes, workers in itertools.product((1, 2), (0, 1, 2, 4)):
        batch_size = 8 // processes
        batches = []
        for rank in range(processes):
            stream = data.CaptionStream(records, 1, seed=3, buffer_size=5)
            own = loader(stream, rank, processes, workers, batch_size)
            batches.append(list(itertools.islice(own, len(expected) // 8)))
        together = [sample for step in zip(*batches, strict=True) for batch in step for sample in batch]
        assert together == expected[: len(together)], (processes, workers)


def test_the_order_is_a_function_of_seed_and_pass(records):
    def orders(seed):
        passes = pairs(itertools.islice(data.CaptionStream(records, 1, seed, buffer_size=5).passes(), 2 * len(ALL)))
        return passes[: len(ALL)], passes[len(ALL) :]

    first, second = orders(3)
    assert first != second
    assert orders(3) == (first, second)
    assert orders(4)[0] != first


def test_batches_that_are_skipped_are_not_collated(records):
    collated = Counter()

    def collate(samples):
        collated.update(sample["epoch"] for sample in samples)
        return pairs(samples)

    stream = data.CaptionStream(records, 1, seed=3, buffer_size=5)
    whole = list(itertools.islice(loader(stream), 20))
    plain = loader(stream)
    plain.collate_fn = collate
    rest = list(itertools.islice(skip_first_batches(plain, 15), 5))  # in the third pass
    assert rest == [pairs(batch) for batch in whole[15:]]
    assert sum(collated.values()) == 5 * 4
    assert set(collated) == {2}


def test_captions_that_share_an_image_are_samples_of_up_to_their_number(records):
    samples = list(data.CaptionStream(records, 2, seed=3, buffer_size=5))
    assert sorted(pairs(samples)) == ALL
    assert len(samples) == ROWS


def test_an_empty_stream_is_an_error(tmp_path):
    write_parquet(tmp_path, 1)
    records = data.load(str(tmp_path), streaming=True)["train"].filter(lambda row: False)
    with pytest.raises(DataError, match="no captioned image"):
        next(data.CaptionStream(records, 1, seed=3).passes())


def test_passes_are_counted_from_the_end_of_the_first(tmp_path):
    write_parquet(tmp_path, 2)
    stream = data.CaptionStream(data.load(str(tmp_path), streaming=True)["train"], 1, seed=3)
    list(itertools.islice(stream.passes(), len(ALL) + 1))
    assert stream.starts == [0, len(ALL)]
    assert stream.passes_in(len(ALL) - 1) is None
    assert stream.passes_in(len(ALL) * 3) == 3
