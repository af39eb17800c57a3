"""A reward of your own: a function in a file, named as `FILE.py:FUNCTION` in --reward.

The function is called once per batch, with what its parameters are named after: `candidates` (list of str, the captions),
and for each of them `references` (a list of str), its image's id in `image_ids`, the picture in `images` (RGB), and the
row's value of any other column of the data set; `**columns` takes all of these. `output_dir` is the run's folder, for what it
keeps. It returns a number for each candidate, or None where it has nothing to say: that counts as 0, and not in the mean that
is logged.

An `async def` function runs in a thread of its own, batch after batch. There it waits for a server while the captions of the
step's other batches are drawn (grpo; the other objectives wait for it).
"""

import asyncio
import functools
import importlib.util
import inspect
import math
import numbers
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.errors import UserError
from data import open_image


class RewardFailed(UserError):
    """A reward could not be computed in the middle of a run. Without a message: in another process, which says it."""


@functools.cache
def own_function(name: str):
    """The function `FILE.py:FUNCTION`; its file is run. UserError in one line if there is none."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"reward: {name}: there is no file {file}.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"reward: {name}: {file} cannot be run: {_last_line(error)}.") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"reward: {name}: {file} has no function {function}.")
    return getattr(module, function)


def own_files(reward: str) -> list[str]:
    """The files of the functions that --reward names."""
    words = reward.replace(",", " ").split()
    return sorted({f"{word.rpartition('.py:')[0]}.py" for word in words if ".py:" in word})


class OwnReward:
    """`rows` are {image id: the record}. UserError if a parameter of the function is none of a record's columns. `pool`: the
    thread of an `async def` function."""

    def __init__(self, name: str, rows, output_dir: str | None = None):
        self.name, self.function, self.rows, self.output_dir = name, own_function(name), rows, output_dir
        self.waits = inspect.iscoroutinefunction(self.function)
        self.pool = ThreadPoolExecutor(1) if self.waits else None
        parameters = inspect.signature(self.function).parameters.values()
        self.parameters = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
        columns = [name for name in rows.columns if name not in ("image", "captions", "image_id")]
        available = ["candidates", "references", "image_ids", "images", *columns]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            self.parameters = available
        available = [*available, "output_dir"]
        for parameter in self.parameters:
            if parameter not in available:
                raise UserError(f"reward: {name}: its parameter {parameter} is none of {', '.join(available)}.")

    def __call__(self, image_ids, candidates, references, ended) -> torch.Tensor:
        times = len(candidates[0])
        values = {"candidates": [text for group in candidates for text in group], "output_dir": self.output_dir}
        for name in self.parameters:
            if name not in values:
                column = references if name == "references" else self._column(name, image_ids)
                values[name] = [value for value in column for _ in range(times)]
        try:
            rewards = self.function(**{name: values[name] for name in self.parameters})
            rewards = list(asyncio.run(rewards) if self.waits else rewards)
        except UserError as error:
            raise RewardFailed(f"reward: {self.name}: {error}") from error
        except Exception as error:
            raise RewardFailed(f"reward: {self.name} failed: {_last_line(error)}.") from error
        if len(rewards) != len(values["candidates"]):
            raise RewardFailed(
                f"reward: {self.name} returned {len(rewards)} values for {len(values['candidates'])} candidates."
            )
        for caption, reward in zip(values["candidates"], rewards, strict=True):
            if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
                raise RewardFailed(
                    f"reward: {self.name} returned {reward!r} for {caption!r}, which is neither a number nor None."
                )
        rewards = [math.nan if reward is None else reward for reward in rewards]
        return torch.tensor(rewards, dtype=torch.float32).view(len(image_ids), times)

    def _column(self, name: str, image_ids) -> list:
        if name == "image_ids":
            return image_ids
        rows = [self.rows[image_id] for image_id in image_ids]
        return [open_image(row["image"]) for row in rows] if name == "images" else [row[name] for row in rows]


def _last_line(error: Exception) -> str:
    """What was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})"
