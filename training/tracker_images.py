"""Validation images with the model's captions, for the trackers that show images."""

import io
import textwrap

from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from data import open_image


def log_samples(callbacks: list, records, predictions: dict[str, str], step: int) -> None:
    """One sheet of `records`, each image with its caption from `predictions` {image_id: caption}, to TensorBoard, Weights &
    Biases and Trackio, if they are among the trainer's `callbacks`: there a slider moves through the steps."""
    boards = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    trackers = [callback._wandb for callback in callbacks if isinstance(callback, WandbCallback)]
    trackers += [callback._trackio for callback in callbacks if isinstance(callback, TrackioCallback)]
    boards, trackers = list(filter(None, boards)), list(filter(None, trackers))
    if not boards and not trackers:
        return
    sheet, file = draw_sheet(records, predictions), io.BytesIO()
    for writer in boards:
        writer.add_figure("captions", sheet, step, close=False)
    sheet.savefig(file, dpi=100)
    for tracker in trackers:
        tracker.log({"captions": tracker.Image(Image.open(file)), "train/global_step": step})


def draw_sheet(records, predictions: dict[str, str]):
    """A matplotlib figure of four images per row, with captions above them and the first reference below."""
    from matplotlib.figure import Figure

    rows = -(-len(records) // 4)
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flat
    for axis, row in zip(axes, records, strict=False):
        axis.imshow(open_image(row["image"]))
        caption, reference = predictions[row["image_id"]], row["captions"][0]
        axis.set_title(textwrap.fill(caption, 38), fontsize=10, parse_math=False)
        axis.set_xlabel(textwrap.fill(f"reference: {reference}", 44), fontsize=8, color="gray", parse_math=False)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    return figure
