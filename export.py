"""Make a self-contained model folder with its card from a training run or checkpoint, and optionally upload it.

python export.py DIR [--output_dir OUT] [--push_to_hub user/name [--dry_run]]
"""

from arguments import EXPORT_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(EXPORT_GROUPS, positional="folder")  # answers --help and mistakes before torch is imported

import logging
import shutil
from pathlib import Path

import torch

from captioner import Captioner
from common.errors import UserError
from common.files import output_folder, share_weights
from common.publish import upload
from data import seen
from models.loading import load_model
from reports.model_card import read_run, write_card

logger = logging.getLogger("export")


def main():
    args, paths = parse(EXPORT_GROUPS, positional="folder")
    source = Path(paths[0])
    folder = output_folder(args.output_dir) if args.output_dir else source

    merge = args.merge and folder != source  # an adapter that stays where it is stays one
    model, processor = load_model(str(source), merge=merge)
    captioner = Captioner(model, processor)
    if folder != source or not any(source.glob("*.safetensors")):  # .bin weights become safetensors
        model.save_pretrained(folder)
        model.config.save_pretrained(folder)  # not among an adapter's own files
        share_weights(folder)
        processor.save_pretrained(folder)
        # A checkpoint's scores and history are those of its run, one folder up.
        run_folder = source if (source / "run.json").is_file() else source.parent
        for name in ("run.json", "coco_metrics.json", "validation/coco_metrics.json", "training_curves.svg"):
            if (run_folder / name).is_file() and run_folder == source:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(run_folder / name, folder / name)
        if (run_folder / seen.NAME).is_file():  # for evaluate.py; it is not uploaded
            shutil.copyfile(run_folder / seen.NAME, folder / seen.NAME)
        exported, _ = load_model(str(folder), merge=merge)
        for (name, one), (_, other) in zip(model.named_parameters(), exported.named_parameters(), strict=True):
            if not torch.equal(one, other):
                raise UserError(f"{folder} does not hold the weights of {source}: {name} differs. Export it again.")
    model.generation_config.save_pretrained(folder)
    run, scores = read_run(folder)
    write_card(folder, run, scores, as_scored(captioner, scores), args.push_to_hub)
    logger.info("%s is self-contained, with its card in README.md", folder)

    if args.push_to_hub:
        upload(folder, args.push_to_hub, dry_run=args.dry_run)


def as_scored(captioner: Captioner, scores: list[dict]) -> Captioner:
    """The captioner with the settings of the folder's scores, if it has any."""
    settings = next((of_split["generation"] for of_split in scores if "generation" in of_split), {})
    named = {name: value for name, value in settings.items() if name not in ("precision", "corrupt")}
    return Captioner(captioner.model, captioner.processor, **named)


if __name__ == "__main__":
    run(main)
