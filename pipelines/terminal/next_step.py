"""The command that a user would type next: each command ends with a line `next: COMMAND`, except with `--quiet`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.quiet import is_quiet

__all__ = ["fresh", "next_line", "next_lines", "python", "sdpnet", "training"]

DEBUG_BELOW: Final = 256  # with fewer training images, the config is debug, whose batches are the smallest
DEBUG_NEEDS: Final = 16  # the batch size of configs/debug.yaml
# The largest median of the images' longer sides, in pixels, and the config for images up to it.
CONFIGS: Final = ((48, "cifar10"), (160, "demo"))


def next_line(*words: str | Path, when: str = "") -> str:
    """The line `next: COMMAND`, quoted for a POSIX shell. A condition `when` follows as a comment."""
    comment = f"  # {printable(when)}" if when else ""
    return f"next: {' '.join(map(_quoted, words))}{comment}"


def next_lines(*words: str | Path, when: str = "") -> list[str]:
    """The last lines of a command's output: `next_line`, or no line with `--quiet` or if there are no words."""
    return [next_line(*words, when=when)] if words and not is_quiet() else []


def sdpnet(*words: str | Path) -> tuple[str | Path, ...]:
    """The words of an `sdpnet` command, with the program's path if the shell would find another `sdpnet` or none."""
    own = Path(sys.executable).with_name("sdpnet")
    found = shutil.which("sdpnet")
    if found is not None and (not own.exists() or Path(found).absolute() == own):
        return ("sdpnet", *words)
    return (_relative(own), *words) if own.exists() else (python(), "-m", "sdpnet.cli", *words)


def fresh(path: Path) -> Path:
    """The path itself, or the first of path-2, path-3, ... that does not exist."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def training(shards: Path, config: str | None = None, *words: str | Path) -> tuple[str | Path, ...]:
    """The words of the command that trains on a shard set.

    The result is empty if the set has no train or no val split, or too few images.

    Args:
        shards: the shard set.
        config: the config's name; by default it is chosen by the number and the size of the images.
        words: further flags.
    """
    try:
        manifest, reader = open_split(shards, "train")
    except UserError:
        return ()
    val = manifest.splits.get("val")
    if val is None or not val.num_samples or reader.num_samples < DEBUG_NEEDS:
        return ()
    if config is None:
        side = float(np.median(reader.sizes.max(axis=1)))
        config = next((name for limit, name in CONFIGS if side <= limit), "sdpnet_xl")
        config = "debug" if reader.num_samples < DEBUG_BELOW else config
    out = fresh(Path("runs") / (shards.resolve().name or "run"))
    return sdpnet("train", "--config", config, "--data", shards, *words, "--out", out)


def python() -> str | Path:
    """The word that starts this environment's Python: "python" if the shell finds it, else its path."""
    found = shutil.which("python")
    here = Path(sys.executable)
    return "python" if found is not None and Path(found).absolute() == here else _relative(here)


def _relative(path: Path) -> Path:
    """The path relative to the working directory if it lies below it, else the path itself."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _quoted(word: str | Path) -> str:
    text = os.fspath(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"  # otherwise the command would take it for a flag
    if printable(text) == text and _can_be_printed(text):
        return shlex.quote(text)
    # $'...' with escapes is understood by bash, zsh and POSIX shells of 2024, and contains no control characters.
    return "$'" + "".join(map(_octet, os.fsencode(text))) + "'"


def _can_be_printed(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _octet(octet: int) -> str:
    char = chr(octet)
    if char in "\\'":
        return f"\\{char}"
    return char if 0x20 <= octet < 0x7F else f"\\{octet:03o}"
