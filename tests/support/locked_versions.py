"""Compares the installed versions with requirements.lock, which has the versions that the test suite last passed with.

    python tests/support/locked_versions.py requirements.lock
        prints the differences, and what they mean for a failure of the tests
    python tests/support/locked_versions.py --write RESOLVED LOCK
        writes LOCK from uv's resolution, after checking it against the installed versions

`./dev test` and `./dev lock` call it. The lock is for Python 3.10 to 3.14, by environment markers.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

NAMED = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "pytest",
    "hypothesis",
)  # the most frequent causes of failures


def locked_versions(text: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The version of each distribution in a lock, for this Python and system.

    `environment` overrides values that environment markers are evaluated with.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def installed_versions() -> dict[str, str]:
    """The public version of each installed distribution, without a local part such as +cpu."""
    return {canonicalize_name(found.metadata["Name"]): Version(found.version).public for found in distributions()}


def explain(lock: Path, installed: dict[str, str]) -> list[str]:
    """Lines that say what a failure of the tests means, given the differences of the lock and this installation."""
    named = ", ".join(f"{name} {installed[name]}" for name in NAMED if name in installed)
    lines = [f"  here: Python {platform.python_version()}, {platform.machine()}; {named}"]
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError:
        return [*lines, f"  there is no {lock.name} to compare these versions with"]
    locked = locked_versions(text)
    different = {name: version for name, version in locked.items() if installed.get(name, version) != version}
    if different:
        first = sorted(different, key=lambda name: (name not in NAMED, name))
        shown = [f"{name} {different[name]}" for name in first[:8]]
        more = f" and {len(first) - len(shown)} more" if len(first) > len(shown) else ""
        return [
            *lines,
            f"  the suite last passed with other versions ({lock.name}): {', '.join(shown)}{more}",
            "  what it means: most likely one of them has changed. ./dev setup --locked installs the versions of that "
            "list; when ./dev test passes then, a newer package is the cause",
        ]
    return [
        *lines,
        f"  these are the versions that the suite last passed with ({lock.name})",
        "  what it means: your changes, or this machine (its CPU, GPU or Python). Where git status shows no changes "
        "it is a fault of sdpnet: please report it with the log and the output of sdpnet doctor",
    ]


def write(resolved: str, lock: Path, installed: dict[str, str], today: datetime.date) -> None:
    """Writes the lock. Raises `SystemExit` if it would install other versions than the suite has passed with."""
    locked = locked_versions(resolved)
    both = {name: version for name, version in locked.items() if name in installed}
    different = [f"{name} {want} ({installed[name]} passed)" for name, want in both.items() if want != installed[name]]
    if different:
        raise SystemExit(f"the lock would name other versions than passed: {', '.join(different)}")
    header = [
        "# The versions that the whole test suite last passed with; ./dev setup --locked installs exactly these.",
        f"# {today}: Python {platform.python_version()} on {platform.system()} {platform.machine()}. Lines for other "
        "Pythons come from the same resolution.",
        "# Written by ./dev lock.",
    ]
    lock.write_text("\n".join([*header, *resolved.strip().splitlines()]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="RESOLVED", type=Path)
    parser.add_argument("lock", type=Path)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write.read_text(encoding="utf-8"), arguments.lock, installed_versions(), datetime.date.today())
    else:
        print("\n".join(explain(arguments.lock, installed_versions())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
