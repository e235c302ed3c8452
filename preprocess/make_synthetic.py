"""Command: makes a small folder of images of shapes and textures that a network can learn, for trying everything out.

    python preprocess/make_synthetic.py --out IMAGES

    IMAGES/{train,val}/{disc,stripes,ring,...}/00000.jpg

Only the form determines the class: colours, gradients, position, size, rotation and noise have the same distribution
in all classes. The forms can still be recognised after flips and random resized crops.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

import numpy as np
from PIL import Image

from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.files.atomic_write import partial_path, publish
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import fresh, next_lines, sdpnet
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["FORMS", "add_arguments", "main", "make_synthetic", "run"]

# A form maps each point (x, y), in units of its size, to approximately the distance to the outline: positive inside,
# negative outside. Shapes have radius 1; textures fill the plane with period 1.
Form = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _polygon(x: np.ndarray, y: np.ndarray, corners: int) -> np.ndarray:
    sector = 2 * np.pi / corners
    angle = np.mod(np.arctan2(y, x), sector) - sector / 2
    return np.cos(sector / 2) - np.hypot(x, y) * np.cos(angle)


def _wave(t: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1, from -0.25 to 0.25."""
    return np.abs(np.mod(t, 1) - 0.5) - 0.25


FORMS: Final[dict[str, Form]] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "stripes": lambda x, y: _wave(x),
    "ring": lambda x, y: 0.18 - np.abs(np.hypot(x, y) - 0.82),
    "checker": lambda x, y: np.minimum(np.abs(_wave(x)), np.abs(_wave(y))) * np.sign(_wave(x) * _wave(y)),
    "triangle": lambda x, y: _polygon(x, y, 3),
    "dots": lambda x, y: 0.28 - np.hypot(np.mod(x, 1) - 0.5, np.mod(y, 1) - 0.5),
    "cross": lambda x, y: np.minimum(0.26 - np.minimum(np.abs(x), np.abs(y)), 1 - np.maximum(np.abs(x), np.abs(y))),
    "ripples": lambda x, y: _wave(np.hypot(x, y)),
    "square": lambda x, y: _polygon(x, y, 4),
    "lattice": lambda x, y: 0.12 - np.minimum(np.abs(np.mod(x, 1) - 0.5), np.abs(np.mod(y, 1) - 0.5)),
    "star": lambda x, y: 0.65 + 0.35 * np.cos(5 * np.arctan2(y, x)) - np.hypot(x, y),
    "zigzag": lambda x, y: _wave(y + 2 * _wave(x)),
    "crescent": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.5, y) - 0.75),
    "spiral": lambda x, y: _wave(np.hypot(x, y) + np.arctan2(y, x) / (2 * np.pi)),
    "bar": lambda x, y: np.minimum(1 - np.abs(x), 0.22 - np.abs(y)),
    "frame": lambda x, y: 0.14 - np.abs(_polygon(x, y, 4) - 0.14),
}
TEXTURES: Final = frozenset({"stripes", "checker", "dots", "ripples", "lattice", "zigzag", "spiral"})


def make_synthetic(
    out: str | Path,
    seed: int = 0,
    num_classes: int = 10,
    train_per_class: int = 200,
    val_per_class: int = 40,
    min_side: int = 48,
    max_side: int = 160,
) -> None:
    """Makes an image folder of `num_classes` forms. The same arguments give the same bytes.

    Every image is a function of only (seed, split, class, number). The folder appears when it is complete.

    Args:
        out: the folder to make; it must not exist or must be empty.
        seed: 0 to 2^64 - 1.
        num_classes: 2 to 16; the classes are the first ones of `FORMS`.
        train_per_class, val_per_class: the number of images of each class; with 0 there is no val split.
        min_side, max_side: the range of the sides of an image in pixels. Aspect ratios are at most 1.6.

    Raises:
        UserError: a value is out of range, or `out` is not empty.
    """
    out = Path(out)
    for name, value, low, high in (
        ("seed", seed, 0, 2**64 - 1),
        ("classes", num_classes, 2, len(FORMS)),
        ("train-per-class", train_per_class, 1, 99_999),
        ("val-per-class", val_per_class, 0, 99_999),
        ("min-side", min_side, 16, 4_096),
        ("max-side", max_side, min_side, 4_096),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: must be {low} to {high}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it, or choose another --out")
    partial = partial_path(out.absolute())
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        for split, (split_name, count) in enumerate((("train", train_per_class), ("val", val_per_class))):
            for label, name in enumerate(list(FORMS)[:num_classes]):
                folder = partial / split_name / name
                if count:
                    folder.mkdir(parents=True)
                for number in range(count):
                    rng = np.random.default_rng([seed, split, label, number])
                    image = Image.fromarray(_draw(rng, name, min_side, max_side))
                    image.save(folder / f"{number:05}.jpg", quality=92)
        publish(out.absolute())
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _draw(rng: np.random.Generator, name: str, min_side: int, max_side: int) -> np.ndarray:
    """Draws an image of a form: uint8 (height, width, 3)."""
    side = rng.integers(min_side, max_side + 1)
    other = int(np.clip(side * np.exp(rng.uniform(-0.47, 0.47)), min_side, max_side))
    height, width = (side, other) if rng.random() < 0.5 else (other, side)
    shorter = min(height, width)
    # The size, position and rotation of the form.
    texture = name in TEXTURES
    unit = shorter * (rng.uniform(0.2, 0.36) if texture else rng.uniform(0.26, 0.44))
    middle = rng.uniform(0.38, 0.62, 2)
    angle = rng.uniform(0, 2 * np.pi)
    down = (np.arange(height, dtype=np.float32) - np.float32(middle[0] * height))[:, None]
    right = np.arange(width, dtype=np.float32) - np.float32(middle[1] * width)
    cos, sin = np.float32(np.cos(angle) / unit), np.float32(np.sin(angle) / unit)
    inside = FORMS[name](right * cos + down * sin, down * cos - right * sin)
    inside = np.clip(inside * np.float32(unit) + 0.5, 0, 1)[..., None]
    # Two colours of clearly different lightness, each with a gradient. Either may be the lighter one.
    colours = np.stack([rng.uniform(0, 125, 3), rng.uniform(130, 255, 3)]).astype(np.float32)
    back, front = colours if rng.random() < 0.5 else colours[::-1]
    slope = rng.uniform(-30, 30, (2, 3)).astype(np.float32)
    image = back + inside * (front - back) + (down / height)[..., None] * slope[0] + (right / width)[:, None] * slope[1]
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2, 14))
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="the folder to make")
    add("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    add("--classes", metavar="N", type=int, default=10, help=f"2 to {len(FORMS)} (default: %(default)s)")
    add("--train-per-class", metavar="N", type=int, default=200, help="images (default: %(default)s)")
    add("--val-per-class", metavar="N", type=int, default=40, help="images, 0 for none (default: %(default)s)")
    add("--min-side", metavar="N", type=int, default=48, help="pixels (default: %(default)s)")
    add("--max-side", metavar="N", type=int, default=160, help="pixels (default: %(default)s)")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    make_synthetic(
        arguments.out,
        arguments.seed,
        arguments.classes,
        arguments.train_per_class,
        arguments.val_per_class,
        arguments.min_side,
        arguments.max_side,
    )
    counts = f"{arguments.train_per_class} training and {arguments.val_per_class} validation images"
    print(f"{printable(arguments.out)}: {arguments.classes} classes with {counts} each")
    out = Path(arguments.out)
    shards = fresh(out.with_name(f"{out.name}-shards"))
    for line in next_lines(*sdpnet("convert", "--source", out, "--out", shards)):
        print(line)
    return 0


def main(argv: list[str] | None = None, program: str = "make_synthetic") -> int:
    """The command line; returns the exit status."""
    return run_alone(
        program, "Makes a small image folder of shapes and textures to try everything on.", add_arguments, run, argv
    )


if __name__ == "__main__":
    sys.exit(main())
