"""Prediction and reference files: every format, every fault."""

import io
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import DataError
from data.caption_files import load_predictions, load_references, read_references


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coco.json", [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": ""}]),
        ("map.json", {"1": "a", "2": ""}),
        ("lists.json", {"1": ["a"], "2": [""]}),
        ("p.jsonl", '{"image_id": 1, "caption": "a"}\n\n{"image_id": "2", "caption": ""}\n'),
        ("p.txt", '{"image": "1", "captions": "a", "score": 3}\n{"image": "2", "captions": [""]}'),
        ("bom.json", '\ufeff{"1": "a", "2": ""}'),
        ("annotations.json", {"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": ""}]}),
    ],
)
def test_predictions_are_read_in_every_format(tmp_path, name, content):
    assert load_predictions(write(tmp_path / name, content)) == {"1": "a", "2": ""}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "coco.json",
            {"images": [], "annotations": [{"image_id": i, "caption": c} for i, c in [(1, "a"), (2, "c"), (1, "b")]]},
        ),
        ("map.json", {"1": ["a", "b"], "2": ["c"]}),
        ("r.jsonl", '{"image_id": 1, "captions": ["a", "b"]}\n{"image": "2", "captions": "c"}'),
        ("rows.json", [{"image_id": "1", "captions": ["a", "b"]}, {"image_id": "2", "captions": ["c"]}]),
    ],
)
def test_references_are_read_in_every_format(tmp_path, name, content):
    assert load_references(write(tmp_path / name, content)) == {"1": ["a", "b"], "2": ["c"]}


LISTS = {
    "json": '["a cat, it sits", "the cat\'s mat"]',
    "python": """['a cat, it sits', "the cat's mat"]""",
    "numpy": """['a cat, it sits' "the cat's mat"]""",
    "sentences": [{"raw": "a cat, it sits", "tokens": ["a"]}, {"raw": "the cat's mat"}],
    "list": ["a cat, it sits", "the cat's mat"],
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.jsonl", "r.parquet", "map.json", "rows.json"])
def test_a_list_of_captions_is_its_captions_in_every_file(name, kind, tmp_path):
    table = pandas.DataFrame({"image": ["1.jpg", "2.jpg"], "captions": [LISTS[kind], LISTS[kind]]})
    path = tmp_path / name
    if name.endswith("sv"):
        table.to_csv(path, index=False, sep="\t" if name == "r.tsv" else ",")
    elif name == "r.parquet":
        table.to_parquet(path)
    elif name == "map.json":
        write(path, dict(zip(table["image"], table["captions"], strict=True)))
    else:
        table.to_json(path, orient="records", lines=name == "r.jsonl")
    expected = ["a cat, it sits", "the cat's mat"]
    assert load_references(path) == {"1.jpg": expected, "2.jpg": expected}


PUBLISHED = {
    "captions.txt": "image,caption\n1.jpg,a cat, it sits\n1.jpg,the cat\n2.jpg,a dog\n",
    "Flickr8k.token.txt": "1.jpg#0\ta cat, it sits\n1.jpg#1\tthe cat\n2.jpg#0\ta dog\n",
    "TextCaps_val.json": {
        "data": [
            {"image_id": image, "caption_str": said, "image_name": image, "set_name": "val"}
            for image, said in (("1.jpg", "a cat, it sits"), ("1.jpg", "the cat"), ("2.jpg", "a dog"))
        ]
    },
    "vizwiz.json": {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "a cat, it sits", "is_rejected": False},
            {"image_id": 1, "caption": "Quality issues are too severe", "is_precanned": True},
            {"image_id": 1, "caption": "the cat"},
            {"image_id": 2, "caption": "spam", "is_rejected": True},
            {"image_id": 2, "caption": "a dog"},
        ],
    },
    "upper.csv": 'Image Name,Caption\n1.jpg,"a cat, it sits"\n1.jpg,the cat\n2.jpg,a dog\n',
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_train_reads_is_read_as_references_too(name, tmp_path):
    found = load_references(write(tmp_path / name, PUBLISHED[name]))
    assert list(found.values()) == [["a cat, it sits", "the cat"], ["a dog"]]


def test_a_caption_that_holds_rows_of_its_file_is_refused(tmp_path):
    path = write(tmp_path / "r.json", {"1.jpg": ["a dog\n2.jpg,a cat\n3.jpg,a man"]})
    with pytest.raises(ValueError, match="spans rows of the file"):
        load_references(path)


def test_captions_in_numbered_columns_are_those_of_the_image(tmp_path):
    path = write(tmp_path / "r.csv", "image,caption_0,caption_1\n1.jpg,a cat,\n2.jpg,a dog,the dog\n")
    assert load_references(path) == {"1.jpg": ["a cat"], "2.jpg": ["a dog", "the dog"]}


def test_a_prediction_of_json_is_what_it_says(tmp_path):
    path = write(tmp_path / "p.json", {"1": '["a", "b"]'})
    assert load_predictions(path) == {"1": '["a", "b"]'}


def test_one_line_of_jsonl_is_no_map(tmp_path):
    assert load_predictions(write(tmp_path / "p.jsonl", {"image_id": 7, "caption": "a"})) == {"7": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.json",
            [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}],
            "entry 1: image '1' has more than one",
        ),
        ("p.json", {"1": ["a", "b"]}, "entry 0: image '1' has more than one"),
        ("p.json", {"1": []}, "empty list"),
        ("p.json", {"1": None}, "entry 0: a caption must be text, found NoneType"),
        ("p.json", [{"image_id": 1, "caption": 5}], r"entry 0: a caption must be text, found int 5"),
        (
            "p.json",
            [{"image_id": 1, "words": "a"}],
            "no caption column. Columns present: image_id, words. Name it with --caption_column",
        ),
        ("p.json", [{"caption": "a"}], "entry 0: no 'image_id'"),
        ("p.json", [{"image_id": True, "caption": "a"}], "entry 0: no 'image_id'"),
        ("p.json", ["a"], "entry 0: expected an object"),
        ("p.json", "5", "holds a int"),
        ("p.json", "", "p.json is empty"),
        ("p.json", '{"1": "a",\n "2" "b"}', "p.json: not valid JSON: .* line 2 column 6"),
        ("p.jsonl", '{"image_id": 1, "caption": "a"}\n{"image_id"', "p.jsonl line 2: not valid JSON"),
        (
            "p.jsonl",
            '{"image_id": 1, "caption": "a"}\n{"image_id": 2}',
            "p.jsonl, line 2: a caption must be text, found NoneType",
        ),
    ],
)
def test_a_faulty_file_is_refused_with_its_name_and_place(tmp_path, name, content, message):
    with pytest.raises(match=message) as error:
        load_predictions(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value)


def test_an_image_without_reference_captions_is_refused(tmp_path):
    with pytest.raises(match="entry 0: image '1' has no reference captions"):
        load_references(write(tmp_path / "r.json", {"1": []}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        load_predictions(tmp_path / "none.json")


REFERENCES = {"images": [{"id": n, "file_name": f"{c}/{n}.jpg"} for c in "ab" for n in (ord(c), ord(c) + 10)],
              "annotations": [{"image_id": ord(c) + n, "caption": c} for c in "ab" for n in (0, 10)]}  # fmt: skip


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "p.parquet", "folder"])
def test_a_prediction_is_matched_by_id_and_name_together(tmp_path, name):
    references = read_references(write(tmp_path / "r.json", REFERENCES))

    def read(**columns) -> dict:
        table = pandas.DataFrame(columns)
        (tmp_path / "folder").mkdir(exist_ok=True)
        path = tmp_path / name
        if name == "p.csv":
            table.to_csv(path, index=False)
        elif name.startswith("p.json"):
            table.to_json(path, orient="records", lines=name == "p.jsonl")
        else:
            table.to_parquet(path / "part-0.parquet" if name == "folder" else path)
        return load_predictions(path, references)

    files = ["/x/b/98.jpg", "b\\108.png", "97"]
    right = {"98": "x", "108": "y", "97": "z"}
    assert read(image=files, caption=["x", "y", "z"]) == right
    assert read(image_id=[98, 108, 97], image=files, caption=["x", "y", "z"]) == right
    assert read(id=[97, 98, 108], image=files, caption=["x", "y", "z"]) == right  # a running number
    with pytest.raises(
        DataError, match=r"id '97' is image '97' of the references, and file '/x/b/98\.jpg' is image '98'"
    ):
        read(image_id=[97], image=files[:1], caption=["x"])
    for other in ("prediction", "generated_caption"):
        with pytest.raises(DataError, match=f"could be {other} or caption. Say which with --caption_column"):
            read(image=files[:1], caption=["x"], **{other: ["y"]})


def test_an_image_that_a_prediction_names_is_no_others(tmp_path):
    references = read_references(write(tmp_path / "r.json", {"cam1/1.jpg": "a", "cam1/2.jpg": "b"}))
    path = write(tmp_path / "p.json", {"cam2/1.jpg": "wrong", "cam1/1.jpg": "right"})
    assert load_predictions(path, references) == {"cam2/1.jpg": "wrong", "cam1/1.jpg": "right"}


@pytest.mark.parametrize("word", ["", "nan", "N/A", None])
def test_a_reference_that_is_missing_is_refused_and_a_prediction_is_what_it_says(tmp_path, word):
    path = write(tmp_path / "r.json", [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": word}])
    with pytest.raises(DataError, match=r"r\.json, entry 1: a caption of image '2' is empty"):
        load_references(path)
    if word is not None:
        assert load_predictions(path) == {"1": "a", "2": word}


def test_half_an_emoji_is_text(tmp_path):
    path = write(tmp_path / "p.json", '[{"image_id": 1, "caption": "a dog \\ud83d"}]')
    assert load_predictions(path) == {"1": "a dog ?"}
    assert load_references(path) == {"1": ["a dog ?"]}


@pytest.mark.parametrize("column", ["image_id", "name"])
def test_references_of_two_images_under_one_id_are_refused(column, tmp_path):
    """Images that lie in the source are known by their content: without that, all captions were of one image."""
    rows = []
    for number in range(3):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(file, "PNG")
        path = "image.png" if column == "name" else f"{number}.png"
        own = {"image_id": "7"} if column == "image_id" else {}
        rows.append({"image": {"bytes": file.getvalue(), "path": path}, "caption": f"picture {number}"} | own)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"row 1: '(7|image\.png)' names another image than in an earlier row"):
        load_references(tmp_path / "r.parquet")
