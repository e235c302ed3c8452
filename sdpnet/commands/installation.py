"""What is installed and what this machine has, found without torch.

It is the first part of `sdpnet doctor`, and all of it where torch is missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Final

from PIL import features
from rich.console import Console
from rich.table import Table
from rich.text import Text

import sdpnet
from sdpnet.flags.doctor import add_arguments
from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.machine import cgroup_cores, cpu_name, driver, installed_versions, usable_cores
from sdpnet.pipelines.native import decoder
from sdpnet.pipelines.terminal.remedy import checkout, missing_package, rebuild
from sdpnet.reporting.output import say

__all__ = ["add_arguments", "installation", "machine_rows", "print_rows", "run", "version_rows"]

NARROW: Final = 50  # columns: the names take 22 of them
CONSEQUENCE: Final = "Conversion, verification and the plan work here. Training and the pipelines do not:"


def installation() -> dict[str, Any]:
    """The versions, the place that sdpnet is imported from, the Python program, the driver and the cores."""
    return {
        "versions": {
            "sdpnet": sdpnet.__version__,
            **installed_versions(),
            "libjpeg-turbo (Pillow)": features.version("libjpeg_turbo"),
        },
        "imported_from": str(Path(sdpnet.__path__[0]).resolve()),
        "is_checkout": checkout() is not None,
        "interpreter": sys.executable,
        "driver": driver(),
        "cpu": cpu_name(),
        "usable_cores": len(usable_cores()),
        "cgroup_cores": cgroup_cores(),
    }


def version_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and values of the versions, of the place that sdpnet is imported from, and of the Python program."""
    place = facts["imported_from"] + (" (a checkout)" if facts["is_checkout"] else "")
    (first, *others) = [(name, version or "not installed") for name, version in facts["versions"].items()]
    return [first, ("imported from", place), ("interpreter", facts["interpreter"]), *others]


def machine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and values of the driver and the cores."""
    limit = facts["cgroup_cores"]
    limited = f", limited to {limit:g} by the container" if limit is not None else ""
    cores = f"{facts['usable_cores']} usable{limited}; {facts['cpu'] or 'unknown'}"
    return [("NVIDIA driver", facts["driver"] or "none found"), ("cores", cores)]


def print_rows(rows: list[tuple[str, str]], console: Console) -> None:
    """Prints names and values in two columns, or in one if the terminal is narrow.

    A pair of empty texts is an empty line.
    """
    if console.width < NARROW:
        for name, value in rows:
            console.print(printable(f"{name}: {value}" if name else ""), markup=False, soft_wrap=True)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(printable(name)), Text(printable(value)))
    console.print(table)


def _why_not() -> str:
    """Why torch cannot be imported, and what to do about it."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        return missing_package(error) or str(error)
    return "torch could not be imported at first"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command where torch is missing or broken: nothing is measured. Returns 0."""
    facts = installation()
    facts["crop_decoder"] = None if decoder.available() else f"cannot be used; to fix it: {rebuild()}"
    facts["verdict"] = [CONSEQUENCE, _why_not()]
    if arguments.json:
        say(*json.dumps(facts, indent=1).replace("\x7f", "\\u007f").splitlines())
        return 0
    console = Console(highlight=False)
    library = ("crop decoder", facts["crop_decoder"] or "can be used")
    print_rows([*version_rows(facts), *machine_rows(facts), library], console)
    console.print()
    for line in facts["verdict"]:
        console.print(printable(line), markup=False, soft_wrap=True)
    return 0
