"""infer.py: every source that train.py reads, every form of output, local and at addresses, gives the same captions."""

import base64
import csv
import importlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path, PureWindowsPath

import datasets
import fsspec
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import ROOT
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image

from captioning.names import inside
from captioning.sources import image_rows
from captioning.writers import Texts, check_tars
from common.errors import UserError
from common.remote import local_copy
from data.rows import Options
from jobs import progress, queue
from jobs.shards import ShardFolder

NUMBER = 6
SCALE = 8
NAMES = [f"{i:04}.jpg" for i in range(NUMBER)]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30), Image.Resampling.NEAREST).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose captions depend on the picture."""
    folder = tmp_path_factory.mktemp("model")
    network, processor = tiny.build(folder)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if weights.dim() > 1:
                weights.mul_(SCALE if "crossattention" in name or "vision" in name else 1)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def infer(model, *words) -> None:
    settings = ["--model_name_or_path", model, "--num_beams", 1, "--max_new_tokens", 5, "--fast_attention", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["infer.py", *map(str, [*words, *settings])])
        importlib.import_module("infer").main()


def tar(file, members: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w") if hasattr(file, "write") else tarfile.open(file, "w") as out:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def members(numbers) -> dict[str, bytes]:
    return {
        f"{i:04}.{ending}": content
        for i in numbers
        for ending, content in (("jpg", jpeg(i)), ("json", json.dumps({"sku": f"s{i}"}).encode()))
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The same pictures in every kind of source, each with a column sku."""
    root = tmp_path_factory.mktemp("sources")
    (root / "photos").mkdir()
    for number, name in enumerate(NAMES):
        (root / "photos" / name).write_bytes(jpeg(number))
    (root / "tars").mkdir()
    tar(root / "tars" / "00000.tar", members(range(3)))
    tar(root / "tars" / "00001.tar", members(range(3, NUMBER)))
    rows = [{"image": {"bytes": jpeg(i), "path": name}, "sku": f"s{i}"} for i, name in enumerate(NAMES)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (root / "parquet").mkdir()
    for number in range(2):
        table.shard(2, number, contiguous=True).to_parquet(root / "parquet" / f"{number}.parquet")
    table.save_to_disk(root / "saved")
    pandas.DataFrame({"file": [f"photos\\{name}" for name in NAMES], "sku": [f"s{i}" for i in range(NUMBER)]}).to_csv(
        root / "list.csv", index=False, sep=";", encoding="utf-16"
    )
    (root / "list.txt").write_text("\n".join(f"photos/{name}" for name in NAMES), encoding="utf-16")
    return root


SOURCES = ("photos", "tars", "tars/*.tar", "parquet", "parquet/*.parquet", "saved", "list.csv", "list.txt")


@pytest.fixture(scope="module")
def expected(model, sources, tmp_path_factory) -> list[str]:
    output = tmp_path_factory.mktemp("expected") / "o.jsonl"
    infer(model, sources / "photos", "--output", output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [Path(row["image"]).name for row in rows] == NAMES
    assert len({row["caption"] for row in rows}) > 1
    return [row["caption"] for row in rows]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_captions_and_keeps_its_columns(model, sources, expected, tmp_path, source):
    infer(model, sources / source, "--output", tmp_path / "o.csv")
    frame = pandas.read_csv(tmp_path / "o.csv")
    assert list(frame.caption) == expected
    assert [Path(name).name for name in frame.image] == NAMES
    if not re.search("photos|txt", source):
        assert list(frame.sku) == [f"s{i}" for i in range(NUMBER)]


@pytest.mark.parametrize("source", ["photos", "tars", "parquet"])
def test_every_form_of_output_is_read_back_by_its_own_readers(model, sources, expected, tmp_path, source):
    folder = tmp_path / "photos"
    folder.mkdir()
    if source == "photos":
        for number, name in enumerate(NAMES):
            (folder / name).write_bytes(jpeg(number))
        place = folder
    else:
        place = sources / source
    for name in ("o.jsonl", "o.parquet", "folder", "results.json", "o.tar"):
        infer(model, place, "--output", tmp_path / name)
    infer(model, place, "--output", folder / "metadata.jsonl")
    assert list(pandas.read_json(tmp_path / "o.jsonl", lines=True).caption) == expected
    assert list(pandas.read_parquet(tmp_path / "o.parquet").caption) == expected
    assert list(pandas.read_parquet(tmp_path / "folder").caption) == expected
    assert len(list((tmp_path / "folder").glob("0*.parquet"))) == {"photos": 1}.get(source, 2)
    assert [row["caption"] for row in json.loads((tmp_path / "results.json").read_text())] == expected
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    found = dict(zip((np.asarray(image).tobytes() for image in loaded["image"]), loaded["caption"], strict=True))
    assert found == {np.asarray(Image.open(io.BytesIO(jpeg(i)))).tobytes(): c for i, c in enumerate(expected)}
    with tarfile.open(tmp_path / "o.tar") as archive:
        texts = [archive.extractfile(m).read().decode() for m in archive if m.name.endswith(".txt")]
    assert texts == expected


def test_a_text_beside_each_image_leaves_those_that_are_there(model, expected, tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(jpeg(number))
    (tmp_path / "0001.txt").write_text("mine", encoding="utf-8")
    infer(model, tmp_path, "--output_format", "txt")
    texts = [(tmp_path / name).with_suffix(".txt").read_text(encoding="utf-8").strip() for name in NAMES]
    assert texts == [expected[0], "mine", *expected[2:]]
    infer(model, tmp_path, "--output_format", "txt", "--output", tmp_path / "texts")
    texts = [(tmp_path / "texts" / f"{i:04}.txt").read_text(encoding="utf-8").strip() for i in range(NUMBER)]
    assert texts == expected


def test_tars_again_with_a_text_in_each_sample(model, sources, expected, tmp_path):
    infer(model, sources / "tars", "--output_format", "tar", "--output", tmp_path / "captioned")
    found = {}
    for file in sorted((tmp_path / "captioned").iterdir()):
        with tarfile.open(file) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}
    everything = members(range(NUMBER)) | {f"{i:04}.txt": caption.encode() for i, caption in enumerate(expected)}
    assert found == everything


def test_workers_share_a_source_in_order(model, sources, expected, tmp_path):
    command = ["--dataloader_num_workers", 2, "--per_device_eval_batch_size", 2]
    infer(model, sources / "tars", *command, "--output", tmp_path / "o.parquet")
    assert list(pandas.read_parquet(tmp_path / "o.parquet").caption) == expected


@pytest.mark.parametrize("name", ["o.csv", "o.parquet", "folder"])
def test_a_list_that_grew_is_added_to(model, sources, expected, tmp_path, name, caplog):
    for number in (2, NUMBER):
        lines = [str(sources / "photos" / image) for image in NAMES[:number]]
        (tmp_path / "list.txt").write_text("\n".join(lines))
        infer(model, tmp_path / "list.txt", "--output", tmp_path / name)
    read = pandas.read_csv if name.endswith("csv") else pandas.read_parquet
    assert list(read(tmp_path / name).caption) == expected


@pytest.mark.parametrize("name", ["x.docx", "x.txt", "captions.v2", "x.jsonl.bak"])
def test_an_ending_that_is_no_form_of_output_is_refused(model, sources, tmp_path, name):
    with pytest.raises(UserError, match=r"the extension .* does not say what to write"):
        infer(model, sources / "photos", "--output", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_metadata_file_away_from_its_images_is_refused(model, sources, tmp_path):
    with pytest.raises(UserError, match="is not below"):
        infer(model, sources / "photos", "--output", tmp_path / "metadata.csv")


# ---- broken sources: what is said, and what is kept


def test_broken_files_are_named_and_what_was_captioned_is_kept(model, sources, expected, tmp_path, caplog):
    shutil.copy(sources / "tars" / "00001.tar", tmp_path / "b.tar")
    whole = (sources / "tars" / "00000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    command = [tmp_path / "a.tar", tmp_path / "b.tar", "--output", tmp_path / "o.jsonl"]
    with pytest.raises(SystemExit, match="1"):
        infer(model, *command)
    assert re.search(r"failed: .*a\.tar: the tar file is broken or cut off after 0001\.\w+", caplog.text)
    (kept,) = (tmp_path / "o.jsonl.shards").glob("00001-*.parquet")
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "a.tar").write_bytes(whole)
    infer(model, *command)
    assert kept.stat().st_mtime_ns == stamp
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == expected

    content = (sources / "parquet" / "0.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"b\.parquet: the Parquet file is broken or cut off"):
        infer(model, tmp_path / "b.parquet")
    with pytest.raises(SystemExit, match="1"):
        infer(model, tmp_path / "b.parquet", sources / "parquet" / "1.parquet", "--output", tmp_path / "o.csv")
    assert re.search(r"failed: .*b\.parquet: the Parquet file is broken or cut off", caplog.text)
    (tmp_path / "b.parquet").write_bytes(content)
    infer(model, tmp_path / "b.parquet", sources / "parquet" / "1.parquet", "--output", tmp_path / "o.csv")
    assert list(pandas.read_csv(tmp_path / "o.csv").caption) == expected


def test_of_processes_that_wait_for_none_the_last_says_what_failed(
    model, sources, expected, tmp_path, caplog, monkeypatch
):
    whole = (sources / "tars" / "00000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    shutil.copy(sources / "tars" / "00001.tar", tmp_path / "b.tar")

    def rank(number):
        for name, value in {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number}.items():
            monkeypatch.setenv(name, str(value))
        infer(model, tmp_path / "a.tar", tmp_path / "b.tar", "--output", tmp_path / "o.jsonl")

    rank(0)  # an error here would have torchrun end the other, which is at work
    assert "1 of 2 shards" not in caplog.text
    with pytest.raises(SystemExit, match="1"):
        rank(1)
    assert re.search(r"failed: .*a\.tar: the tar file is broken", caplog.text)
    assert not (tmp_path / "o.jsonl").exists()
    (tmp_path / "a.tar").write_bytes(whole)
    rank(1)
    rank(0)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == expected


def test_a_bad_image_names_the_flag_that_passes_over_it(model, sources, expected, tmp_path):
    parts = members(range(3))
    parts["0001.jpg"] = parts["0001.jpg"][:200]
    del parts["0002.jpg"]
    tar(tmp_path / "a.tar", parts)
    with pytest.raises(UserError, match=r"0001\.jpg: .*--skip_bad_images"):
        infer(model, tmp_path / "a.tar")
    infer(model, tmp_path / "a.tar", "--skip_bad_images", "--output", tmp_path / "o.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row.get("caption") for row in rows] == [expected[0], None, None]
    assert "a.tar sample 0002: has no image" in rows[2]["error"]


def test_a_server_that_is_gone_for_a_while_is_waited_for(model, sources, expected, server, caplog):
    system, path = fsspec.core.url_to_fs(server)
    for file in (sources / "tars").iterdir():
        system.put_file(str(file), f"{path}/tars/{file.name}")
    served = server_at[0]

    def interrupt():
        while not any(name.endswith(".parquet") for name in system.find(f"{path}/out")):
            time.sleep(0.05)
        served.stop()
        time.sleep(8)
        start_again()

    thread = threading.Thread(target=interrupt)
    thread.start()
    infer(model, f"{server}/tars", "--output", f"{server}/out/")
    thread.join()
    system.invalidate_cache()
    rows = [pq.read_table(system.open(name)).to_pylist() for name in sorted(system.glob(f"{path}/out/*.parquet"))]
    assert [row["caption"] for shard in rows for row in shard] == expected


def test_a_server_that_is_back_before_it_is_asked_whether_it_is(server):
    folder = ShardFolder(f"{server}/out/", single=False)
    folder.write_json("a.json", {})
    server_at[0].stop()
    assert queue.wait_for_servers(folder.files, lambda shard: start_again() or True) == ["a.json"]


def test_progress_of_others_that_cannot_be_read_ends_no_run(server):
    told = progress.Progress(ShardFolder(f"{server}/out/", single=False), [], "images")
    told.done["rows"], told.looked = 5, 0
    server_at[0].stop()
    told.say()
    start_again()
    assert told.done["rows"] == 5  # a look would have found none
    assert told.looked > 0


# ---- addresses

server_at: list = []


def start_again() -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    server_at[0] = importlib.import_module("moto.server").ThreadedMotoServer(port=port)
    server_at[0].start()


@pytest.fixture
def server(monkeypatch):
    """S3, as moto serves it on loopback."""
    moto = pytest.importorskip("moto.server", reason="moto[server] stands in for S3")
    pytest.importorskip("s3fs", reason="s3fs opens s3://")
    served = moto.ThreadedMotoServer(port=0)
    served.start()
    server_at[:] = [served]
    _, port = served.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",  # it is our patience that is tested
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(f"bucket{port}")  # what a test leaves behind, the next one's server has, too
    yield f"s3://bucket{port}"
    server_at[0].stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory():
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket"


def in_memory(protocol: str, monkeypatch) -> str:
    """gs:// or hf:// kept in memory: what is tested is that our code takes every file system that fsspec opens by its
    name. Their own clients talk to servers that no test may reach."""

    class InMemory(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix(f"{protocol}://"))

    InMemory.protocol = protocol
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, protocol, InMemory)
    return f"{protocol}://bucket"


@pytest.mark.parametrize("kind", ["memory", "server", "gs", "hf"])
def test_sources_and_outputs_at_addresses(model, sources, expected, kind, request, monkeypatch):
    root = in_memory(kind, monkeypatch) if kind in ("gs", "hf") else request.getfixturevalue(kind)
    system, path = fsspec.core.url_to_fs(root)
    for folder in ("photos", "tars", "parquet"):
        for file in (sources / folder).iterdir():
            system.makedirs(f"{path}/{folder}", exist_ok=True)
            system.put_file(str(file), f"{path}/{folder}/{file.name}")
    for name in ("list.csv", "list.txt"):
        system.put_file(str(sources / name), f"{path}/{name}")
    for number, source in enumerate(("photos", "tars/*.tar", "parquet", "list.csv", "list.txt")):
        infer(model, f"{root}/{source}", "--output", f"{root}/out-{number}.csv")
        with fsspec.open(f"{root}/out-{number}.csv", "rt", encoding="utf-8", newline="") as file:
            assert [row["caption"] for row in csv.DictReader(file)] == expected, source
    infer(model, f"{root}/photos", "--output", f"{root}/folder/")
    (part,) = system.glob(f"{path}/folder/*.parquet")
    with system.open(part) as file:
        assert pq.read_table(file)["caption"].to_pylist() == expected
    with pytest.raises(UserError, match="there is no such file"):
        infer(model, f"{root}/nothing")


def test_a_list_at_an_address_gives_what_it_gives_in_a_folder(memory, tmp_path):
    """Images in base64, names of files, and the columns beside them."""
    coded = base64.b64encode(jpeg(1)).decode()
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    for column, name in (("image", coded), ("file", "0.jpg")):
        text = json.dumps({column: name, "sku": "s", "image_id": 7, "split": "test"})
        (tmp_path / "list.jsonl").write_text(text)
        fsspec.filesystem("memory").pipe("/bucket/list.jsonl", text.encode())
        ((there, here),) = zip(
            image_rows([f"{memory}/list.jsonl"], Options()),
            image_rows([str(tmp_path / "list.jsonl")], Options()),
            strict=True,
        )
        assert there["columns"] == here["columns"] == {"sku": "s", "image_id": 7, "split": "test"}
        assert there["relative"] == here["relative"]
        assert (there["image"], there["name"]) == (
            (here["image"], here["name"]) if column == "image" else (f"{memory}/0.jpg",) * 2
        )


def test_train_py_reads_addresses_too(sources, memory):
    import data

    system = fsspec.filesystem("memory")
    rows = [{"image": f"photos/{name}", "caption": f"c {name}"} for name in NAMES]
    system.pipe("/bucket/set/data.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for number, name in enumerate(NAMES):
        system.pipe(f"/bucket/set/photos/{name}", jpeg(number))
    loaded = data.load(f"{memory}/set")
    captions = [c for split in loaded.values() for row in split for c in row["captions"]]
    assert sorted(captions) == sorted(row["caption"] for row in rows)
    system.pipe("/bucket/shards/0.tar", (sources / "tars" / "00000.tar").read_bytes())
    with pytest.raises(UserError, match="no caption"):
        data.load(f"{memory}/shards/0.tar")


@pytest.mark.parametrize(
    ("name", "says"),
    [("https://example.org/a.jpg", "not fetched from web addresses"), ("nosuch://x/y", "nosuch")],
)
def test_addresses_that_are_not_read(name, says):
    with pytest.raises(UserError, match=says):
        next(image_rows([name], Options()))


# ---- what is listed, without a model


def names(*paths, **options) -> list[str]:
    return [row["name"] for row in image_rows([str(path) for path in paths], Options(**options))]


def test_images_are_told_by_content_and_the_rest_is_counted(tmp_path):
    from captioning.sources import left_out

    for name in ("a.jfif", "b.jpe", "c", "d.HEIC", "e.dat", "f.PNG", "._g.jpg", "__MACOSX/h.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    Image.new("RGB", (5, 5)).save(tmp_path / "i.tga")
    (tmp_path / "notes.txt").write_text("P5 is no picture")
    (tmp_path / "Thumbs.db").write_bytes(b"\0\1")
    (tmp_path / "README").write_text("BM")
    assert [Path(name).name for name in names(tmp_path)] == [
        "a.jfif",
        "b.jpe",
        "c",
        "d.HEIC",
        "e.dat",
        "f.PNG",
        "i.tga",
    ]
    assert left_out(str(tmp_path)) == {".txt": 1, ".db": 1, "without an ending": 1, "folders called __MACOSX": 1}


def test_heic_is_opened_or_the_package_named(tmp_path):
    from data.images import ImageError, open_image

    try:
        import pillow_heif
    except ImportError:
        content = b"\0\0\0\x18ftypheic" + b"\0" * 100
        with pytest.raises(ImageError, match="pip install pillow-heif"):
            open_image(content)
        return
    pillow_heif.register_heif_opener()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.heic")
    assert open_image(tmp_path / "a.heic").size == (32, 32)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX alone")
def test_names_that_are_no_utf8_are_captioned_and_written(model, tmp_path):
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/\xe9.jpg")).write_bytes(jpeg(1))
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (tmp_path / "list.txt").write_bytes("é.jpg\n".encode("cp1252"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/0.jpg").write_bytes(jpeg(1))
    infer(model, tmp_path / "plain", "--output", tmp_path.parent / f"{tmp_path.name}-plain.jsonl")
    (plain,) = rows_of(tmp_path.parent / f"{tmp_path.name}-plain.jsonl")
    shutil.rmtree(tmp_path / "plain")
    for place in (tmp_path, tmp_path / "list.txt"):
        output = tmp_path.parent / f"{tmp_path.name}-{Path(place).suffix[1:]}.jsonl"
        infer(model, place)
        infer(model, place, "--output", output)
        (row,) = rows_of(output)
        assert row["caption"] == plain["caption"] != ""
        assert row["image"].endswith("/\\udce9.jpg")  # the byte E9, as Python writes what is no character


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_images_of_one_name_in_a_table_stay_apart(tmp_path):
    rows = [{"image": {"bytes": jpeg(i // 2), "path": "image.jpg"}, "n": i} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert names(tmp_path / "a.parquet") == ["image.jpg", "image.jpg#2", "image.jpg#3"]


def test_the_reported_inputs(model, tmp_path, capsys):
    folder = os.environ.get("CAPTION_TEST_CASES") or os.path.join(os.environ.get("CAPTION_TEST_DATA", ""), "../cases")
    if not os.path.isdir(folder):
        pytest.skip("neither CAPTION_TEST_CASES nor a folder cases beside CAPTION_TEST_DATA is there")
    for case, number in (("01_png_chunks", 4), ("02_endings", 7), ("20_lists/bom.txt", 3), ("20_lists/utf16.txt", 3)):
        infer(model, f"{folder}/{case}")
        assert len(capsys.readouterr().out.splitlines()) == number, case


# ---- what was written is scored; a set without splits is scored whole


def evaluate(*words) -> None:
    quick = ["--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--report", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, [*words, *quick])])
        importlib.import_module("evaluate").main()


def test_what_infer_py_writes_is_scored_by_evaluate_py_as_its_own_captions_are(model, sources, tmp_path, caplog):
    rows = [{"image": f"photos/{name}", "captions": [f"a red dog {i}", "the cat"]} for i, name in enumerate(NAMES)]
    references = sources / "references.jsonl"
    references.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    how = ["--num_beams", 1, "--max_new_tokens", 5, "--fast_attention", "false"]
    with caplog.at_level("INFO"):
        evaluate("--model_name_or_path", model, "--dataset_name", references, "--output_dir", tmp_path / "own", *how)
    assert "no splits in the source, so all images are test" in caplog.text
    own = json.loads((tmp_path / "own" / "coco_metrics.json").read_text(encoding="utf-8"))
    for name in ("o.jsonl", "results.json", "folder"):
        infer(
            model,
            sources / "photos",
            "--output",
            tmp_path / name,
            *(["--output_format", "parquet"] * (name == "folder")),
        )
        scored = ["--predictions", tmp_path / name, "--references", references]
        evaluate(*scored, "--output_dir", tmp_path / "of")
        found = json.loads((tmp_path / "of" / "coco_metrics.json").read_text(encoding="utf-8"))
        assert {k: own[k] for k in ("CIDEr", "Bleu_1", "ROUGE_L")} == {
            k: found[k] for k in ("CIDEr", "Bleu_1", "ROUGE_L")
        }


def test_a_format_is_added_as_the_docs_say(tmp_path):
    """In a copy of the code: its module from docs/data.md word for word, and its name in FORMATS."""
    import shutil
    import subprocess

    root = ROOT
    for folder in ("data", "common", "drawn_scenes"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (root / "docs" / "data.md").read_text(encoding="utf-8").split("## Add a format")[1]
    block = [line[4:] for line in text.splitlines() if line.startswith("    ") or not line]
    (tmp_path / "data" / "formats" / "myformat.py").write_text("\n".join(block), encoding="utf-8")
    file = tmp_path / "data" / "formats" / "__init__.py"
    listed = file.read_text(encoding="utf-8")
    listed = listed.replace("import annotations,", "import annotations, myformat,").replace(
        "FORMATS = (", "FORMATS = (myformat, "
    )
    file.write_text(listed, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / "photos" / name).write_bytes(jpeg(number))
    (tmp_path / "set.mine").write_text("".join(f"{name} = a dog\n" for name in NAMES), encoding="utf-16")
    command = "import data; print(sum(map(len, data.load('set.mine').values())))"
    run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == str(NUMBER), run.stderr


@pytest.mark.parametrize(
    "name",
    [
        "../../x.jpg",
        "....//....//x.jpg",
        "a/..././x.jpg",
        "/etc/x.jpg",
        "..\\..\\x.jpg",
        "C:\\x.jpg",
        "..",
        ".. /x.jpg",
    ],
)
def test_a_name_of_the_source_leads_out_of_no_folder(name, tmp_path):
    """Names in tars, tables and at addresses are their makers'. Resolved by the system's own rules, all stay below."""
    for found in (inside(name), inside(name.replace("\\", "/"))):
        assert (tmp_path / found).resolve().is_relative_to(tmp_path.resolve())
        assert (tmp_path / found).resolve() != tmp_path.resolve()
        assert not PureWindowsPath(found).drive
    rows = [{"name": name, "image": {}, "relative": name}]
    assert Texts(iter(rows), tmp_path).of(rows[0]).resolve().is_relative_to(tmp_path.resolve())


def test_tars_of_one_name_are_not_written_over_each_other(tmp_path):
    tars = [str(tmp_path / folder / "0.tar") for folder in "ab"]
    with pytest.raises(UserError, match=r"0\.tar is the name of more than one tar"):
        check_tars(tars)


def test_a_name_at_an_address_leads_out_of_no_folder(tmp_path):
    system, name = fsspec.filesystem("memory"), "/hostile/../../../x.txt"
    system.store[name] = MemoryFile(system, name, b"x")
    try:
        with pytest.raises(UserError, match="leads out of the folder"):
            local_copy("memory://hostile", tmp_path / "cache")
    finally:
        del system.store[name]
    assert not list(tmp_path.rglob("x.txt"))
