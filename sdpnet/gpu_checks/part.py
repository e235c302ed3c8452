"""A part of `./dev gpu`: the command that does it, what it is worth, how long it takes, and what its result says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["DONE", "Outcome", "Part", "Settings", "Size", "Status", "read_result", "size_for"]

Size = Literal["tiny", "short", "medium", "long"]
Status = Literal["passed", "failed", "cut off", "left out", "not possible"]
DONE: Final = ("passed", "failed")  # a part that ended by itself is not repeated


def size_for(minutes: float) -> Size:
    """How much the parts do where a run may take so many minutes."""
    return "short" if minutes < 8 else "medium" if minutes < 20 else "long"


@dataclass(frozen=True)
class Settings:
    """What the parts of one run share.

    Attributes:
        out: the directory of all results.
        data: the shard set. It exists once the part `shards` has passed.
        images: the folder of images from which `data` is made; None if it is given.
        device: "cuda", or "cpu" in a rehearsal.
        size: how much each part does; "tiny" in a rehearsal.
        recipes: name of a config -> shard set or image folder for its accuracy run.
    """

    out: Path
    data: Path
    images: Path | None
    device: Literal["cuda", "cpu"]
    size: Size
    recipes: Mapping[str, Path] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def image_size(self) -> int:
        return 32 if self.tiny else 224

    @property
    def batch_size(self) -> int:
        return 4 if self.tiny else 256

    def file(self, part: str, suffix: str = ".json") -> Path:
        """The file of a part's results, or another one beside it."""
        return self.out / f"{part}{suffix}"


@dataclass(frozen=True)
class Part:
    """One part of the run, which is a process of its own.

    Attributes:
        name: the word for `--parts`, in the table, and of the part's files.
        what: one line for --help and the documents.
        is_check: whether its exit status says that something is correct. Other parts only measure.
        rank: what it is worth: 1 is done even if there is time for nothing else.
        seconds: the time that it takes on a GPU, by `Size` (short, medium, long).
        command: returns the words after `python`, given the settings and the seconds that the part has.
        figures: makes one or two figures for the table out of the result.
        obstacle: returns why the part is not possible here, or "".
        collect: reads the result that the command has left.
        takes_rest: whether it uses all the time that is left.
    """

    name: str
    what: str
    is_check: bool
    rank: int
    seconds: tuple[float, float, float]
    command: Callable[[Settings, float], list[str]]
    figures: Callable[[Mapping[str, Any]], str]
    obstacle: Callable[[Settings], str] = lambda settings: ""
    collect: Callable[[Settings], Mapping[str, Any]] | None = None
    takes_rest: bool = False

    def expected(self, size: Size) -> float:
        """The seconds that it takes on a GPU."""
        short, medium, long = self.seconds
        return {"tiny": short, "short": short, "medium": medium, "long": long}[size]


@dataclass(frozen=True)
class Outcome:
    """How a part ended: a row of the table and of `results.json`."""

    part: str
    status: Status
    is_check: bool
    seconds: float = 0.0
    figures: str = ""
    date: str = ""
    commit: str | None = None
    earlier: bool = False  # done by an earlier run with the same --out


def read_result(part: Part, settings: Settings) -> Mapping[str, Any]:
    """The result of a part; empty if it left none."""
    try:
        if part.collect is not None:
            return part.collect(settings)
        return json.loads(settings.file(part.name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
