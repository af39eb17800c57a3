"""train.py with a record of all that it learns from, and a signal at a chosen moment.

    RECORD=folder [MOMENT='step 5' SIGNAL=SIGKILL] python tests/helpers/recorded_train.py --flag value ...

Each process appends a JSON line per batch to folder/RANK.jsonl. A moment is 'step N' (in its first batch), 'epoch N' (after
its last step), 'evaluation N' (while captions are written) or 'save N' (while a checkpoint is written), counted from the
start of this process, or 'seconds N'. Of several processes all get a SIGKILL, and the last one any other signal.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from arguments import TRAIN_GROUPS  # noqa: E402
from common.cli import check  # noqa: E402


def write_down(trainer, batch) -> None:
    import torch

    labels = batch["labels"].view(len(batch["image_ids"]), -1, batch["labels"].shape[-1])
    tokenizer = trainer.processing_class.tokenizer
    rows = [
        {
            "epoch": epoch,
            "image": image,
            "captions": [tokenizer.decode(row[row != -100]) for row in rows if (row != -100).any()],
            "pixels": hashlib.blake2b(pixels.cpu().numpy().tobytes(), digest_size=6).hexdigest(),
        }
        for epoch, image, rows, pixels in zip(
            batch.pop("epochs"), batch["image_ids"], labels, batch["pixel_values"], strict=True
        )
    ]
    line = {
        "step": trainer.state.global_step + 1,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "noise": hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=6).hexdigest(),
        "samples": [row for row in rows if row["captions"]],
    }
    with open(Path(os.environ["RECORD"], f"{trainer.args.process_index}.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def before(owner, name: str, action) -> None:
    """Makes the method `name` call `action` with its arguments first."""
    method = getattr(owner, name)

    def with_action(self, *args, **kwargs):
        action(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    setattr(owner, name, with_action)


def with_epochs(collate):
    """Batches have the epoch of each sample, too, which a stream may change inside a step."""
    return lambda self, samples: collate(self, samples) | {"epochs": [sample["epoch"] for sample in samples]}


class Moment:
    """Sends SIGNAL to this process when MOMENT has come."""

    def __init__(self):
        self.word, _, self.number = os.environ.get("MOMENT", "never 0").partition(" ")
        self.signal, self.count = getattr(signal, os.environ.get("SIGNAL", "SIGKILL")), 0
        is_last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if self.signal != signal.SIGKILL and not is_last:
            self.word = "never"
        if self.word == "seconds":
            timer = threading.Timer(float(self.number), os.kill, (os.getpid(), self.signal))
            timer.daemon = True
            timer.start()

    def come(self, word: str, number: int | None = None) -> None:
        if word == self.word:
            self.count += 1
            if (number or self.count) == int(self.number):
                self.word = "never"
                os.kill(os.getpid(), self.signal)


def main() -> None:
    check(TRAIN_GROUPS)
    from captioner import Captioner
    from collator import CaptionCollator
    from training.signals import StopOnSignal
    from training.streams import PassEnds
    from training.trainer import CaptionTrainer

    moment = Moment()
    CaptionCollator.__call__ = with_epochs(CaptionCollator.__call__)
    before(CaptionTrainer, "compute_loss", lambda trainer, model, batch, **_: write_down(trainer, batch))
    before(CaptionTrainer, "compute_loss", lambda trainer, *_, **__: moment.come("step", trainer.state.global_step + 1))
    before(StopOnSignal, "on_epoch_end", lambda *_, **__: moment.come("epoch"))
    before(PassEnds, "on_pass_end", lambda *_: moment.come("epoch"))
    before(CaptionTrainer, "_save_optimizer_and_scheduler", lambda *_: moment.come("save"))
    in_evaluation = []
    before(CaptionTrainer, "_evaluate_now", lambda *_: in_evaluation.append(True))
    before(
        Captioner,
        "caption_batch",
        lambda *_, **__: in_evaluation and (in_evaluation.clear(), moment.come("evaluation")),
    )
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
