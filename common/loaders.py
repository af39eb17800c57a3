"""DataLoaders that cannot wait forever: limited to the available shared memory, and by a timeout."""

import itertools
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, IterableDataset

from common.limits import free_shared_memory

logger = logging.getLogger(__name__)
TIMEOUT = 180  # seconds to wait for a worker's batch before the worker is considered dead
warned = []  # the warning that shared memory is small, once per process
MEASURED = 2  # samples used to estimate the size of a batch


def data_loader(dataset, collate_fn, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A DataLoader with at most `num_workers` workers: no more than batches, none for a single one, which nothing could
    be prepared beside (where processes are spawned, each takes seconds to start), and as many as shared memory has room
    for. It raises a RuntimeError if a worker dies, or sends nothing for TIMEOUT seconds."""
    if not isinstance(dataset, IterableDataset):
        num_workers = min(num_workers, math.ceil(len(dataset) / batch_size)) if len(dataset) > batch_size else 0
    num_workers, prefetch = fit_workers(dataset, collate_fn, batch_size, num_workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        timeout=TIMEOUT if num_workers else 0,
    )


def ahead(batches):
    """`batches` in order, the next one made in a thread while the caller works on the current one: reading and resizing
    images release the GIL, and a model on a CPU does not keep every core busy all the time."""
    iterator, end = iter(batches), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (batch := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield batch


def fit_workers(
    dataset, collate_fn, batch_size: int, num_workers: int, prefetch: int | None = None, held: int = 2
) -> tuple[int, int | None]:
    """(workers, batches that each prepares ahead), no more than asked for, that fit in half of the free shared memory,
    divided among the processes of this machine. (0, None) if not even one worker's fit. `held` is the number of batches
    that the consumer of the loader holds at once; 2 in a loop, whose variable keeps the last one.

    Batches travel through /dev/shm, of which Docker gives a container 64 MB, and stay there as long as the consumer
    holds them. When it is full, the thread that sends them dies, and torch's DataLoader waits for its worker forever.
    """
    if not num_workers:
        return 0, None
    # By name: file descriptors are fetched from the worker itself, which no timeout covers.
    torch.multiprocessing.set_sharing_strategy("file_system")
    asked = prefetch or 2
    free = free_shared_memory()
    if free is None:
        return num_workers, asked
    batch = _batch_bytes(dataset, collate_fn, batch_size)
    room = max(0, free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // batch - held)  # in batches
    workers = min(num_workers, room)
    ahead = min(asked, room // workers) if workers else 0
    if (workers, ahead) != (num_workers, asked) and not warned:
        warned.append(True)
        logger.warning(
            "/dev/shm has %.0f MB free and a batch takes %.0f MB: %d of %d DataLoader workers are used, %d batch(es) ahead. "
            "In Docker, --shm-size=8g gives it more (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
            free / 1e6, batch / 1e6, workers, num_workers, ahead,
        )  # fmt: skip
    return workers, ahead or None


def _batch_bytes(dataset, collate_fn, batch_size: int) -> int:
    """An estimate from the first samples, plus a quarter as others may be larger."""
    samples = list(itertools.islice(dataset, MEASURED))
    if not samples:
        return 1
    batch = (collate_fn or torch.utils.data.default_collate)(samples)
    tensors = batch.values() if isinstance(batch, dict) else [batch]
    size = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    return int(1.25 * size * batch_size / len(samples))
