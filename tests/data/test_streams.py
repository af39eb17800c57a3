"""A stream gives every row once per pass, in any number of workers and processes that share it."""

import io
import shutil
import tarfile
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from random_trees import picture
from small_run import CAPTIONS

import data
from data import DataError

NUMBER = 40
WORDS = [caption for captions in CAPTIONS.values() for caption in captions]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(numbers) -> dict:
    images = [{"bytes": picture(number, "png"), "path": f"{number}.png"} for number in numbers]
    return {"image": images, "caption": [WORDS[number % len(WORDS)] for number in numbers]}


def write(folder, kind: str):
    shards = [range(start, start + NUMBER // 4) for start in range(0, NUMBER, NUMBER // 4)]
    if kind == "saved":
        features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
        table = datasets.Dataset.from_dict(rows(range(NUMBER)), features=features)
        datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(str(folder / "set"))
        return folder / "set"
    for place, numbers in enumerate(shards):
        if kind == "parquet":
            pq.write_table(pa.table(rows(numbers)), folder / f"train-{place}.parquet")
            continue
        with tarfile.open(folder / f"train-{place}.tar", "w") as archive:
            for number, image, caption in zip(numbers, *rows(numbers).values(), strict=True):
                for ending, content in (("png", image["bytes"]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    if kind == "parquet":
        pq.write_table(pa.table(rows([NUMBER])), folder / "validation.parquet")
    else:
        shutil.copy(folder / "train-0.tar", folder / "validation.tar")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "tar", "saved"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_each_row_is_seen_once_per_pass(kind, processes, workers, tmp_path):
    stream = data.load(str(write(tmp_path, kind)), streaming=True)["train"]
    orders = []
    for epoch in range(2):
        seen = Counter()
        for rank in range(processes):
            pairs = data.CaptionStream(split_dataset_by_node(stream, rank, processes), 1, seed=3, buffer_size=10)
            pairs.set_epoch(epoch)
            loader = torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=workers)
            seen.update(row["image_id"] for row in loader)
        assert len(seen) == NUMBER
        assert set(seen.values()) == {1}
        orders.append(list(seen))
    assert orders[0] != orders[1]


def test_a_stream_has_the_splits_of_a_set_that_is_loaded(tmp_path):
    pq.write_table(pa.table(rows(range(200))), tmp_path / "all.parquet")
    for shares in (None, "0.5,0.3,0.2"):
        loaded, streamed = (data.load(str(tmp_path), streaming=s, split_shares=shares) for s in (False, True))
        for split in loaded:
            assert {row["image_id"] for row in streamed[split]} == set(loaded[split]["image_id"])
    for number in range(30):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number, "png"))
    paths = [{"path": str(tmp_path / "photos" / f"{number}.png"), "bytes": None} for number in range(30)]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": paths, "caption": WORDS[:1] * 30}, features=features)
    table.save_to_disk(str(tmp_path / "paths"))
    loaded, streamed = (data.load(str(tmp_path / "paths"), streaming=s, split_shares=shares) for s in (False, True))
    for split in loaded:
        assert {row["image_id"] for row in streamed[split]} == set(loaded[split]["image_id"])
    with pytest.raises(DataError, match="a stream does not know its groups beforehand"):
        data.load(str(tmp_path), streaming=True, group_column="caption")
