"""Inputs that look like other ones: each caption comes to its own image, or the source is refused in one line."""

import base64
import dataclasses
import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data
from captioning.sources import image_rows
from common.errors import DataError
from data.checks import described
from data.columns import captions_of
from data.reader import Source
from data.rows import Options, Record
from data.text_rows import csv_rows


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def encoded(form: str, colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, form)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("folders", [("cam1", "cam2"), ("train", "test"), ("a/b", "c/b")])
@pytest.mark.parametrize("image_dir", [None, "."])
def test_a_missing_file_is_not_taken_from_another_folder_than_the_one_named(folders, image_dir, tmp_path):
    one, other = folders
    picture(tmp_path / one / "0.jpg")
    picture(tmp_path / other / "1.jpg")  # which no row names
    (tmp_path / "captions.csv").write_text(f"image,caption\n{one}/0.jpg,a\n{one}/1.jpg,b\n")
    options = {"image_dir": str(tmp_path)} if image_dir else {}
    with pytest.raises(data.ImageError, match="1 of 2 images are missing"):
        data.load(str(tmp_path / "captions.csv"), all_as="test", **options)


def test_a_folder_that_was_moved_and_names_without_an_ending_are_found(tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        picture(tmp_path / f"photos/{folder}/0.jpg", colour)
    (tmp_path / "captions.csv").write_text("image,caption\na/0,x\nb/0,y\n")
    rows = data.load(str(tmp_path / "captions.csv"), all_as="test")["test"]
    found = {row["image"]["path"].rpartition("photos/")[2]: row["captions"] for row in rows}
    assert found == {"a/0.jpg": ["x"], "b/0.jpg": ["y"]}


@pytest.mark.parametrize("names", [("0.jpg", "0.png", "0.txt"), ("0.jpg", "0.txt", "0.jpg", "0.txt")])
def test_two_images_of_a_tars_sample_are_refused(names, tmp_path):
    content = {"jpg": encoded("JPEG", "red"), "png": encoded("PNG", "blue"), "txt": b"a dog"}
    write_tar(tmp_path / "a.tar", [(name, content[name[-3:]]) for name in names])
    with pytest.raises(DataError, match="has 2 images"):
        data.load(str(tmp_path / "a.tar"), all_as="test")


def test_a_mask_beside_an_image_is_none(tmp_path):
    members = [("0.jpg", encoded("JPEG", "red")), ("0.seg.png", encoded("PNG", "black")), ("0.txt", b"a dog")]
    write_tar(tmp_path / "a.tar", members)
    (row,) = data.load(str(tmp_path / "a.tar"), all_as="test")["test"]
    assert data.open_image(row["image"]).getpixel((0, 0))[0] > 200


@pytest.mark.parametrize(
    "lines",
    [
        ["id,caption", '1,"in the photo are', '3,000 people"', "2,b"],
        ["image,caption", '1.jpg,"two photos:', '2.jpg, a dog"'],
        ["image,caption", '1.jpg,"a', 'b.jpg is next, c"'],
    ],
)
def test_a_cell_of_several_lines_that_look_like_rows_is_refused_with_its_line(lines, tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a.csv line 2: a quote .* opens here and is closed in a line that looks like"):
        list(csv_rows(tmp_path / "a.csv"))


@pytest.mark.parametrize("text", ["['a dog', None]", "['a dog', nan]", "['a dog' nan]"])
def test_missing_values_in_a_list_in_a_cell_are_none_of_its_captions(text):
    assert captions_of({"caption": text}, ["caption"], "row 1") == ["a dog"]


@pytest.mark.parametrize(
    "text", ["['a', 3]", "['a', 'b', ...]", "[array(['a'], dtype=object)]", '["a", null]', "[np.str_('a')]"]
)
def test_a_list_of_other_things_than_text_is_refused(text):
    with pytest.raises(DataError, match="begins like a list"):
        captions_of({"caption": text}, ["caption"], "row 1")


def test_what_is_behind_the_end_of_a_json_list_is_not_lost(tmp_path):
    for name in "01":
        picture(tmp_path / f"{name}.jpg")
    rows = [json.dumps([{"image": f"{name}.jpg", "caption": "a"}]) for name in "01"]
    (tmp_path / "a.json").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"behind the end of the list"):
        data.load(str(tmp_path / "a.json"), all_as="test")


def test_rows_that_name_a_file_and_rows_that_hold_an_image_are_not_mixed(tmp_path):
    picture(tmp_path / "0.jpg")
    inside = base64.b64encode(encoded("JPEG", "blue")).decode()
    rows = [{"image": "0.jpg", "caption": "a"}, {"image": inside, "caption": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 2: holds its image"):
        data.load(str(tmp_path / "a.jsonl"), all_as="test")


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": "0.jpg"}, {"type": "text", "text": "Describe."}], ["Describe."]]
)
def test_a_conversation_may_hold_plain_texts_and_addresses(content, tmp_path):
    picture(tmp_path / "0.jpg")
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ["a dog"]}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.jpg", "messages": turns}) + "\n")
    (row,) = data.load(str(tmp_path / "a.jsonl"), all_as="test")["test"]
    assert row["captions"] == ["a dog"]


def test_a_stream_that_is_one_split_as_a_whole_draws_none(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            (f"{n}.{ending}", content)
            for n in range(40)
            for ending, content in (("jpg", encoded("JPEG", (n, n, 3 * n))), ("txt", b"a dog"))
        ],
    )
    streams = data.load(str(tmp_path / "a.tar"), streaming=True, all_as="train")
    assert list(streams) == ["train"]
    assert len(list(streams["train"])) == 40


def messages(role: str, *parts) -> list:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": role}]


def test_a_conversation_about_two_images_is_refused_and_one_about_one_is_read(tmp_path):
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        picture(tmp_path / name, colour)
    one, two = ({"type": "image", "image": name} for name in ("a.jpg", "b.jpg"))
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages("red", one, {"type": "text", "text": "?"})}))
    (row,) = data.load(str(tmp_path / "t.jsonl"), all_as="test")["test"]
    assert row["image"]["path"].endswith("a.jpg")
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages("red and blue", one, two)}))
    with pytest.raises(DataError, match="holds 2 images"):
        data.load(str(tmp_path / "t.jsonl"), all_as="test")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"a.jpg": "a dog", "b.jpg": "a cat", "a.jpg": "a cow"}'),
        ("a.jsonl", '{"image": "a.jpg", "caption": "a dog", "caption": "a cow"}\n'),
        ("a.json", '[{"image": "a.jpg", "caption": "a dog", "caption": "a cow"}]'),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "a dog", "caption": "a cow"}]}'),
    ],
)
def test_a_key_that_is_there_twice_loses_no_caption(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"the key '(a\.jpg|caption)' is there twice in one object"):
        data.load(str(tmp_path / name), all_as="test", require_images=False)


@pytest.mark.parametrize("cell", ["[b'a dog', b'two']", "list(['a dog', 'two'])", "Index(['a dog', 'two'], dtype='object')",
                                  "pd.Index(['a dog', 'two'], dtype='object', name='x')", "array(['a dog', 'two'], dtype=object)"])  # fmt: skip
def test_lists_as_libraries_print_them_are_captions(cell):
    assert captions_of({"caption": cell}, ["caption"], "row 1") == ["a dog", "two"]


@pytest.mark.parametrize(
    "cell", ["list (of things) on a desk", "Index (finger) up", "array(s) of dots", "list(ing) of ships"]
)
def test_words_that_look_like_a_librarys_list_stay_words(cell):
    assert captions_of({"caption": cell}, ["caption"], "row 1") == [cell]


def test_the_rest_of_a_line_keeps_its_spaces_and_quotes(tmp_path):
    (tmp_path / "captions.txt").write_text('image,caption\na.jpg,a sign says "stop" , and a dog, too\nb.jpg,one\n')
    rows = list(csv_rows(tmp_path / "captions.txt", last_takes_rest=True))
    assert [row["caption"] for row, _ in rows] == ['a sign says "stop" , and a dog, too', "one"]


def test_a_damaged_image_in_base64_is_no_file_name(tmp_path):
    image = base64.b64encode(encoded("PNG", "red") + bytes(6000)).decode()
    (tmp_path / "a.csv").write_text(f"image,caption\n{image},a dog\n{image[:40]}{image[43:5001]}!,a cat\n")
    with pytest.raises(data.ImageError, match="not an image"):
        [data.open_image(row["image"]) for row in data.load(str(tmp_path / "a.csv"), all_as="test")["test"]]


def test_a_table_beside_those_of_the_splits_is_named_as_not_read(tmp_path, caplog):
    picture(tmp_path / "a.jpg")
    row = json.dumps({"image": "a.jpg", "caption": "a dog"}) + "\n"
    for name in ("train.jsonl", "more.jsonl", "annotations/val.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row)
    data.load(str(tmp_path), data_format="annotations", all_as="test")
    assert "read from train.jsonl, not from more.jsonl and val.jsonl" in caplog.text


def test_a_row_of_a_tar_is_named_by_its_image_file(tmp_path):
    write_tar(tmp_path / "a.tar", [("one.jpg", encoded("JPEG", "red")), ("one.txt", b"a dog")])
    (row,) = Source(str(tmp_path / "a.tar"), Options()).rows()
    assert row.name == "one.jpg"


def test_messages_say_which_image_is_missing_and_what_a_damaged_file_holds(tmp_path):
    record = Record("row 3", 3, ["a"], "key")
    assert described(record) == "of row 3"
    assert described(dataclasses.replace(record, name="b.jpg")) == "b.jpg"
    (tmp_path / "a.parquet").write_bytes(bytes(40))
    with pytest.raises(DataError, match=r"is not one \(.*[Pp]arquet"):
        list(Source(str(tmp_path / "a.parquet"), Options()).rows())
    (tmp_path / "a.json").write_text(json.dumps({f"key{n}": {"nested": n} for n in range(10)}))
    with pytest.raises(DataError, match=r"an object with the keys key0, .*, key7\. Expected"):
        data.load(str(tmp_path / "a.json"))


def test_a_parquet_file_in_a_folder_of_the_source_names_images_from_its_own_folder(tmp_path):
    for place, colour in (("0.jpg", "red"), ("data/0.jpg", "blue")):
        picture(tmp_path / "set" / place, colour)
    table = pa.table({"image": ["0.jpg"], "caption": ["a blue picture"]})
    pq.write_table(table, tmp_path / "set/data/train-00000-of-00001.parquet")
    (row,) = data.load(str(tmp_path / "set"), data_format="parquet", all_as="test")["test"]
    assert row["image"]["path"].endswith("data/0.jpg")


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"caption_en": "a dog runs"}, "captions are read from caption, not from caption_en; --caption_column"),
        ({"long_caption": "a dog runs"}, "captions are read from caption, not from long_caption; --caption_column"),
        (
            {"caption_de": "ein Hund", "caption2": "x"},
            "captions are read from caption and caption2, not from caption_de",
        ),
        ({"split": "train", "subset": "test"}, "splits are read from split, not from subset"),
        ({"fold": "train", "set": "test"}, "splits are read from set, not from fold"),
        ({"image_id": "1", "cocoid": "2"}, "ids are read from image_id, not from cocoid"),
        ({"image_path": "b.jpg"}, "images are read from image, not from image_path; --image_column names another"),
    ],
)
def test_where_two_columns_could_be_meant_a_line_says_which_was_taken(columns, line, tmp_path, caplog):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    row = {"image": "a.jpg", "caption": "a red picture"} | columns
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = Source(str(tmp_path / "t.jsonl"), Options()).rows()
    assert (read.key, read.captions[0]) == ("a.jpg", "a red picture")
    assert f"t.jsonl: {line}" in caplog.text


@pytest.mark.parametrize("columns", [{"caption_id": "1_2"}, {"caption_lang": "en"}, {"caption_length": "12"}, {"url": "x"},
                                     {"set": "coco"}, {"image_path": "1"}])  # fmt: skip
def test_columns_that_cannot_be_meant_bring_no_line(columns, tmp_path, caplog):
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "a red picture"} | columns) + "\n")
    list(Source(str(tmp_path / "t.jsonl"), Options()).rows())
    assert "not from" not in caplog.text


def test_of_two_columns_of_images_a_line_says_which_was_taken(tmp_path, caplog):
    one, two = ({"bytes": encoded("PNG", colour), "path": None} for colour in ("red", "blue"))
    rows = {"left": [one], "right": [two], "caption": ["a picture"]}
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "caption": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    (row,) = data.load(str(tmp_path / "t.parquet"), all_as="test")["test"]
    assert data.open_image(row["image"]).getpixel((0, 0))[0] > 200
    assert "images are read from left, not from right; --image_column names another" in caplog.text


SPACED = {"a.jpg": "red", " a.jpg": "blue", "b.jpg ": "green", " c d.jpg": "black", "e.jpg": "white"}


def write_spaced(place, form):
    rows = [{"image": name, "caption": colour} for name, colour in SPACED.items()]
    rows[-1]["image"] = " e.jpg "  # no file is called so
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    cells = {
        "t.csv": "{image},{caption}\n",
        "quoted.csv": '"{image}","{caption}, of course"\n',
        "t.tsv": "{image}\t{caption}\n",
    }
    match form:
        case "t.jsonl":
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "t.json":
            place.write_text(json.dumps({row["image"]: row["caption"] for row in rows}))
        case "t.parquet":
            pq.write_table(table, place)
        case "captions.txt":
            place.write_text("image,caption\n" + "".join(cells["t.csv"].format(**row) for row in rows))
        case "t.token":
            place.write_text("".join(f"{row['image']}#0\t{row['caption']}\n" for row in rows))
        case _:
            head = cells["t.tsv" if form == "t.tsv" else "t.csv"].format(image="image", caption="caption")
            place.write_text(head + "".join(cells[form].format(**row) for row in rows))


@pytest.mark.parametrize(
    "form", ["t.csv", "quoted.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet", "captions.txt", "t.token"]
)
def test_a_space_around_a_name_is_part_of_it_where_a_file_is_called_so(form, tmp_path):
    for name, colour in SPACED.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / name, "PNG")
    write_spaced(tmp_path / form, form)
    records = data.load(str(tmp_path / form), all_as="test")["test"]
    found = {row["image"]["path"].rpartition("/")[2]: row["captions"][0].removesuffix(", of course") for row in records}
    assert found == SPACED
    rows = image_rows([str(tmp_path / form)], Options())
    assert sorted(row["image"].rpartition("/")[2] for row in rows) == sorted(SPACED)


def test_a_space_around_a_name_in_a_list_is_part_of_it_where_a_file_is_called_so(tmp_path):
    for name, colour in SPACED.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / name, "PNG")
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in [*list(SPACED)[:-1], " e.jpg "]))
    rows = image_rows([str(tmp_path / "list.txt")], Options())
    assert [row["image"].rpartition("/")[2] for row in rows] == list(SPACED)


def test_a_text_that_another_one_supersedes_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    picture(tmp_path / "a.jpg")
    for name, text in (("a.jpg.txt", "a dog"), ("a.txt", "a cat")):
        (tmp_path / name).write_text(text)
    (row,) = data.load(str(tmp_path), all_as="test")["test"]
    assert row["captions"] == ["a dog"]
    assert "dropped: 1 texts x.txt of images that have x.jpg.txt" in caplog.text
