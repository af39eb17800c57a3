"""Make a self-contained model folder with its card from a training run or checkpoint, and optionally upload it.

python export.py DIR [--output_dir OUT] [--push_to_hub user/name [--dry_run]]
python export.py DIR --output_dir OUT --format onnx [--int8]      graphs for ONNX Runtime
python export.py captions.jsonl --push_to_hub user/name [--dry_run]     what infer.py wrote, as a data set with a card
python export.py DIR --space OUT        a Space of the Hub with the demo and the model, to look at and to upload
"""

from arguments import EXPORT_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(EXPORT_GROUPS, positional="folder")  # answers --help and mistakes before torch is imported

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path

import torch

from captioner import Captioner
from captioning.dataset import is_output, write_dataset
from common.errors import UserError
from common.files import output_folder, share_weights
from common.publish import copy_to_upload, files_to_upload, upload
from data import seen
from models.loading import keep_published_names, load_model
from models.onnx_export import write_graphs
from models.onnx_model import OnnxModel
from reports.model_card import read_run, write_card
from reports.space import write_space

logger = logging.getLogger("export")
RECORDS = (
    "run.json", "coco_metrics.json", "validation/coco_metrics.json", "training_curves.svg", "training_curves.png",
)  # fmt: skip


def main():
    args, paths = parse(EXPORT_GROUPS, positional="folder")
    source, in_place = Path(paths[0]), not (args.output_dir or args.space)
    if is_output(paths[0]):
        upload_captions(paths[0], args)
        return
    with target(source, args) as folder:
        merge = args.merge and not in_place  # an adapter that stays where it is stays one
        model, processor = load_model(str(source), merge=merge)
        if isinstance(model, OnnxModel):
            raise UserError(f"{source} holds ONNX graphs: export the model that they were made from.")
        if args.format == "onnx":
            write_graphs(model, folder, args.int8)
            model.config.onnx_precision = "int8" if args.int8 else "float32"
            # Captions of rounded weights are others than those that the run's scores are of.
            save_beside(model, processor, source, folder, () if args.int8 else RECORDS)
            model = OnnxModel(model.config, folder)
        elif not in_place or not any(source.glob("*.safetensors")):  # .bin weights become safetensors
            save(model, processor, source, folder, merge)
        model.generation_config.save_pretrained(folder)
        run, scores = read_run(folder)
        write_card(folder, run, scores, as_scored(Captioner(model, processor), scores), args.push_to_hub)
        if args.space:
            name = source.resolve().name
            write_space(
                output_folder(args.space), folder, name, run.get("license") or run.get("model", {}).get("license")
            )
            logger.info(
                "look at it: cd %s && python app.py. Upload it: hf upload USER/%s . --type space", args.space, name
            )
        elif not args.dry_run:
            logger.info("%s is self-contained, with its card in README.md", folder)
        if args.push_to_hub:
            upload(files_to_upload(folder), args.push_to_hub, dry_run=args.dry_run)


def upload_captions(output: str, args) -> None:
    if not args.push_to_hub or args.output_dir or args.space or args.format != "safetensors":
        raise UserError(f"{output} holds captions: they are only uploaded, with --push_to_hub user/name [--dry_run].")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(output, args.push_to_hub, Path(folder))
        files = {path.name: path for path in sorted(Path(folder).iterdir())}
        upload(files, args.push_to_hub, dry_run=args.dry_run, repo_type="dataset")


@contextlib.contextmanager
def target(source: Path, args):
    """The folder to export to; of a dry run and a Space a temporary one, so that nothing else changes."""
    if not (args.dry_run or args.space):
        yield output_folder(args.output_dir) if args.output_dir else source
        return
    with tempfile.TemporaryDirectory() as folder:
        if not (args.output_dir or args.space):
            copy_to_upload(source, Path(folder))
        yield Path(folder)


def save(model, processor, source: Path, folder: Path, merge: bool) -> None:
    """Write model and processor to `folder`, with what is recorded about them, and compare the weights with those in memory."""
    keep_published_names(model)
    model.save_pretrained(folder)
    share_weights(folder)
    save_beside(model, processor, source, folder)
    exported, _ = load_model(str(folder), merge=merge)
    for (name, one), (_, other) in zip(model.named_parameters(), exported.named_parameters(), strict=True):
        if not torch.equal(one, other):
            raise UserError(f"{folder} does not hold the weights of {source}: {name} differs. Export it again.")


def save_beside(model, processor, source: Path, folder: Path, records: tuple[str, ...] = RECORDS) -> None:
    """Write to `folder` what belongs to weights: configs, processor and the `records` that the run left about them."""
    model.config.save_pretrained(folder)  # not among an adapter's own files
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # A checkpoint's scores and history are those of its run, one folder up.
    run_folder = source if (source / "run.json").is_file() else source.parent
    for name in records:
        if (run_folder / name).is_file() and run_folder == source:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run_folder / name, folder / name)
    if (run_folder / seen.NAME).is_file():  # for evaluate.py; it is not uploaded
        shutil.copyfile(run_folder / seen.NAME, folder / seen.NAME)


def as_scored(captioner: Captioner, scores: list[dict]) -> Captioner:
    """The captioner with the settings of the folder's scores, if it has any."""
    settings = next((of_split["generation"] for of_split in scores if "generation" in of_split), {})
    named = {name: value for name, value in settings.items() if name not in ("precision", "corrupt")}
    return Captioner(captioner.model, captioner.processor, **named)


if __name__ == "__main__":
    run(main)
