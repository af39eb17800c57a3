"""METEOR's table of paraphrases, cut down to the captions at hand.

The table has five million entries, and every METEOR process spends five seconds loading it. An entry can only match
where both of its phrases occur in the captions: some tens of thousands do, in a set of 5,000 images. Given those alone,
METEOR starts in a moment and its counts are the same.

METEOR's own normalizer moves, drops and replaces punctuation before it looks phrases up. So phrases and captions are
compared as sequences of words made of letters and digits, which it leaves alone; entries too many do no harm.
"""

import gzip
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather

logger = logging.getLogger(__name__)


def write_paraphrases(table: Path, captions: Iterable[str], path: Path) -> None:
    """Write the entries of METEOR's paraphrase table that these captions may need, in their order, to a .gz file."""
    entries = _entries(table)
    longest = int(entries.schema.metadata[b"longest"])
    phrases = {""}  # a phrase of punctuation only is always kept
    for caption in set(captions):
        words = re.sub(r"[\W_]+", " ", caption.lower()).split()
        for length in range(1, longest + 1):
            phrases.update(" ".join(words[at : at + length]) for at in range(len(words) - length + 1))
    phrases = pa.array(phrases)
    for side in ("reference", "paraphrase"):
        occurs = pc.is_in(entries[side], value_set=phrases)
        entries = entries.filter(pc.or_(occurs, pc.is_in(entries[f"{side}_words"], value_set=phrases)))
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as file:
        for reference, paraphrase in zip(
            *(entries[side].to_pylist() for side in ("reference", "paraphrase")), strict=True
        ):
            file.write(f"0\n{reference}\n{paraphrase}\n")  # METEOR reads past the probability


def _entries(table: Path) -> pa.Table:
    """The table as columns `reference` and `paraphrase`, with `..._words` where these have punctuation, else null.

    Unpacking takes some seconds, so the result is kept in the user's cache folder (about 120 MB) where that can be
    written to.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caption-metrics"
    file = cache / f"meteor-paraphrases-{table.stat().st_size}.feather"
    try:
        return feather.read_table(file)
    except (OSError, pa.ArrowInvalid):
        entries = _unpack(table)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=cache, suffix=".tmp")
        os.close(descriptor)
        try:
            feather.write_feather(entries, temporary, compression="zstd")
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        logger.info("METEOR's paraphrase table is not kept for the next time: %s", error)
    return entries


def _unpack(table: Path) -> pa.Table:
    with gzip.open(table) as file:
        content = file.read()
    ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
    offsets = np.concatenate([[0], ends + 1]).astype(np.int32)
    lines = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(content))
    columns, longest = {}, 0
    for line, side in ((1, "reference"), (2, "paraphrase")):  # line 0 of an entry is its probability
        phrases = pc.utf8_rtrim(lines.take(pa.array(np.arange(line, len(lines), 3))), characters="\n")
        words = pc.utf8_trim(pc.replace_substring_regex(phrases, r"[^\p{L}\p{N}]+", " "), characters=" ")
        longest = max(longest, pc.max(pc.count_substring(words, " ")).as_py() + 1)
        columns[side] = phrases
        columns[f"{side}_words"] = pc.if_else(pc.equal(words, phrases), None, words)
    return pa.table(columns).replace_schema_metadata({"longest": str(longest)})
