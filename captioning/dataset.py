"""The captions of a finished infer.py run as a data set of the Hub: names of images, captions and a card, nothing else of the source."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from captioning.output import several_in, shard_folder
from captioning.writers import form_of
from common.errors import UserError
from common.files import write_text
from common.publish import without_local_paths
from jobs.progress import look
from jobs.shards import REPORT, SETTINGS

NAME = "captions.parquet"
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
# How the captions were made. The address of a server is nobody's business.
SHOWN = ("model", "prompt", "num_beams", "do_sample", "temperature", "top_p", "max_new_tokens", "precision", "weights")
CARD = """# {title}

{captions:,} captions of {images:,} images, written by a model and not checked by a person: they can name things that are not in the
picture, miscount, and guess at people from their looks. The images are not here; `image` is the name of each in its folder.

```python
from datasets import load_dataset

captions = load_dataset("{title}", split="train")
```

| made with | |
|---|---|
{rows}
"""


def is_output(path: str) -> bool:
    """Whether a run of infer.py (or rewrite.py) has written to `path`."""
    return any(Path(place, SETTINGS).is_file() for place in (path, f"{path}.shards"))


def write_dataset(output: str, title: str, folder: Path) -> None:
    """Write captions.parquet and README.md to `folder`.

    Args:
        output: the --output of infer.py, in any form but .txt.
        title: the data set's id on the Hub, user/name.

    UserError if the run is not finished, or if two images would have one name.
    """
    status = look(output)
    if status.state != "finished":
        raise UserError(f"{output} is {status.state}: finish it with the same infer.py command, then upload it.")
    shards = shard_folder(output, form_of(output, None))
    schemas = [schema for schema, _ in shards.footers([*shards.outputs().values()]).values()]
    if not all("image" in schema.names for schema in schemas):
        raise UserError(f"{output} has no captions of images: name the --output of an infer.py run.")
    report = shards.read_json(REPORT)
    column = "captions" if several_in(report["settings"]) else "caption"
    rows = [
        (row["image"], row[column])
        for name in shards.outputs().values()
        for row in shards.rows(name, ["image", column])
        if row[column] is not None
    ]
    names = public_names([name for name, _ in rows])
    if len(set(names)) < len(names):
        raise UserError(
            f"{output}: without their folders, which are not uploaded, two images have one name. Caption each folder by itself."
        )
    texts = [text for _, text in rows]
    pq.write_table(pa.table({"image": names, column: texts}), folder / NAME)
    captions = sum(map(len, texts)) if column == "captions" else len(texts)
    size = next((size for most, size in SIZES.items() if len(rows) < most), "n>10M")
    metadata = DatasetCardData(
        license="other",
        task_categories=["image-to-text"],
        tags=["image-captioning", "synthetic"],
        size_categories=[size],
        configs=[{"config_name": "default", "data_files": NAME}],
    )
    made_with = without_local_paths({name: report["settings"].get(name) for name in SHOWN})
    cells = {name: str(value).replace("|", "\\|") for name, value in made_with.items() if value not in (None, "")}
    table = "\n".join(f"| {name} | {' '.join(value.split())} |" for name, value in cells.items())
    body = CARD.format(title=title, captions=captions, images=len(rows), rows=table)
    write_text(folder / "README.md", str(DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")))


def public_names(names: list[str]) -> list[str]:
    """The names without the folder, or the address, that all of them are in; of absolute ones that share none the last parts."""
    parts = [name.replace("\\", "/").split("/") for name in names]
    folders = zip(*(of_name[:-1] for of_name in parts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda folder: len(set(folder)) == 1, folders))
    absolute = any(of_name[0] in ("", "~") or of_name[0].endswith(":") for of_name in parts)
    if absolute and shared < 3:  # perhaps the homes of two people
        return [of_name[-1] for of_name in parts]
    return ["/".join(of_name[shared:]) for of_name in parts]
