"""What is sent to SageMaker: the code of a training job, and a model with the code that serves it."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The code of a job, and nothing else: no data, caches, .git or secrets.
JOB = ("arguments.py", "captioner.py", "collator.py", "train.py", "evaluate.py", "infer.py", "export.py", "requirements.txt",
       "constraints.txt", "LICENSE", "recipes/**/*.yaml", "recipes/**/*.json", "sagemaker/*.py", "sagemaker/*.txt",
       "reports/report.*", "metrics/coco_caption/*.py",
       *(f"{folder}/*.py" for folder in ("common", "jobs", "drawn_scenes", "data", "data/formats", "captioning", "models", "objectives", "metrics", "training", "reports")))  # fmt: skip
# What inference.py imports.
SERVING = ("captioner.py", "collator.py", "common/*.py", "drawn_scenes/*.py", "data/*.py", "data/formats/*.py", "models/*.py", "objectives/cross_entropy.py",
           "metrics/coco_caption/text_checks.py")  # fmt: skip
# What from_pretrained reads, the card and the scores; no optimizer, no checkpoints, nothing else of the run.
MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*processor*.json",
         "token*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
         "chat_template.*", "README.md", "coco_metrics.json", "training_curves.svg", "training_curves.png")  # fmt: skip
# Installed on top of what the image has, in the exact versions that the tests run with (constraints.txt).
TESTED = ("accelerate", "datasets", "peft", "transformers")
# The images have numpy 1, as their toolkits require it; newer releases of pyarrow cannot be imported with it, but do
# not tell pip so.
FOR_THE_IMAGE = "pyarrow<26\n"


def requirements(path: str) -> str:
    """A requirements file of this repo as it is sent: with exact versions where the image must not choose them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    named = {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in text.splitlines()}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [pin for pin in pins if pin.partition("==")[0] in named.intersection(TESTED)]
    return "\n".join([text + FOR_THE_IMAGE.strip(), *pins]) + "\n"


def copy(patterns, folder: Path) -> None:
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def sent(path: str) -> bool:
    """Whether a job has this file of the repo."""
    return any(Path(path).resolve() == file.resolve() for pattern in JOB for file in ROOT.glob(pattern))


def write_job(folder: Path, recipe: str | None) -> tuple[int, int]:
    """The code of a training job, and the recipe as recipe.yaml, in `folder`; (files, bytes)."""
    copy(JOB, folder)
    (folder / "requirements.txt").write_text(requirements("requirements.txt"), encoding="utf-8")
    if recipe:
        shutil.copyfile(recipe, folder / "recipe.yaml")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def write_serving_code(code: Path) -> None:
    """`code`, the folder code/ of a model.tar.gz: inference.py, what it imports and its requirements.txt."""
    shutil.rmtree(code, ignore_errors=True)
    copy(SERVING, code)
    shutil.copyfile(ROOT / "sagemaker/inference.py", code / "inference.py")
    (code / "requirements.txt").write_text(requirements("sagemaker/requirements-serving.txt"), encoding="utf-8")


def write_model(model: Path, target: Path) -> None:
    """Writes what is deployed of a model folder, and the code, to `target`. An adapter is merged into its model, and .bin
    weights become safetensors.

    Raises:
        ValueError: the folder has no model, or it could not be exported here.
    """
    has_weights = any(model.glob("*.safetensors")) or any(model.glob("pytorch_model*.bin"))
    adapter = (model / "adapter_config.json").is_file()
    if not has_weights or not (adapter or (model / "config.json").is_file()):
        raise ValueError(f"{model}: no trained model: lacks config.json or *.safetensors.")
    if adapter or not any(model.glob("*.safetensors")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "export.py"), str(model.resolve()), "--output_dir", folder]
            done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)
            if done.returncode:
                raise ValueError(
                    f"{model}: {'an adapter' if adapter else '.bin weights'} that cannot be exported here: run python export.py "
                    f"{model} --output_dir DIR where train.py runs, and deploy DIR. ({done.stderr.strip().splitlines()[-1]})"
                )
            write_model(Path(folder), target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in MODEL for path in model.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
    write_serving_code(target / "code")


def pack_model(model: Path, archive: Path) -> None:
    """model.tar.gz as the inference toolkit expects it: the weights at its root, and code/."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        write_model(model, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            tar.add(path, path.name)
