"""Every place that captions: what each says of the same pictures.

The scripts' own main() runs in this process, as importing the libraries takes longer than what they do here.
"""

import contextlib
import importlib
import io
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

from captioner import Captioner


def script(name: str, *words) -> None:
    arguments = [f"{name}.py", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        importlib.import_module(name).main()


def by_infer(folder, images, output, *flags) -> list[str]:
    script("infer", *images, "--model_name_or_path", folder, "--output", output, *flags)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == list(map(str, images))
    return [row["caption"] for row in rows]


def by_demo(folder, images) -> list[str]:
    """The captions of both tabs, with the settings that the page starts with."""
    gr, page = importlib.import_module("gradio"), importlib.import_module("demo_page")
    captioner = Captioner.from_pretrained(str(folder))
    with gr.Blocks():
        settings = {name: component.value for name, component in page.settings_panel(captioner).items()}
    *_, (_, rows, _) = page.caption_files(captioner, 9, list(map(str, images)), lambda *done, **unit: None, **settings)
    one_by_one = [page.caption_image({"": captioner}, str(image), **settings)[0] for image in images]
    assert [caption for _, caption, _ in rows] == one_by_one
    return one_by_one


def by_endpoint(folder, images) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "sagemaker"))
        handlers = importlib.import_module("inference")
    captioner = handlers.model_fn(str(folder))
    jobs = [handlers.input_fn(image.read_bytes(), "image/png") for image in images]
    return [handlers.predict_fn(job, captioner)["captions"][0] for job in jobs]


def by_snippet(folder, images, tmp_path) -> list[str]:
    """What the card's code prints, run as it is printed, next to the folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    (tmp_path / folder.name).symlink_to(folder)
    printed = []
    for image in images:
        shutil.copy(image, tmp_path / "photo.jpg")
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        printed.append(out.getvalue().removesuffix("\n"))
    return printed


def captions(folder, images, tmp_path) -> dict[str, list[str]]:
    """{place: its captions of `images`} for the folder of a run, with the settings that it was trained with."""
    exported = tmp_path / "exported"
    script("export", folder, "--output_dir", exported)
    (tmp_path / "beside").mkdir()
    return {
        "infer": by_infer(folder, images, tmp_path / "infer.jsonl"),
        "demo": by_demo(folder, images),
        "endpoint": by_endpoint(exported, images),
        "export": by_infer(exported, images, tmp_path / "export.jsonl"),
        "card's code": by_snippet(folder, images, tmp_path),
        "exported card's code": by_snippet(exported, images, tmp_path / "beside"),
    }
