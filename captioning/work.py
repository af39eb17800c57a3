"""What infer.py does with a shard, in a process of its own or in a worker of Ray: its captions, and its file."""

import functools
import time

from captioning import output, server
from captioning.again import Again
from captioning.rows import ImageRows, caption, in_order
from captioning.shards import ImageSource, identity
from common.weights import fingerprint
from jobs.journal import answers_of


class CaptionShards:
    """Captions a shard and writes its file. Each worker has one of these."""

    def __init__(self, load, args, source: ImageSource, folder, earlier: output.Earlier, again: Again | None):
        self.load, self.args, self.source, self.folder, self.earlier = load, args, source, folder, earlier
        self.again = again

    def start(self) -> dict:
        """Load the model; returns the settings that must stay the same during a run."""
        self.captioner, self.settings = self.load()
        self.served = server.is_served(self.settings["model"])
        if not self.served:
            self.settings["weights"] = fingerprint(self.settings["model"], self.settings["revision"] or "main")
        return self.settings

    def __call__(self, shard, tick) -> dict:
        write = self.write_again if self.again else self.write
        if not self.served:
            return write(shard, tick)
        file = answers_of(self.folder, shard)
        with self.captioner.journal(file, file.parent.glob("*.jsonl")):
            counts = write(shard, tick)
        file.unlink()  # its answers are in the shard's file now
        return counts

    def write(self, shard, tick) -> dict:
        started, captioned = time.time(), {}
        self.captioner.count_anew()
        rows = functools.partial(self.source.rows, shard)
        if shard.storage == "rows":  # else each DataLoader worker would read the source up to here
            listed = rows()
            captioned = {row["key"]: (row, self.earlier.of(row)) for row in listed}
            rows = functools.partial(iter, [row for row in listed if captioned[row["key"]][1] is None])
        captions = caption(self.captioner, ImageRows(rows, self.args.per_device_eval_batch_size), self.args)
        if shard.storage != "rows":
            captions = in_order(captions)
        for number, (row, outcome) in enumerate(captions, 1):
            captioned[row["key"]] = row, outcome
            tick(number)
        several = output.several_in(self.settings)
        written = [output.row_of(self.folder, row, outcome, several) for row, outcome in captioned.values()]
        sources = {row["source"] for row, _ in captioned.values()}
        seconds = time.time() - started
        cut = [number for number, (_, outcome) in enumerate(captioned.values()) if "cut" in outcome]
        counted = self.captioner.counts() | {"cut_rows": cut}
        return output.write_shard(self.folder, shard, written, seconds, self.settings, sources, counted)

    def write_again(self, shard, tick) -> dict:
        started, outcomes, listed = time.time(), {}, self.again.rows[shard]
        self.captioner.count_anew()
        rows = functools.partial(self.source.rows, shard)
        left = ImageRows(rows, self.args.per_device_eval_batch_size, lambda row: identity(row) in listed)
        for number, (row, outcome) in enumerate(caption(self.captioner, left, self.args), 1):
            outcomes[identity(row)] = outcome
            tick(number)
        seconds = time.time() - started
        return self.again.write(shard, outcomes, seconds, self.settings, self.captioner.counts())
