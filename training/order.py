"""The order of training samples: a function of the seed and the epoch alone, whatever number of processes trains."""

import numpy as np
import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices


class TrainingBatches(BatchRebalanceSampler):
    """This process's batches of the data set's current epoch.

    What the processes take together is what one process would take in a batch of their summed size: the last ones of an
    epoch are shared evenly, where accelerate would repeat others to fill them up. If fewer samples are left than there
    are processes, some get one that another has, which the trainer does not count.

    With `iterations` above 1 an optimizer step's batches come as often, one step after the other; those of an epoch's last
    step come once if they are fewer than others'.

    Of the library's sampler it has only the class, by which the Trainer and accelerate know that batches are this
    process's own and of any length.
    """

    def __init__(self, dataset, args, batch_size: int, iterations: int = 1):
        """dataset: CaptionPairs. args: TrainArguments. batch_size: of one process."""
        self.dataset, self.process, self.processes = dataset, args.process_index, args.world_size
        self.together = batch_size * args.world_size
        self.whole, self.rest = divmod(len(dataset), self.together)
        self.rest *= not args.dataloader_drop_last
        self.accumulated, self.iterations = args.gradient_accumulation_steps, iterations
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.strategy, self.lengths = args.train_sampling_strategy, None
        if self.strategy == "group_by_length":
            # The library's own sampler needs the lengths of token ids, which the collator makes later.
            self.lengths, self.a_step = dataset.lengths(), self.together * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return len(self.numbers())

    def numbers(self) -> list[int]:
        """Which of the epoch's batches come one after the other."""
        repeated = self.whole // self.accumulated * self.accumulated if self.iterations > 1 else 0
        steps = [range(first, first + self.accumulated) for first in range(0, repeated, self.accumulated)]
        numbers = [number for step in steps for _ in range(self.iterations) for number in step]
        return [*numbers, *range(repeated, self.whole + (self.rest > 0))]

    def is_repeated(self, step: int) -> bool:
        """Whether the optimizer step after `step` others has the batches of the one before."""
        steps = -(-len(self) // self.accumulated)
        return step % steps % self.iterations > 0

    def __iter__(self):
        order = self.order()
        for number in self.numbers():
            batch = order[number * self.together : (number + 1) * self.together]
            batch += batch[:1] * (self.processes - len(batch))
            yield np.array_split(batch, self.processes)[self.process].tolist()

    def order(self) -> list[int]:
        """All samples in the order of this epoch."""
        generator = torch.Generator().manual_seed(self.seed + int(self.dataset.epoch))
        if self.strategy == "group_by_length":
            return get_length_grouped_indices(self.lengths, self.a_step, generator=generator)
        if self.strategy == "sequential":
            return list(range(len(self.dataset)))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    @property
    def ends_with_a_repeated_sample(self) -> bool:
        return 0 < self.rest <= self.process
