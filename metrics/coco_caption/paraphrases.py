"""METEOR's table of paraphrases, cut down to the given captions.

The table has five million entries, and every METEOR process spends five seconds loading it. An entry can only match
where both of its phrases occur in the captions: some tens of thousands do, in a set of 5,000 images. Given those alone,
METEOR starts in a moment and its counts are the same.

METEOR's own normalizer moves, drops and replaces punctuation before it looks phrases up. So phrases and captions are
compared as sequences of words made of letters and digits, which it leaves alone, and as hashes of these; extra
entries do no harm.
"""

import gzip
import hashlib
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

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: of a phrase's polynomial hash, modulo 2**64


def write_paraphrases(table: Path, captions: Iterable[str], path: Path, cache: str | os.PathLike | None = None) -> None:
    """Write the entries of METEOR's paraphrase table that these captions may need, in their order, to a .gz file.

    `cache`: folder in which the unpacked table is kept; default: one in the user's cache folder.
    """
    phrases, entries = _tables(table, cache)
    hashes, longest = phrases["hash"].to_numpy(), int(phrases.schema.metadata[b"longest"])
    lines = re.sub(r"[^\w\n]|_", " ", "\n".join(set(captions)).lower()).split("\n")
    occurring = _hashes([line.split() for line in lines], longest)
    occurs = _contains(occurring, hashes)
    references, paraphrases = entries["reference"].to_numpy(), entries["paraphrase"].to_numpy()
    kept = np.flatnonzero(occurs[references])
    kept = kept[occurs[paraphrases[kept]]]
    texts = [phrases["phrase"].take(pa.array(ids[kept])).to_pylist() for ids in (references, paraphrases)]
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as file:
        # METEOR reads past the probability
        file.writelines(f"0\n{reference}\n{paraphrase}\n" for reference, paraphrase in zip(*texts, strict=True))


def _hashes(captions: list[list[str]], longest: int) -> np.ndarray:
    """Hashes of all runs of at most `longest` words, and of the phrase without words, which is always kept."""
    lengths = np.array([len(caption) for caption in captions])
    word, remaining = _word_hashes([w for caption in captions for w in caption]), np.repeat(np.cumsum(lengths), lengths)
    remaining -= np.arange(len(word))
    hashes, run = [np.zeros(1, np.uint64)], np.zeros(len(word), np.uint64)
    for length in range(1, longest + 1):
        start = np.flatnonzero(remaining >= length)
        if not len(start):
            break
        run[start] = run[start] * _BASE + word[start + length - 1]
        hashes.append(run[start])
    return np.unique(np.concatenate(hashes))


def _word_hashes(words: list[str]) -> np.ndarray:
    number: dict[str, int] = {}
    ids = [number.setdefault(word, len(number)) for word in words]
    digests = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in number)
    return np.frombuffer(digests, dtype=np.uint64)[ids] if words else np.zeros(0, np.uint64)


def _contains(values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Whether each hash of `asked` is among the sorted `values`."""
    bits = 24
    likely = np.zeros(1 << bits, dtype=bool)  # by the first bits: of millions, few are left to search for
    likely[values >> np.uint64(64 - bits)] = True
    result = likely[asked >> np.uint64(64 - bits)]
    left = np.flatnonzero(result)
    at = np.minimum(np.searchsorted(values, asked[left]), len(values) - 1)
    result[left] = values[at] == asked[left]
    return result


def _tables(table: Path, cache: str | os.PathLike | None) -> tuple[pa.Table, pa.Table]:
    """(distinct phrases with `phrase` and `hash`, entries with the numbers of `reference` and `paraphrase` there).

    Unpacking takes some seconds, so both are kept in the cache folder (about 150 MB) where that can be written to, and
    mapped from there.
    """
    cache = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caption-metrics")
    files = [cache / f"meteor-{name}-{table.stat().st_size}.feather" for name in ("phrases", "entries")]
    try:
        return tuple(feather.read_table(file, memory_map=True) for file in files)
    except (OSError, pa.ArrowInvalid):
        tables = _unpack(table)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # so that a file is there complete or not at all
            for file, content in zip(files, tables, strict=True):
                feather.write_feather(
                    content, f"{folder}/{file.name}", compression="uncompressed", chunksize=len(content)
                )
                os.replace(f"{folder}/{file.name}", file)
    except OSError as error:
        logger.info("METEOR's paraphrase table could not be kept for the next time: %s", error)
    return tables


def _unpack(table: Path) -> tuple[pa.Table, pa.Table]:
    encoded = pa.chunked_array(_phrases(table)).dictionary_encode().combine_chunks()
    phrases = pc.utf8_rtrim(encoded.dictionary, characters="\n")
    words = pc.utf8_trim(pc.replace_substring_regex(phrases, r"[^\p{L}\p{N}]+", " "), characters=" ")
    split = pc.split_pattern(words, " ")
    lengths = pc.list_value_length(split).to_numpy(zero_copy_only=False)
    distinct = split.flatten().dictionary_encode()
    texts = distinct.dictionary.to_pylist()
    of_text = _word_hashes(texts)
    of_text[[text == "" for text in texts]] = 0  # what splitting makes of a phrase without words
    word = of_text[distinct.indices.to_numpy()]
    first, hashes = np.cumsum(lengths) - lengths, np.zeros(len(phrases), np.uint64)
    for position in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > position)
        hashes[longer] = hashes[longer] * _BASE + word[first[longer] + position]
    ids = encoded.indices.to_numpy()
    entries = {"reference": ids[: len(ids) // 2], "paraphrase": ids[len(ids) // 2 :]}
    index = pa.table({"phrase": phrases, "hash": hashes}).replace_schema_metadata({"longest": str(int(lengths.max()))})
    return index, pa.table(entries)


def _phrases(table: Path) -> list[pa.Array]:
    """The phrases of all references, then of all their paraphrases, each with its line feed."""
    sides, unread = ([], []), b""
    with gzip.open(table) as file:
        while block := file.read(1 << 24):
            block = unread + block
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            ends = ends[: len(ends) // 3 * 3]
            offsets = np.concatenate([[0], ends + 1]).astype(np.int32)
            lines = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(block))
            # Line 0 of an entry is its probability, 1 the reference's phrase, 2 its paraphrase.
            for line, side in enumerate(sides, 1):
                side.append(lines.take(pa.array(np.arange(line, len(lines), 3))))
            unread = block[offsets[-1] :]
    return [*sides[0], *sides[1]]
