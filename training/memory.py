"""How much memory a training run will need per process, from the model's config alone: no weights are read.

One training step is run with tensors that have a shape and no content (torch's FakeTensor), and what would be alive is
counted, so that attention, checkpointing and the logits of any family are included as they are.
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.sharding import strategy
from models.families import base_model
from objectives import caption_loss
from training.sharding import replace_tensors, units

# Bytes that an optimizer keeps per trained weight, by the start of its name.
OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw": 8, "adafactor": 0, "sgd": 0}
FOUR_BIT = 0.52  # bytes per weight in NF4 with its constants quantised too (arXiv 2305.14314: 4.127 bits)
PICTURE = (640, 480)  # of a photograph, for families that make more tokens from larger images


@dataclass
class Plan:
    """Bytes per process, except for the two counts of weights. `gathered` is what is temporarily gathered of sharded
    weights: in a training step, and in an evaluation."""

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    gathered_in_evaluation: float

    @property
    def training(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered

    @property
    def evaluation(self) -> float:
        """Without what captioning itself needs, which is little compared with training."""
        return self.weights + self.optimizer + self.gathered_in_evaluation

    def lines(self, card: float | None, processes: int) -> list[str]:
        """The plan in words. `card`: bytes of the device's memory."""
        processes_text = (
            f"{processes} processes, {strategy() or 'each with the whole model'}" if processes > 1 else "1 process"
        )
        rows = {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer,
            "activations": self.activations, "gathered": self.gathered, "training, in all": self.training,
            "evaluation, in all": self.evaluation,
        }  # fmt: skip
        lines = [
            f"parameters {self.parameters:,}, trained {self.trained:,} ({self.trained / self.parameters:.2%})",
            f"GiB per process ({processes_text}):",
            *(f"  {name:20}{size / 2**30:8.2f}" for name, size in rows.items()),
        ]
        if card:
            needed = max(self.training, self.evaluation)
            fits = "fits" if needed < 0.9 * card else "does not fit"
            lines.append(f"  {'this device has':20}{card / 2**30:8.2f}: it {fits}, with a tenth left for the libraries")
        return lines


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive, and their peak, without those of `model`."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = self.kept = 0  # kept: of gradients, what is left in the end less what was made
        self.seen = weakref.WeakSet(one.untyped_storage() for one in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:  # the number of places in a mask is known if the mask is a real one
            places = [
                one.nonzero(as_tuple=True) if one is not None and one.dtype == torch.bool else (one,) for one in args[1]
            ]
            args = (args[0], [one for group in places for one in group])
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now + self.kept)
        weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size


def plan(model, collator, args, rows_per_image: int, max_txt_len: int, quantization: str | None) -> Plan:
    """The plan of a run of `model`, which has no weights (models.loading.load_model) but marks those to train.

    rows_per_image: captions that share the encoding of an image in a step. max_txt_len: their length in tokens."""
    sharded, processes = strategy(), args.world_size
    shares = {"FSDP": 3, "ZeRO-3": 3, "ZeRO-2": 2, "ZeRO-1": 1}.get(sharded, 0)
    share = [1 / processes if shares > part else 1 for part in (2, 1, 0)]  # of weights, gradients, optimizer
    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    compute = args.autocast_dtype
    weights = weight_bytes(model, quantization)
    of_gradients = sum(4 * one.numel() for one in trained)
    gathered = evaluation = 0.0
    if sharded == "FSDP":
        size = compute.itemsize if compute else 4
        groups, inner = [], set()
        for unit in units(model):  # those inside others first
            groups.append(sum(one.numel() for one in set(unit.parameters()) - inner))
            inner |= set(unit.parameters())
        root = sum(one.numel() for one in parameters if one not in inner)
        gathered = size * (2 * max(groups) + root) + 4 * max(groups)
        evaluation = size * sum(one.numel() for one in parameters)
    elif processes > 1 and not sharded:
        gathered = of_gradients  # DDP's buckets
    counts = {"parameters": sum(map(torch.numel, parameters)), "trained": sum(map(torch.numel, trained))}
    caption = {"captions": ["a photo " * max_txt_len] * rows_per_image}
    activations = activation_bytes(model, collator, caption, args, share[1], sharded == "FSDP")
    return Plan(
        **counts,
        weights=weights * share[0],
        gradients=of_gradients * share[1],
        optimizer=optimizer_bytes(args.optim) * counts["trained"] * share[2],
        activations=max(0.0, activations - of_gradients * share[1]),
        gathered=gathered,
        gathered_in_evaluation=evaluation,
    )


def weight_bytes(model, quantization: str | None) -> float:
    """Bytes of all weights and buffers, weights that modules share counted once."""
    head = base_model(model).get_output_embeddings()
    small = {"4bit": FOUR_BIT, "8bit": 1.0}.get(quantization)
    linear = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head}
    sizes = [
        one.numel() * (small if small and one in linear and not one.requires_grad else one.element_size())
        for one in model.parameters()
    ]
    return sum(sizes) + sum(one.numel() * one.element_size() for one in model.buffers())


def optimizer_bytes(name: str) -> float:
    name = str(getattr(name, "value", name))
    return next((size for start, size in OPTIMIZER_BYTES.items() if name.startswith(start)), 8)


def activation_bytes(model, collator, caption: dict, args, share: float, in_compute: bool) -> float:
    """The peak, in a training step, of all that is neither weights nor optimizer state: activations and gradients.

    caption: of a record. share: the fraction of the gradients that this process keeps. in_compute: whether weights are
    already in the precision that they are computed in, and so are not cast again."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = args.autocast_dtype if in_compute else None

    def without_content(tensor):
        with fake:
            return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    replace_tensors(model, without_content)
    picture = Image.effect_noise(PICTURE, 50).convert("RGB")
    record = {"image": picture, "image_id": "0", "epoch": 0, **caption}
    batch = collator([record] * args.per_device_train_batch_size)
    alive = Alive(model)

    def keep(parameter):
        alive.kept -= parameter.grad.nbytes
        if args.gradient_accumulation_steps == 1:  # else those of the previous batch are there
            alive.kept += 4 * parameter.numel() * share

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)
    if args.gradient_accumulation_steps > 1:
        alive.kept = sum(4 * one.numel() * share for one in model.parameters() if one.requires_grad)
    model.train()
    if getattr(args, "activation_checkpointing", args.gradient_checkpointing):
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    precision = torch.autocast("cpu", dtype=args.autocast_dtype) if args.autocast_dtype else contextlib.nullcontext()
    with alive, precision:
        caption_loss(model, batch).backward()
    return alive.peak
