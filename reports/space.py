"""A folder that is a Gradio Space of the Hub: demo.py, what it imports, and the model that it shows."""

import shutil
from importlib.metadata import version
from pathlib import Path

from common.files import write_text
from common.publish import files_to_upload

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    "demo.py", "demo_page.py", "arguments.py", "captioner.py", "collator.py", "LICENSE",
    *(f"{folder}/**/*.py" for folder in ("captioning", "common", "data", "drawn_scenes", "jobs", "metrics", "models", "objectives", "reports")),
)  # fmt: skip
APP = '''"""Starts the demo as a Space does: `python app.py`, then http://127.0.0.1:7860."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:] = ["--model_name_or_path", "model", "--host", "0.0.0.0", "--port", "7860", *sys.argv[1:]]
    runpy.run_path("demo.py", run_name="__main__")
'''
README = """---
title: {name}
emoji: 🖼️
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: {license}
pinned: false
---

Captions for images, by the model in `model/`: its card is [model/README.md](model/README.md).
"""


def write_space(folder: Path, model: Path, name: str, license: str | None) -> None:
    """Write the Space to `folder`, with what an upload of `model` takes in its folder model/.

    Args:
        name: its title.
        license: of the model, as the Hub calls it, or None.
    """
    for path in sorted({path for pattern in CODE for path in ROOT.glob(pattern)}):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    (folder / "model").mkdir(exist_ok=True)
    for file, content in files_to_upload(model).items():
        place = folder / "model" / file
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, place)
    # The Space brings Gradio itself.
    shutil.copyfile(ROOT / "requirements.txt", folder / "requirements.txt")
    write_text(folder / "app.py", APP)
    write_text(folder / "README.md", README.format(name=name, gradio=version("gradio"), license=license or "other"))
