"""The actors of a Ray cluster that process shards. A worker returns a shard's error instead of raising it; one that
dies, or whose node does, is replaced, and its shard given to another."""

import contextlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable

from common.errors import UserError
from jobs.queue import Outcome, Queue, attempt, work_on
from jobs.shards import differences

logger = logging.getLogger(__name__)
POLL = 2.0  # seconds between checks of the workers' progress
DEATHS = 3  # of starting workers that end a run, if none has started


def connect():
    """Ray, connected to RAY_ADDRESS, or started on this machine alone where that is not set.

    Raises:
        UserError: Ray is not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install ray -c constraints.txt") from None
    address = os.environ.get("RAY_ADDRESS")
    if server := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or ""):
        try:
            socket.create_connection((server[1], int(server[2])), timeout=5).close()
        except OSError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: nothing answers there ({error}). Start the cluster (ray start --head), or unset it "
                "to run on this machine alone."
            ) from None
    of_this_machine = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **of_this_machine)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {str(error).splitlines()[0]}") from None
    return ray


def resources(ray, args, max_shards: int) -> tuple[int, dict]:
    """(workers, what each is given): one per GPU; without GPUs one per node, with all of its cores. UserError if the
    cluster does not have the GPUs."""
    total = {"GPU": 0.0} | ray.cluster_resources()
    gpus = args.gpus_per_worker if args.gpus_per_worker is not None else min(1.0, total["GPU"])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = args.workers or (max(1, int(total["GPU"] // gpus)) if gpus else len(nodes))
    if gpus * workers > total["GPU"]:
        raise UserError(f"--engine ray: {gpus * workers:g} GPUs are wanted, and the cluster has {total['GPU']:g}.")
    cpus = total["CPU"] / workers
    smallest = min(filter(None, (node.get("CPU") for node in nodes)))
    return min(workers, max(1, max_shards)), {
        "num_gpus": gpus,
        "num_cpus": min(smallest, int(cpus) if cpus >= 1 else cpus),
    }


class Actor:
    """One worker. `progress` can be called while `work_on` runs."""

    def __init__(self, work, reachable: Callable, folder: str, path: list[str]):
        sys.path[:] = dict.fromkeys([*path, *sys.path])
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths mean the same as where the run was started
        self.work, self.reachable, self.rows = work, reachable, 0

    def start(self) -> Outcome:
        """With the settings as counts, or why it cannot start."""
        outcome = attempt(self.work.start, None)
        outcome.raised = None  # of a class that may be unknown elsewhere
        return outcome

    def tick(self, rows: int) -> None:
        self.rows = rows

    def work_on(self, shard) -> Outcome:
        outcome = work_on(self.work, shard, self.tick, self.reachable)
        self.rows, outcome.raised = 0, None
        return outcome

    def progress(self) -> int:
        return self.rows


class Pool:
    """The workers, and what each is doing. `settings` are those that the first worker started with."""

    def __init__(self, ray, work, reachable: Callable, workers: int, resources: dict):
        self.ray, self.settings, self.deaths, self.polled = ray, None, 0, {}
        actor_class = ray.remote(Actor).options(max_concurrency=2, scheduling_strategy="SPREAD", **resources)
        arguments = ray.put(work), reachable, os.getcwd(), list(filter(None, sys.path))
        self.new = lambda: actor_class.remote(*arguments)
        self.tasks, self.idle = {}, []  # {what a worker will return: (worker, its shard, None while it starts)}
        self.waiting = time.monotonic()  # since when nobody works
        for _ in range(workers):
            self.add()

    @property
    def busy(self) -> list:
        """The workers that have a shard."""
        return [actor for actor, shard in self.tasks.values() if shard is not None]

    def add(self) -> None:
        actor = self.new()
        self.tasks[actor.start.remote()] = actor, None

    def give(self, shard) -> None:
        actor = self.idle.pop()
        self.tasks[actor.work_on.remote(shard)] = actor, shard

    def wait(self):
        """Waits up to POLL seconds, and yields the Outcome of each shard that has ended. Raises an error that keeps workers
        from starting."""
        ready, _ = self.ray.wait([*self.tasks], timeout=POLL)
        if ready or self.busy:
            self.waiting = time.monotonic()
        elif time.monotonic() - self.waiting > 60:
            self.waiting = time.monotonic()
            logger.warning("ray: no worker has started yet; free resources: %s", self.ray.available_resources())
        for ref in ready:
            actor, shard = self.tasks.pop(ref)
            try:
                outcome = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                self.replace(shard, error)
                outcome = Outcome(shard, {}, "its worker died: out of memory, or its node is gone", lost=True)
            else:
                self.idle.append(actor)
            if shard is not None:
                yield outcome
            elif not outcome.lost:
                self.started(outcome)

    def replace(self, shard, error: Exception) -> None:
        """Start another worker in place of one that died, on a shard or while it started."""
        logger.warning("a worker has died, another takes its place: %s", str(error).strip().splitlines()[0])
        self.add()
        self.deaths += shard is None
        if self.deaths >= DEATHS and not self.busy and not self.idle:
            raise UserError(f"--engine ray: workers die while they load the model. {error}") from None

    def started(self, outcome: Outcome) -> None:
        if outcome.error:
            raise UserError(outcome.error if outcome.expected else f"a worker cannot start: {outcome.trace}")
        self.settings = self.settings or outcome.counts
        if changes := differences(self.settings, outcome.counts):
            raise UserError(f"--engine ray: workers differ: {'; '.join(changes.values())}.")

    def rows(self) -> int:
        """Finished rows of the shards in progress."""
        asked = {actor.progress.remote(): actor for actor in self.busy}
        if not asked:
            return 0
        ready, _ = self.ray.wait([*asked], num_returns=len(asked), timeout=0.5)
        for ref in ready:
            with contextlib.suppress(self.ray.exceptions.RayError):  # it died: `wait` says so
                self.polled[asked[ref]] = self.ray.get(ref)
        return sum(self.polled.get(actor, 0) for actor in asked.values())


def run(work, begin: Callable, reachable: Callable, args, max_shards: int) -> list[Outcome]:
    """`jobs.queue.run` on a Ray cluster."""
    ray = connect()
    try:
        workers, per_worker = resources(ray, args, max_shards)
        logger.info(
            "ray: %d workers with %g CPUs and %g GPUs each", workers, per_worker["num_cpus"], per_worker["num_gpus"]
        )
        pool = Pool(ray, work, reachable, workers, per_worker)
        while not pool.idle:
            list(pool.wait())  # of shards, which nobody has yet
        shards, progress = begin(pool.settings)
        queue = Queue(shards, progress.finished)
        while pool.busy or not queue.empty():
            while pool.idle and not queue.empty():
                pool.give(queue.take())
            for outcome in pool.wait():
                queue.give(outcome)
            progress.tick(pool.rows())
        progress.close()
        return queue.failed
    finally:
        ray.shutdown()
