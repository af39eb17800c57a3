"""infer.py's outputs: each caption lands on its own image, under a name that finds the image again, in every form; and what
changed since is captioned again.

The witness is a captioner that names the colour of an image, so that a caption at another image shows. It stands in for the
model in the property tests; the tests at the end train a small one.
"""

import errno
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import types
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from captioning import writers
from common.errors import UserError
from common.text import Caption
from data.formats import webdataset
from data.images import open_image
from jobs import progress

infer = importlib.import_module("infer")
TABLES = ("o.jsonl", "o.csv", "o.parquet", "folder")
FORMS = (*TABLES, "o.json", "o.tar", "metadata.jsonl", "metadata.csv", "txt", "texts")


class Colours:
    """Stands in for a captioner: says an image's colour, and remembers how many it has said."""

    all_said = 0  # by all of them
    cut = 0  # of captions that are cut at the limit

    def __init__(self):
        self.said = 0

    def count_anew(self):
        """Nothing is ever cut, so there is nothing to count or to say."""

    say_cut = count_anew

    def counts(self) -> dict:
        return {"cut": 0}

    def stream(self, rows, *, batch_size, num_workers, skip_bad_images):
        for record in torch_loader(rows, num_workers):
            self.said += 1
            Colours.all_said += 1
            yield record["image_id"], [Caption(colour(record["image"]), cut=False)]


def torch_loader(rows, num_workers):
    import torch

    return torch.utils.data.DataLoader(rows, batch_size=None, num_workers=num_workers)


def colour(image) -> str:
    return "colour " + bytes(np.asarray(open_image(image))[0, 0]).hex()


def png(number: int) -> bytes:
    """An image of a colour of its own."""
    content = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256 % 256, 77)).save(content, "PNG")
    return content.getvalue()


def caption(paths, output, form=None, **flags) -> Colours:
    """What infer.py does, with the witness in place of a model."""
    captioner = Colours()
    args = types.SimpleNamespace(
        output=output and str(output), output_format=form, shard_size=None, per_device_eval_batch_size=2,
        dataloader_num_workers=0, skip_bad_images=False, engine="local", image_dir=None, image_column=None,
        dataset_config_name=None, data_format="auto", workers=None, strip=[], prefix="", suffix="", only=None,
    )  # fmt: skip
    vars(args).update(flags)
    paths = [str(path) for path in paths]
    form = writers.form_of(args.output, form)
    load = lambda: (captioner, {"model": str(Path(__file__).parent), "revision": None})  # noqa: E731
    if form == "txt":
        rows = lambda: infer.image_rows(paths, infer.options(args))  # noqa: E731
        texts = infer.plan_texts(rows, args)
        infer.write_texts(load(), rows, texts, args, (0, 1))
    else:
        assert infer.write_output(load, args, form, paths, (0, 1)) == []
    return captioner


# ---------------------------------------------------------------- random trees

STEMS = (
    "x",
    "X",
    "a.b",
    "a_b",
    "a b",
    "a-2",
    "a#1",
    "é",
    "e\u0301",
    "ß",
    "ss",
    "__x",
    "_x",
    "x.jpg",
    "1",
    "000000000001",
    "h",
)
ENDINGS = (".jpg", ".png", ".PNG", ".jpeg", ".webp", "", ".dat", ".txt")
FOLDERS = ("", "", "d", "D", "d.e", "d e/#f", "é é/x.png.d")


def tree(root: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """(folders to caption, images in them): names as people have them, with equal stems, endings, cases and folders."""
    draw, number = random.Random(seed), seed * 1000
    roots, images = [root / f"in{n}" for n in range(draw.choice((1, 1, 2)))], []
    for folder in roots:
        names = {draw.choice(STEMS) + draw.choice(ENDINGS) for _ in range(draw.randint(1, 7))}
        for name in sorted(names):
            path = folder / draw.choice(FOLDERS) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if images and draw.random() < 0.1:
                os.symlink(draw.choice(images), path)
            else:
                path.write_bytes(png(number := number + 1))
            images.append(path)
    return roots, images


def read_table(output: Path) -> dict[str, str]:
    if output.suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    else:
        read = pandas.read_csv if output.suffix == ".csv" else pandas.read_parquet
        rows = read(output).to_dict("records")
    captions = {row["image"]: row["caption"] for row in rows}
    assert len(captions) == len(rows)
    return captions


def read_tar(output: Path) -> Counter:
    """Captions of the samples, each compared with its image, as tarfile and our own reader have them."""
    samples: dict[str, dict] = {}
    with tarfile.open(output) as archive:
        for member in archive:
            key, _, ending = member.name.rpartition("/")[2].partition(".")
            sample = samples.setdefault(f"{member.name.rpartition('/')[0]}/{key}", {})
            assert ending not in sample, member.name
            sample[ending] = archive.extractfile(member).read()
    for sample in samples.values():
        (image,) = (content for ending, content in sample.items() if ending not in ("txt", "json"))
        assert colour(image) == sample["txt"].decode() == json.loads(sample["json"])["caption"]
    ours = list(webdataset.samples(str(output)))
    assert all([colour(sample["image"])] == sample["captions"] for sample in ours)
    assert len(ours) == len(samples)
    return Counter(sample["txt"].decode() for sample in samples.values())


def find_text(image: Path) -> Path:
    whole_name = image.with_name(f"{image.name}.txt")
    return whole_name if whole_name.exists() else Path(os.path.splitext(image)[0] + ".txt")


def check(form: str, roots: list[Path], images: list[Path], place: Path, theirs: bool) -> None:
    """Each image's caption is its own, and is found by the image's name. `theirs`: as `datasets` reads it, too."""
    output = place / form
    if form in ("txt", "texts"):
        copies = [output / image.relative_to(root) for root in roots for image in images if root in image.parents]
        texts = [find_text(image) for image in (images if form == "txt" else copies)]
        assert len({*texts, *images}) == 2 * len(images)
        assert [text.read_text().strip() for text in texts] == [colour(image) for image in images]
    elif form in TABLES:
        assert read_table(output) == {str(image): colour(image) for image in images}
    elif form == "o.json":
        ids = {entry["image_id"]: entry["caption"] for entry in json.loads(output.read_text())}
        assert len(ids) == len(images)
        for image in images:
            (caption_of,) = {
                ids[name] for name in (str(image), image.name, 1) if name in ids and (name != 1 or "0001" in image.name)
            }
            assert caption_of == colour(image)
    elif form == "o.tar":
        assert read_tar(output) == Counter(map(colour, images))
        if theirs:
            loaded = datasets.load_dataset(
                "webdataset", data_files=str(output), split="train", cache_dir=str(place / "c")
            )
            (column,) = set(loaded.column_names) - {"txt", "json", "__key__", "__url__"}
            assert [colour(image) for image in loaded[column]] == loaded["txt"]
            assert Counter(loaded["txt"]) == Counter(map(colour, images))
    else:
        rows = pandas.read_json(output, lines=True) if form.endswith("l") else pandas.read_csv(output, dtype=str)
        assert {place / name: text for name, text in zip(rows.file_name, rows.caption, strict=True)} == {
            image: colour(image) for image in images
        }


def attempt(form: str, roots: list[Path], place: Path) -> bool:
    """Whether the run was not refused; a refusal comes before anything is captioned."""
    texts = form in ("txt", "texts")
    try:
        caption(roots, None if form == "txt" else place / form, "txt" if texts else None)
    except UserError:
        return False
    return True


def test_every_caption_lands_on_its_own_image_in_every_form(tmp_path):
    done = Counter()
    for seed in range(200):
        place = tmp_path / f"{seed}"
        roots, images = tree(place, seed)
        for form in random.Random(seed).sample(FORMS, 2):
            before = Colours.all_said
            if attempt(form, roots, place):
                check(form, roots, images, place, theirs=done[form] % 20 == 0)
                done[form] += 1
            else:
                assert Colours.all_said == before
                assert form in ("txt", "texts")
                done["refused"] += 1
            for text in [text for text in place.rglob("*.txt") if text not in images]:
                text.unlink()
        shutil.rmtree(place)
    assert min(done[form] for form in FORMS) > 20, done
    assert done["refused"] < 40, done


# ---------------------------------------------------------------- other sources than folders


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [form for form in FORMS if form != "txt"])
def test_images_inside_sources_of_equal_names_stay_apart(tmp_path, form):
    """Two tars with the same members, and two Parquet files whose images have one name, in row groups and shards of their
    own; two images of one are equal, and are one."""
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "0.tar", [(f"a b/{n}.png", png(10 * number + n)) for n in range(3)])
        contents = [png(100 + 10 * number + n) for n in (0, 1, 2, 3, 3)]
        rows = [
            {"bytes": content, "path": name}
            for content, name in zip(contents, ("i.png", "i.png", None, "i.png", "i.png"), strict=True)
        ]
        pq.write_table(pa.table({"image": rows}), tmp_path / folder / f"{number}.parquet", row_group_size=4)
    expected = Counter(colour(png(n)) for n in (0, 1, 2, 10, 11, 12, 100, 101, 102, 103, 110, 111, 112, 113))
    sources = [tmp_path / "a", tmp_path / "b"]
    tables = [*sources[0].glob("*.parquet"), *sources[1].glob("*.parquet")]
    tars = [tmp_path / "a/0.tar", tmp_path / "b/0.tar"]
    place = tmp_path / "out"
    place.mkdir()
    if form == "texts":
        with pytest.raises(UserError, match="another image has this name in its source"):
            caption([*tars, *tables], place / form, "txt")
        return
    caption([*tars, *tables], place / form, shard_size=3)
    if form == "folder":
        frame = pandas.read_parquet(place / form)
        assert len(set(frame.key)) == len(frame)
        assert Counter(frame.caption.unique()) == expected
    elif form in TABLES:
        assert Counter(read_table(place / form).values()) == expected
    elif form == "o.tar":
        assert read_tar(place / form) == expected
    elif form == "o.json":
        entries = json.loads((place / form).read_text())
        assert Counter(entry["caption"] for entry in entries) == expected
        assert len({entry["image_id"] for entry in entries}) == len(entries)
    else:
        rows = pandas.read_json(place / form, lines=True) if form.endswith("l") else pandas.read_csv(place / form)
        assert [colour(place / name) for name in rows.file_name] == list(rows.caption)
        assert Counter(rows.caption) == expected


def test_an_image_that_is_there_is_not_overwritten_by_a_copy(tmp_path):
    pack(tmp_path / "0.tar", [("x.png", png(1))])
    (tmp_path / "out/images/0.tar").mkdir(parents=True)
    (tmp_path / "out/images/0.tar/x.png").write_bytes(png(2))
    caption([tmp_path / "0.tar"], tmp_path / "out/metadata.jsonl")
    (row,) = map(json.loads, (tmp_path / "out/metadata.jsonl").read_text().splitlines())
    assert colour(tmp_path / "out" / row["file_name"]) == row["caption"] == colour(png(1))
    assert colour(tmp_path / "out/images/0.tar/x.png") == colour(png(2))


def test_what_has_no_name_in_the_output_is_refused_before_anything_is_captioned(tmp_path, monkeypatch):
    monkeypatch.setattr(Colours, "stream", None)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(1))
        pack(tmp_path / folder / "0.tar", [("x.png", png(1))])
    (tmp_path / "a/1").write_bytes(png(3))
    (tmp_path / "a/1.txt").write_bytes(png(3))
    with pytest.raises(UserError, match=r"0\.tar is the name of more than one tar"):
        caption([tmp_path / "a/0.tar", tmp_path / "b/0.tar"], tmp_path / "out", "tar")
    with pytest.raises(UserError, match="is not below"):
        caption([tmp_path / "a"], tmp_path / "b/metadata.csv")
    with pytest.raises(UserError, match="local folder of images"):
        caption([tmp_path / "a"], "memory://bucket/metadata.csv")
    with pytest.raises(UserError, match="another image has this name"):
        caption([tmp_path / "a/1.png", tmp_path / "b/1.png"], tmp_path / "out", "txt")
    with pytest.raises(UserError, match="is inside a source"):
        caption([tmp_path / "a/0.tar"], None, "txt")
    (tmp_path / "list.txt").write_text("gone.png")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        caption([tmp_path / "list.txt"], None, "txt")
    monkeypatch.setattr(Colours, "stream", None)
    with pytest.raises(UserError, match="in the place of another's text"):
        caption([tmp_path / "a"], None, "txt")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_captioned(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.png").write_bytes(png(1))
    photos.chmod(0o555)
    mounted = (
        os.access(photos, os.W_OK)
        and not subprocess.run(["mount", "--bind", photos, photos], capture_output=True).returncode
    )
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", photos], check=True)
    elif os.access(photos, os.W_OK):
        pytest.skip("for this user every folder can be written to")
    monkeypatch.setattr(Colours, "stream", None)
    try:
        with pytest.raises(UserError, match=r"photos cannot be written to.* --output FOLDER"):
            caption([photos], None, "txt")
        with pytest.raises(UserError, match="photos cannot be written to"):
            caption([photos], photos / "texts", "txt")
        monkeypatch.undo()
        assert caption([photos], tmp_path / "texts", "txt").said == 1
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", photos], check=True)
        photos.chmod(0o755)


# ---------------------------------------------------------------- what changed since


def numbers(output: Path) -> dict[str, str]:
    return {Path(name).name: text for name, text in read_table(output).items()}


def touch_later(path: Path, content: bytes) -> None:
    """Another content of the same size, and a time that differs, as any writing gives it."""
    path.write_bytes(content)
    os.utime(path, ns=(0, random.Random(content).randrange(2**60)))


def photos(folder: Path, *numbers_of: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers_of:
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


@pytest.mark.parametrize("form", ["o.jsonl", "folder"])
@pytest.mark.parametrize("source", ["folder", "list", "parquet"])
def test_what_changed_is_captioned_again_and_what_left_goes(tmp_path, form, source, caplog):
    folder, output = photos(tmp_path / "photos", 1, 2, 3, 4), tmp_path / "out" / form
    output.parent.mkdir()

    def listed(*names):
        if source == "folder":
            return folder
        paths = [f"photos/{name}.png" for name in names]
        if source == "list":
            (tmp_path / "list.txt").write_text("\n".join(paths))
            return tmp_path / "list.txt"
        pq.write_table(pa.table({"image": paths}), tmp_path / "list.parquet")
        return tmp_path / "list.parquet"

    def run(*names) -> int:
        caplog.clear()
        with caplog.at_level("INFO"):
            return caption([listed(*names)], output).said

    assert run(1, 2, 3, 4) == 4
    assert run(1, 2, 3, 4) == 0
    touch_later(folder / "2.png", png(9))
    assert run(1, 2, 3, 4) == 1
    assert "4 images, 3 of them done before" in caplog.text
    assert numbers(output) == {f"{n}.png": colour(png(9 if n == 2 else n)) for n in (1, 2, 3, 4)}
    (folder / "3.png").unlink()
    assert run(1, 2, 4) == 0
    assert "3 images, 3 of them done before" in caplog.text
    assert "3 captions" in caplog.text
    photos(folder, 5)
    assert run(5, 4, 1) == 1  # rewritten: another order, as many bytes
    names = (1, 2, 4, 5) if source == "folder" else (5, 4, 1)
    assert numbers(output) == {f"{n}.png": colour(png(9 if n == 2 else n)) for n in names}


def test_a_list_of_equal_length_and_columns_that_changed(tmp_path):
    photos(tmp_path, 1, 2, 3, 4)
    for names in ((1, 2), (4, 3)):
        pq.write_table(pa.table({"image": [f"{n}.png" for n in names], "sku": names}), tmp_path / "l.parquet")
        caption([tmp_path / "l.parquet"], tmp_path / "o.jsonl")
        assert numbers(tmp_path / "o.jsonl") == {f"{n}.png": colour(png(n)) for n in names}
    pq.write_table(pa.table({"image": ["4.png", "3.png"], "sku": [7, 8]}), tmp_path / "l.parquet")
    assert caption([tmp_path / "l.parquet"], tmp_path / "o.jsonl").said == 0
    assert [json.loads(line)["sku"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [7, 8]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_that_changed_in_its_middle(tmp_path, kind):
    path = tmp_path / f"a.{kind}"

    def write(middle: int):
        contents = [(f"{n}.png", png(n)) for n in (1, middle, *range(20, 200))]
        if kind == "tar":
            pack(path, contents)
        else:
            rows = [{"bytes": content, "path": name} for name, content in contents]
            pq.write_table(pa.table({"image": rows}), path, compression="none")

    sizes = set()
    for middle in (2, 3):
        write(middle)
        sizes.add(path.stat().st_size)
        caption([path], tmp_path / "o.jsonl")
        assert colour(png(middle)) in read_table(tmp_path / "o.jsonl").values()
    assert len(sizes) == 1


def test_rows_of_another_source_stay_and_those_of_a_file_that_is_gone_go(tmp_path):
    one, other = photos(tmp_path / "one", 1, 2), photos(tmp_path / "other", 3)
    for paths in ([one], [other]):
        caption(paths, tmp_path / "o.jsonl")
    assert sorted(numbers(tmp_path / "o.jsonl")) == ["1.png", "2.png", "3.png"]
    (one / "2.png").unlink()
    caption([one], tmp_path / "o.jsonl")
    assert sorted(numbers(tmp_path / "o.jsonl")) == ["1.png", "3.png"]
    files = sorted(photos(tmp_path / "more", 5, 6).iterdir())
    caption(files, tmp_path / "p.jsonl")  # as a shell writes a pattern
    files[0].unlink()
    caption(files[1:], tmp_path / "p.jsonl")
    assert sorted(numbers(tmp_path / "p.jsonl")) == ["6.png"]


def test_two_tars_one_after_the_other_into_one_metadata_file(tmp_path):
    output = tmp_path / "out/metadata.csv"
    output.parent.mkdir()
    photos(output.parent, 3)
    for number in (1, 2):
        caption([pack(tmp_path / f"{number}.tar", [("x.png", png(number))])], output)
    caption([output.parent / "3.png"], output)
    rows = pandas.read_csv(output)
    assert [colour(output.parent / name) for name in rows.file_name] == list(rows.caption)
    assert colour(png(3)) in list(rows.caption)


def test_copies_of_tars_whose_names_are_no_text_and_that_change_meanwhile(tmp_path, monkeypatch):
    names = [os.fsdecode(b"\xe9.png"), "b.png"]
    tar = pack(tmp_path / "0.tar", [(name, png(number)) for number, name in enumerate(names)])
    caption([tar], tmp_path / "out", "tar")
    samples = list(webdataset.samples(str(tmp_path / "out/0.tar")))
    assert [sample["captions"] for sample in samples] == [[colour(png(0))], [colour(png(1))]]

    said = Colours.stream

    def change(self, *words, **options):
        yield from said(self, *words, **options)
        pack(tar, [("b.png", png(1)), ("c.png", png(3))])

    monkeypatch.setattr(Colours, "stream", change)
    for output, form in ((tmp_path / "again", "tar"), (tmp_path / "again.tar", None)):
        pack(tar, [(f"{number}.png", png(number)) for number in range(3)])
        with pytest.raises(UserError, match="the source has changed while this was running"):
            caption([tar], output, form)


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("held", ["paths", "images"])
def test_shards_have_their_size_within_a_row_group(tmp_path, held):
    photos(tmp_path, *range(40))
    names = [f"{n}.png" for n in range(40)]
    column = names if held == "paths" else [{"bytes": png(n), "path": name} for n, name in enumerate(names)]
    pq.write_table(pa.table({"image": column}), tmp_path / "l.parquet")
    assert caption([tmp_path / "l.parquet"], tmp_path / "out", shard_size=5).said == 40
    files = sorted((tmp_path / "out").glob("0*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [5] * 8
    assert [Path(name).name for name in pandas.read_parquet(tmp_path / "out").image] == names
    files[3].unlink()
    assert caption([tmp_path / "l.parquet"], tmp_path / "out", shard_size=5).said == 5
    assert list(pandas.read_parquet(tmp_path / "out").caption) == [colour(png(n)) for n in range(40)]


@pytest.mark.parametrize("left", [0, 200, -20])
def test_a_damaged_shard_is_made_again_and_named(tmp_path, left, caplog):
    caption([photos(tmp_path / "p", *range(6))], tmp_path / "out", shard_size=2)
    damaged = sorted((tmp_path / "out").glob("0*.parquet"))[1]
    os.truncate(damaged, left if left >= 0 else damaged.stat().st_size + left)
    assert "4 of 6 images" in progress.status(str(tmp_path / "out"), "images")
    assert caption([tmp_path / "p"], tmp_path / "out", shard_size=2).said == 2
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{damaged} is damaged, and is made again"
    ]
    assert list(pandas.read_parquet(tmp_path / "out").caption) == [colour(png(n)) for n in range(6)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_the_output_appears_where_the_file_system_has_no_locks(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    caption([photos(tmp_path / "p", 1)], tmp_path / "o.jsonl")
    assert numbers(tmp_path / "o.jsonl") == {"1.png": colour(png(1))}


def test_workers_read_each_image_of_a_saved_set_once(tmp_path):
    rows = [{"image": {"bytes": png(n), "path": f"{n:02}.png"}} for n in range(20)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    caption([tmp_path / "saved"], tmp_path / "texts", "txt", dataloader_num_workers=2)
    texts = {path.name: path.read_text().strip() for path in (tmp_path / "texts").iterdir()}
    assert texts == {f"{n:02}.txt": colour(png(n)) for n in range(20)}


# ---------------------------------------------------------------- with a model that names colours, and the real script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small BLIP, trained to name the colours of squares."""
    import torch

    network, processor = tiny.build(tmp_path_factory.mktemp("tiny"))
    squares = [Image.new("RGB", (32, 32), name) for name in ("red", "green", "blue", "yellow")]
    texts = [f"a {name} square" for name in ("red", "green", "blue", "yellow")]
    batch = processor(images=squares, text=texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(300):
        loss = network(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.005:
            break
    folder = tmp_path_factory.mktemp("model")
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def named(caption: str) -> str:
    """The colour that a caption names."""
    return next(name for name in ("red", "green", "blue", "yellow") if name in caption)


def script(model, *words, **options):
    return tiny.run(
        "infer.py",
        *words,
        "--model_name_or_path",
        model,
        "--num_beams",
        1,
        "--max_new_tokens",
        6,
        "--bf16",
        "false",
        **options,
    )


def test_the_model_is_known_by_its_weights(model, tmp_path):
    names = {"x.jpg": "red", "x.png": "blue", "a.b.png": "green", "a_b.png": "yellow"}
    (tmp_path / "p").mkdir()
    for name, of in names.items():
        Image.new("RGB", (32, 32), of).save(tmp_path / "p" / name)
    mine = shutil.copytree(model, tmp_path / "mine")
    script(mine, tmp_path / "p", "--output", tmp_path / "o.jsonl", PMI_SIZE="2", PMI_RANK="0", OMPI_COMM_WORLD_SIZE="2")
    assert {name: named(caption) for name, caption in numbers(tmp_path / "o.jsonl").items()} == names
    script(mine, tmp_path / "p", "--output", tmp_path / "o.tar")
    captions = [sample["captions"][0] for sample in webdataset.samples(str(tmp_path / "o.tar"))]
    assert Counter(map(named, captions)) == Counter(names.values())
    copied = shutil.copytree(mine, tmp_path / "copied")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "p" / "more.png")
    result = script(copied, tmp_path / "p", "--output", tmp_path / "o.jsonl")
    assert "5 images, 4 of them done before" in result.stderr
    from safetensors.torch import load_file, save_file

    weights = load_file(mine / "model.safetensors")
    smallest = min(weights, key=lambda name: weights[name].numel())  # training may change one weight alone
    weights[smallest] = weights[smallest] + 1e-4
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    result = script(mine, tmp_path / "p", "--output", tmp_path / "o.jsonl", fails=True)
    assert "was started with other settings: " in result.stderr
    assert "weights was" in result.stderr.splitlines()[-1]
