"""The decoder gives the same bytes on other processors, by their vector code and by the plain code.

AVX-512 is emulated, so that its path is tested on every x86-64 machine.

Skipped where there is no compiler or no emulator for them. Compilers of the package ziglang are for the slow tests: at
their first use they compile a C++ library.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from decoder_seeds import write_seeds
from jpeg_files import make_image, pillow_jpeg
from other_machines import (
    HERE,
    Machine,
    Missing,
    Wanted,
    build_requests,
    compiled,
    digests,
    find_machine,
    requests_of,
    this_machine,
)

NATIVE = HERE.parents[1]
LIBRARIES = ["pipelines/native/crop_decoder.cpp", "preprocess/native/jpeg_codec.cpp"]
NUM_CHANGED = 12_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("other_machines")


@pytest.fixture(
    scope="module",
    params=[
        "avx512",
        "aarch64",
        pytest.param("aarch64 zig", marks=pytest.mark.slow),
        pytest.param("riscv64 zig", marks=pytest.mark.slow),  # has no vector code
    ],
)
def machine(request: pytest.FixtureRequest) -> Machine:
    name, _, zig = request.param.partition(" ")
    try:
        return find_machine(name, bool(zig))
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def other(machine: Machine, folder: Path) -> tuple[Machine, Path]:
    return build(machine, folder)


@pytest.fixture(scope="module")
def own(folder: Path) -> tuple[Machine, Path]:
    try:
        return build(this_machine(), folder)
    except Missing as missing:
        pytest.skip(str(missing))


def build(machine: Machine, folder: Path) -> tuple[Machine, Path]:
    try:
        return machine, compiled(machine, folder / f"digests-{machine.name}-{len(machine.compiler)}")
    except Missing as missing:
        pytest.skip(str(missing))


def check(own: tuple[Machine, Path], other: tuple[Machine, Path], requests: bytes) -> tuple[int, int]:
    """Compares the bytes of all paths. Returns the numbers of images, and of those that our decoder takes."""
    expected, found = digests(*own, requests), digests(*other, requests)
    assert found.level == {"avx512": 2, "aarch64": 1, "riscv64": 0}[other[0].name]
    assert found.lines == expected.lines
    for line in found.lines:
        assert line[:2] == line[2:4] == line[4:]
    return len(found.lines), sum(line[0] != "-" for line in found.lines)


def test_changed_files(own: tuple[Machine, Path], other: tuple[Machine, Path], folder: Path) -> None:
    """The hostile files of test_decoder_hostile.py."""
    seeds = write_seeds(folder / "seeds")
    program = build_requests(folder)
    for count in (0, NUM_CHANGED):
        requests = subprocess.run([program, str(count), "1", *seeds], stdout=subprocess.PIPE, check=True).stdout
        num_images, num_ours = check(own, other, requests)
        if count:
            assert num_images > 0.9 * NUM_CHANGED and num_ours > 0.05 * NUM_CHANGED
        else:
            assert num_images == len(seeds) and num_ours == len(seeds) - 9  # progressive, CMYK, RGB, three scans


def some_images() -> Iterator[Wanted]:
    """Crops of photograph-like images, of noise and of flat colours, in all samplings that our decoder takes."""
    rng = np.random.default_rng(2)
    stripes = np.zeros((120, 150, 3), np.uint8)
    stripes[::2, ::2] = 255
    pictures = [make_image(size, 40 + 37 * size, 300 - 19 * size) for size in range(12)]
    pictures += [rng.integers(0, 256, (130, 170, 3), np.uint8), stripes, np.full_like(stripes, 255), 0 * stripes]
    for number, pixels in enumerate(pictures):
        height, width = size = pixels.shape[:2]
        for quality in (1, 60, 100):
            for subsampling in (0, 1, 2):
                data = pillow_jpeg(pixels, quality=quality, subsampling=subsampling, restart_marker_rows=number % 3)
                top, left = int(rng.integers(height)), int(rng.integers(width))
                box = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
                yield Wanted(data, size, (0, 0, *size), (64, 64))
                yield Wanted(data, size, box, (int(rng.integers(1, 200)), int(rng.integers(1, 200))), number % 2 == 0)


def some_resizes() -> Iterator[Wanted]:
    """Enlarged and reduced pixels: widths that fill no register, and more rows than 16-bit sums hold."""
    rng = np.random.default_rng(3)
    for number in range(300):
        height, width = size = (int(rng.integers(1, 200)), int(rng.integers(1, 200)))
        pixels = rng.choice(np.array([0, 255, 7], np.uint8), (height, width, 3))
        yield Wanted(pixels, size, (0, 0, *size), (int(rng.integers(1, 90)), int(rng.integers(1, 90))), number % 2 == 0)
    for rows in (254, 1000):
        white = np.full((rows, 33, 3), 255, np.uint8)
        yield Wanted(white, (rows, 33), (0, 0, rows, 33), (1, 5))


def test_images(own: tuple[Machine, Path], other: tuple[Machine, Path]) -> None:
    num_images, num_ours = check(own, other, requests_of(some_images()))
    assert num_images == num_ours == 16 * 18


def test_resizes(own: tuple[Machine, Path], other: tuple[Machine, Path]) -> None:
    assert check(own, other, requests_of(some_resizes())) == (302, 302)


@pytest.mark.parametrize("source", LIBRARIES)
def test_the_libraries_compile(machine: Machine, source: str, tmp_path: Path) -> None:
    """Without any header of another processor."""
    headers = [f"-idirafter{folder}" for folder in ("/usr/include", "/usr/include/x86_64-linux-gnu")]
    command = [*machine.compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *headers]
    command += ["-c", "-o", str(tmp_path / "library.o")]  # Zig knows no -fsyntax-only
    done = subprocess.run([*command, NATIVE / source], capture_output=True, text=True, check=False)
    if "jpeglib.h" in done.stderr or "jconfig.h" in done.stderr:
        pytest.skip("no headers of libjpeg (Debian: libjpeg-dev)")
    assert done.returncode == 0, done.stderr
