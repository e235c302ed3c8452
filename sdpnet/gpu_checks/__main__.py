"""Checks and measures everything on a machine with an NVIDIA GPU: `./dev gpu [--minutes N] [--out DIR]`.

Parts run in the order of the list below, each in a process of its own with a time limit: first checks of correctness,
then measurements, then accuracy. Where `--minutes` are too few for all parts, those that are worth most are done. Each
part leaves NAME.json and NAME.log in `--out`, and a run with the same `--out` continues with the parts that are not
done yet. The exit status is 0 if all checks that were begun have passed.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from sdpnet.gpu_checks.checks import CHECKS
from sdpnet.gpu_checks.measurements import CONVERSION, MEASUREMENTS
from sdpnet.gpu_checks.part import Outcome, Part, Settings, read_result, size_for
from sdpnet.gpu_checks.process import run_limited
from sdpnet.gpu_checks.programs.accuracy import parse_recipes
from sdpnet.gpu_checks.programs.commands import environment
from sdpnet.gpu_checks.results import done_before, table, verdict, write_results
from sdpnet.gpu_checks.schedule import chosen, limit_of
from sdpnet.pipelines.errors import UserError, nearest, printable, require
from sdpnet.pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["PARTS", "add_arguments", "main", "run"]

PARTS: Final[tuple[Part, ...]] = (*CHECKS, *MEASUREMENTS)
UNTIMED: Final = 600.0  # the seconds that a part may take in a rehearsal, or if it was asked for by name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Parts: " + "; ".join(f"{part.name}: {part.what}" for part in PARTS) + "."
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, metavar="N", help="time for everything (default: %(default)g)")
    add("--out", type=Path, default=Path("gpu_out"), metavar="DIR", help="results (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="SHARDS", help="shard set to measure with")
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="class folders of images (default: synthetic images are made)"
    )
    add("--recipes", default="", metavar="NAME=DATA,...", help="configs for accuracy runs, with shards or images")
    add("--parts", default="", metavar="NAMES", help="do these parts alone, whatever time they take")
    add("--again", action="store_true", help="also repeat parts that are done, but for the conversion")
    add("--rehearsal", action="store_true", help="every part on the CPU with tiny sizes: tests this command")


def _settings(arguments: argparse.Namespace) -> Settings:
    """What the parts share. Raises `UserError` for arguments that are not possible."""
    require(1 <= arguments.minutes <= 24 * 60, "--minutes", arguments.minutes, "from 1 to 1440")
    if not arguments.rehearsal and not torch.cuda.is_available():
        raise UserError("this torch sees no GPU; sdpnet doctor says why. --rehearsal tests this command on the CPU")
    if arguments.data is not None:
        for split in ("train", "val"):
            open_split(arguments.data, split)
    if arguments.images is not None and not arguments.images.is_dir():
        raise UserError(f"--images {arguments.images}: is not a folder")
    out = arguments.out.absolute()
    images = None if arguments.data else (arguments.images or out / "images").absolute()
    return Settings(
        out=out,
        data=(arguments.data or out / "shards").absolute(),
        images=images,
        device="cpu" if arguments.rehearsal else "cuda",
        size="tiny" if arguments.rehearsal else size_for(arguments.minutes),
        recipes=parse_recipes(arguments.recipes) if arguments.recipes else {},
    )


def _parts(arguments: argparse.Namespace, settings: Settings) -> list[Part]:
    names = [part.name for part in PARTS]
    asked = arguments.parts.split(",") if arguments.parts else names
    if unknown := [name for name in asked if name not in names]:
        raise UserError(f"--parts {arguments.parts}: no {unknown[0]!r}: {nearest(unknown[0], names)}")
    return [*([CONVERSION] if settings.images else []), *(part for part in PARTS if part.name in asked)]


def _machine(device: str) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "driver": driver(),
        "cpu": cpu_name(),
        "cores": len(usable_cores()),
        "versions": installed_versions(),
        "cuda": torch.version.cuda,
    }


def _done(part: Part, settings: Settings, limit: float) -> Outcome:
    """Runs a part."""
    began = time.monotonic()
    log_file, hide_gpus = settings.file(part.name, ".log"), settings.device == "cpu"
    settings.file(part.name, ".xml").unlink(missing_ok=True)  # an earlier report must not pass for this one
    status = run_limited(part.command(settings, limit), log_file, limit, hide_gpus=hide_gpus)
    took = round(time.monotonic() - began, 1)
    result = read_result(part, settings)
    try:
        figures = part.figures(result) if result else ""
    except (KeyError, IndexError, TypeError, StopIteration) as error:  # an incomplete result
        figures = f"{settings.file(part.name)} has no {error}"
    if status != 0:
        log = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        figures = figures or (log[-1].strip() if log else "no output")
        figures += f" (limit {limit:.0f} s)" if status is None else ""
    ended = "cut off" if status is None else "failed" if status else "passed"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Outcome(part.name, ended, part.is_check, took, figures, now, commit())  # type: ignore[arg-type]


class _Run:
    """The parts of one run, with their outcomes so far."""

    def __init__(self, settings: Settings, seconds: float, known: Mapping[str, Outcome]) -> None:
        self.settings = settings
        self._ends = time.monotonic() + seconds
        self.outcomes = dict(known)
        self.machine = _machine(settings.device)
        self.console = Console(highlight=False)

    @property
    def rows(self) -> list[Outcome]:
        """The outcomes of this run and of earlier ones, in the order of the parts."""
        return [self.outcomes[part.name] for part in (CONVERSION, *PARTS) if part.name in self.outcomes]

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def save(self) -> None:
        write_results(self.settings.out / "results.json", _identity(self.settings), self.machine, self.rows)

    def do(self, part: Part, limit: float) -> None:
        """Runs a part, or says why not."""
        if reason := part.obstacle(self.settings):
            self.outcomes[part.name] = Outcome(part.name, "not possible", part.is_check, figures=reason)
        elif not limit:
            figures = f"takes {part.expected(self.settings.size):.0f} s; {max(0.0, self.left):.0f} s are left"
            self.outcomes[part.name] = Outcome(part.name, "left out", part.is_check, figures=figures)
        else:
            self.console.print(f"{part.name}: {part.what} (at most {limit:,.0f} s)", markup=False, soft_wrap=True)
            outcome = self.outcomes[part.name] = _done(part, self.settings, limit)
            line = f"  {outcome.status} after {outcome.seconds:,.0f} s: {outcome.figures}"
            self.console.print(printable(line), markup=False, soft_wrap=True)
        self.save()

    def do_all(self, todo: Sequence[Part], *, timed: bool) -> bool:
        """Runs parts in their order. Returns False if the images could not be converted.

        Args:
            timed: whether only the parts that fit into the time are run, and then others while time is left.
        """
        size = self.settings.size
        possible = [part for part in todo if not part.obstacle(self.settings)]
        first = set(chosen(possible, self.left, size)) if timed else {part.name for part in todo}
        later = sorted((part for part in todo if part.name not in first), key=lambda part: part.rank)
        for part in [*(part for part in todo if part.name in first), *later]:
            limit = limit_of(part, self.left, size) if timed else self.left if part.takes_rest else UNTIMED
            if part in later and part.expected(size) > self.left:
                limit = 0.0
            self.do(part, limit)
            if part is CONVERSION and self.outcomes[part.name].status != "passed":
                return False
        return True


def _identity(settings: Settings) -> dict[str, str]:
    """What must be equal when a run continues."""
    source = settings.images or settings.data
    return {"device": settings.device, "data": str(source), "image_size": str(settings.image_size)}


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts and prints the table. Returns 1 if a check has failed or was cut off."""
    settings = _settings(arguments)
    parts = _parts(arguments, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    known = done_before(settings.out / "results.json", _identity(settings))
    if not settings.data.is_dir():
        known.pop(CONVERSION.name, None)
    again = [part.name for part in parts if arguments.again and part is not CONVERSION]
    this = _Run(settings, 60 * arguments.minutes, known)
    if settings.images is not None and not settings.images.is_dir():
        _make_images(settings.images, this.console, settings.tiny)
    before = signal.signal(signal.SIGTERM, _terminate)  # so that the processes of a part end as well
    try:
        converted = this.do_all(
            [part for part in parts if part.name not in known or part.name in again],
            timed=not settings.tiny and not arguments.parts,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    gpu = this.machine["gpu"] or "rehearsal on the CPU, tiny sizes: no figure counts"
    used = arguments.minutes - this.left / 60
    title = f"\n{gpu}; commit {commit() or 'unknown'}; {used:.1f} of {arguments.minutes:g} minutes"
    this.console.print(table(title, this.rows))
    this.console.print(f"{settings.out / 'results.json'}", markup=False, soft_wrap=True)
    return 0 if converted and verdict(this.rows)[0] else 1


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _make_images(images: Path, console: Console, tiny: bool) -> None:
    """Makes synthetic images, where there are no others."""
    console.print("no --images and no --data: synthetic images are made, which are smaller than photographs")
    few = ["--classes", "2", "--train-per-class", "12", "--val-per-class", "4"] if tiny else []
    words = ["--out", str(images), *few, *([] if tiny else ["--min-side", "375", "--max-side", "500"])]
    command = [sys.executable, "-m", "sdpnet.preprocess.make_synthetic", *words]
    if subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError(f"make_synthetic could not make {images}")


def main(argv: list[str] | None = None) -> int:
    return run_alone("dev gpu", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
