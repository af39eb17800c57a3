"""The actors of a Ray cluster that process shards. A worker returns a shard's error instead of raising it; one that
dies, or whose node does, is replaced, and its shard given to another."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable

from common.errors import UserError
from jobs.queue import Outcome, Patient, Queue, attempt

logger = logging.getLogger(__name__)
POLL = 2.0  # seconds between checks of the workers' progress
DEATHS = 3  # of starting workers that end a run, if none has started


def connect(args):
    """Ray, connected to RAY_ADDRESS, or started on this machine alone where that is not set.

    Raises:
        UserError: Ray is not installed, nothing answers at the address, or the cluster does not have the GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install ray -c constraints.txt") from None
    address = os.environ.get("RAY_ADDRESS")
    if found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or ""):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=5).close()
        except OSError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: nothing answers there ({error}). Start the cluster (ray start --head), or unset it "
                "to run on this machine alone."
            ) from None
    own = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {str(error).splitlines()[0]}") from None
    there = ray.cluster_resources()
    wanted = (args.gpus_per_worker or 0) * (args.workers or 1)
    if wanted > there.get("GPU", 0):
        raise UserError(f"--engine ray: {wanted:g} GPUs are wanted, and the cluster has {there.get('GPU', 0):g}.")
    return ray


def resources(ray, args, most: int) -> tuple[int, dict]:
    """(workers, what each is given): one per GPU; without GPUs one per node, with all of its cores."""
    there = ray.cluster_resources()
    gpus = args.gpus_per_worker if args.gpus_per_worker is not None else float(there.get("GPU", 0) > 0)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = args.workers or (int(there["GPU"] // gpus) if gpus else len(nodes))
    cpus = there["CPU"] / workers
    smallest = min(node["CPU"] for node in nodes if node.get("CPU"))
    return min(workers, max(1, most)), {"num_gpus": gpus, "num_cpus": min(smallest, int(cpus) if cpus >= 1 else cpus)}


class Actor:
    """One worker. `progress` can be called while `work_on` runs."""

    def __init__(self, work, reachable: Callable, folder: str, path: list[str]):
        sys.path[:] = [*path, *(place for place in sys.path if place not in path)]
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths mean the same as where the run was started
        self.work, self.patient, self.rows = work, Patient(work, reachable), 0

    def start(self) -> tuple[dict | None, Outcome | None]:
        """(settings, None), or (None, why not)."""
        settings: dict = {}

        def begin(*_) -> dict:
            settings.update(self.work.start())
            return {}

        outcome = attempt(begin, None, self.tick)
        outcome.raised = None  # of a class that may be unknown elsewhere
        return (None, outcome) if outcome.error else (settings, None)

    def tick(self, rows: int) -> None:
        self.rows = rows

    def work_on(self, shard) -> Outcome:
        outcome = attempt(self.patient, shard, self.tick)
        self.rows, outcome.raised = 0, None
        return outcome

    def progress(self) -> int:
        return self.rows


class Pool:
    """The workers, and what each is doing."""

    def __init__(self, ray, work, reachable: Callable, workers: int, each: dict):
        self.ray, self.deaths, self.polled = ray, 0, {}
        kind = ray.remote(Actor).options(max_concurrency=2, scheduling_strategy="SPREAD", **each)
        arguments = ray.put(work), reachable, os.getcwd(), [place for place in sys.path if place]
        self.new = lambda: kind.remote(*arguments)
        self.starting, self.busy, self.idle = {}, {}, []
        for _ in range(workers):
            self.add()

    def add(self) -> None:
        actor = self.new()
        self.starting[actor.start.remote()] = actor

    def give(self, shard) -> None:
        actor = self.idle.pop()
        self.busy[actor.work_on.remote(shard)] = (actor, shard)

    def wait(self):
        """Waits up to POLL seconds, and yields (settings, None) for each worker that has started and (None, outcome)
        for each shard that has ended. Raises an error that keeps workers from starting."""
        ready, _ = self.ray.wait([*self.starting, *self.busy], timeout=POLL)
        for ref in ready:
            actor, shard = self.busy.pop(ref) if ref in self.busy else (self.starting.pop(ref), None)
            try:
                found = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                logger.warning("a worker has died, another takes its place: %s", str(error).strip().splitlines()[0])
                self.add()
                if shard is not None:
                    yield None, Outcome(shard, {}, "its worker died: out of memory, or its node is gone", lost=True)
                    continue
                self.deaths += 1
                if self.deaths == DEATHS and not self.busy and not self.idle:
                    raise UserError(f"--engine ray: workers die while they load the model. {error}") from None
                continue
            if shard is None and found[1] is not None:
                raise UserError(found[1].error if found[1].expected else f"a worker cannot start: {found[1].trace}")
            self.idle.append(actor)
            yield (found[0], None) if shard is None else (None, found)

    def rows(self) -> int:
        """Finished rows of the shards in progress."""
        asked = {actor: actor.progress.remote() for actor, _ in self.busy.values()}
        ready, _ = self.ray.wait([*asked.values()], num_returns=len(asked), timeout=0.5) if asked else ([], [])
        known = {}
        for actor, ref in asked.items():
            try:
                known[actor] = self.ray.get(ref) if ref in ready else self.polled.get(actor, 0)
            except self.ray.exceptions.RayError:
                known[actor] = 0
        self.polled = known
        return sum(known.values())


def run(work, begin: Callable, reachable: Callable, args, most: int) -> list[Outcome]:
    """`jobs.queue.run` on a Ray cluster."""
    ray = connect(args)
    try:
        workers, each = resources(ray, args, most)
        logger.info("ray: %d workers with %g CPUs and %g GPUs each", workers, each["num_cpus"], each["num_gpus"])
        pool = Pool(ray, work, reachable, workers, each)
        settings, queue, progress, waiting = None, None, None, time.monotonic()
        while queue is None or pool.busy or not queue.empty():
            while pool.idle and queue is not None and not queue.empty():
                pool.give(queue.take())
            for started, outcome in pool.wait():
                if outcome is not None:
                    queue.give(outcome)
                elif settings is None:
                    settings = started
                    shards, progress = begin(settings)
                    queue = Queue(shards, progress.finished)
                elif started != settings:
                    raise UserError(f"--engine ray: workers differ in {_differing(settings, started)}.")
            if pool.busy:
                waiting = time.monotonic()
                progress.tick(pool.rows())
            elif pool.starting and time.monotonic() - waiting > 60:
                waiting = time.monotonic()
                logger.warning("ray: no worker has started yet; free resources: %s", ray.available_resources())
        progress.close()
        return queue.failed
    finally:
        ray.shutdown()


def _differing(one: dict, other: dict) -> str:
    return "; ".join(
        f"{name}: {one.get(name)!r} and {other.get(name)!r}" for name in one if one[name] != other.get(name)
    )
