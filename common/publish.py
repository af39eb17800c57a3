"""Uploads to the Hub: only the files listed here, without any path of this machine in them."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
from pathlib import Path, PureWindowsPath

from common.errors import UserError
from common.text import each_value

logger = logging.getLogger(__name__)

# Weights, what from_pretrained reads, the card, and scores. Nothing else of a run: no checkpoints, no TensorBoard files
# or reports (they contain images of the dataset), no captions per image, no pickles.
UPLOADED = (
    "*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx.data", "config.json", "generation_config.json", "adapter_config.json",
    "*processor*.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.*", "README.md", "LICENSE*", "training_curves.svg", "training_curves.png", "run.json",
    "coco_metrics.json", "validation/coco_metrics.json", ".eval_results/*.yaml",
)  # fmt: skip
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CLEANED = ("run.json", "coco_metrics.json")
# Two parts or more below a root, a drive or a home; not a URL, not a closing tag.
PATH = re.compile(r"""(?<![\w/.:<\\])(?:~|[A-Za-z]:)?[/\\][\w.@%+=~ -]*[\w.@%+=~-][/\\][^\s"'`|<>(),;]+""")
FLAG = re.compile(r"--[^=]*=")
ABSOLUTE = re.compile(r"(?:[~/]|\\\\|[A-Za-z]:[/\\]).*")  # one line


def copy_to_upload(source: Path, folder: Path) -> None:
    """Copies of the files that an upload of `source` takes; of weights, which nobody changes, links where there can be some."""
    for path in _uploaded(source):
        place = folder / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # another file system, or one without links
            if path.suffix == ".safetensors":
                os.link(path.resolve(), place)
        if not place.exists():
            shutil.copyfile(path, place)


def _uploaded(folder: Path) -> list[Path]:
    return sorted({path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()})


def files_to_upload(folder: Path) -> dict[str, Path | bytes]:
    """{name in the repository: file, or the content that is uploaded in its place}."""
    files = _uploaded(folder)
    if not any(path.suffix in (".safetensors", ".onnx") for path in files):
        raise UserError(f"{folder} holds no weights (*.safetensors, or *.onnx) to upload.")
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def upload(
    files: dict[str, Path | bytes], repo_id: str, *, dry_run: bool = False, repo_type: str = "model", **options
) -> None:
    """Upload `files`, as `files_to_upload` gives them, to a Hub repository, which is created if needed; with `dry_run` only
    list them. `options` (token, revision, private) are huggingface_hub's."""
    if dry_run:
        total = 0
        for name, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            total += size
            print(f"{size:>15,}  {name}")
        print(f"{total:>15,}  bytes in {len(files)} files would be uploaded to {repo_id}")
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    api, private = HfApi(token=options.get("token")), options.get("private")
    repo_id = api.create_repo(repo_id, exist_ok=True, private=private, repo_type=repo_type).repo_id
    api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=f"Upload the {repo_type} and its card",
        revision=options.get("revision"),
        repo_type=repo_type,
    )
    folder = "datasets/" if repo_type == "dataset" else ""
    logger.info("uploaded %d files to https://huggingface.co/%s%s", len(files), folder, repo_id)


def without_local_paths(value):
    """`value` (JSON data), with every path of this machine cut to its last part."""
    return each_value(value, _without_local_paths)


def _without_local_paths(value, name: str):
    if not isinstance(value, str):
        return value
    return shlex.join(map(_word, shlex.split(value))) if name == "command" else _word(value)


def _word(text: str) -> str:
    if flag := FLAG.match(text):
        return flag[0] + _word(text.removeprefix(flag[0]))
    if text.endswith((".yaml", ".yml")) and Path(text).absolute().is_relative_to(RECIPES):
        return Path(text).absolute().relative_to(RECIPES.parent).as_posix()  # of this repo, so no path of yours
    is_path = ABSOLUTE.fullmatch(text) or (re.search(r"[/\\]", text) and os.path.exists(text))
    return PureWindowsPath(text).name or text if is_path else _without_paths(text)


def _content(path: Path) -> Path | bytes:
    """The file, or what is uploaded in its place if it names a path of this machine."""
    if path.name == "README.md":  # made without them, but a person may have edited it
        return _without_paths(path.read_text(encoding="utf-8")).encode()
    if path.name in CLEANED or path.name.endswith("config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        cleaned = without_local_paths(content)
        if cleaned != content:
            return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    return path


def _without_paths(text: str) -> str:
    return PATH.sub(lambda match: PureWindowsPath(match.group()).name, text)
