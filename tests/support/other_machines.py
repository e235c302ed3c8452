"""The decoder on other processors: `decoder_digests.cpp`, compiled for them and run by qemu's emulator.

AVX-512 is emulated by a header (`emulated_avx512.h`), since qemu does not know it.

Run as a program it compares all images of folders, on every path. With libjpeg-turbo for aarch64 (a build with
cmake/zig.cmake, SDPNET_MACHINE=aarch64 and SDPNET_LIBJPEG=bundled has it in its folder libjpeg-turbo) it compares the
whole decoder and the JPEG codec, too:

    PYTHONPATH=.:tests/support python tests/support/other_machines.py --libjpeg OF_AARCH64 OF_THIS_MACHINE FOLDER...

libjpeg-turbo's own vector code gives other pixels on other processors if a file has coefficients that no encoder
writes. With JSIMD_FORCENONE=1 in the environment it uses its plain code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    "HERE",
    "Digests",
    "Machine",
    "Missing",
    "Wanted",
    "build_requests",
    "compiled",
    "digests",
    "find_machine",
    "requests_of",
    "this_machine",
]

HERE = Path(__file__).resolve().parent
HEADER = struct.Struct("=11I")  # decoder_digests.h
# As CMakeLists.txt has them, but for -O3, which takes twice as long to compile, and warnings as in decoder_parts.py.
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
FLAGS.append("-Wno-sign-conversion")  # Clang adds it to -Wconversion, GCC does not
JCONFIG = [f"/usr/include/{platform.machine()}-linux-gnu"]  # where Debian has the one header that differs


class Missing(Exception):
    """A tool is not installed. The message says which one."""


@dataclass(frozen=True)
class Machine:
    """A processor that programs are compiled for.

    Attributes:
        compiler: the command that compiles for it and links statically.
        emulator: the command that a program follows; empty for this machine's processor.
    """

    name: str
    compiler: tuple[str, ...]
    emulator: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """An image and what is wanted of it: the box (top, left, height, width), and the size that it is resized to.

    `image` is a JPEG file or raw pixels, uint8 (height, width, 3).
    """

    image: bytes | np.ndarray
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    out: tuple[int, int]
    flip: bool = False


@dataclass(frozen=True)
class Digests:
    """What the program printed.

    Attributes:
        level: the vector code that the processor can run: 0 none, 1 AVX2 or NEON, 2 AVX-512.
        lines: for each image, two digests for each of the three levels, or for the highest one below it that there is.
    """

    level: int
    lines: list[list[str]]


def find_machine(name: str, zig: bool = False) -> Machine:
    """The machine `name` (aarch64, riscv64, avx512). Raises `Missing` if it has no compiler or no emulator."""
    if name == "avx512":
        if platform.machine() != "x86_64":
            raise Missing("AVX-512 is emulated on x86-64 only")
        return Machine(name, (*this_machine().compiler, "-include", str(HERE / "emulated_avx512.h")))
    emulator: tuple[str, ...] = ()
    if platform.machine() != name:
        program = shutil.which(f"qemu-{name}") or shutil.which(f"qemu-{name}-static")
        if program is None:
            raise Missing(f"no emulator of {name} (Debian: qemu-user)")
        emulator = (program,)
    if zig:
        if importlib.util.find_spec("ziglang") is None:
            raise Missing("no compiler: the package ziglang")
        target = ("-target", f"{name}-linux-musl", "-Wno-unused-command-line-argument")  # of -c beside -fsyntax-only
        return Machine(name, (sys.executable, "-m", "ziglang", "c++", *target), emulator)
    compiler = shutil.which("g++" if not emulator else f"{name}-linux-gnu-g++")
    if compiler is None:
        raise Missing(f"no compiler for {name} (Debian: g++-{name}-linux-gnu)")
    return Machine(name, (compiler,), emulator)


def this_machine() -> Machine:
    compiler = shutil.which("g++")
    if compiler is None:
        raise Missing("no compiler (Debian: g++)")
    return Machine(platform.machine(), (compiler,))


def compiled(machine: Machine, program: Path, libjpeg: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """Compiles decoder_digests.cpp for the machine, with the whole decoder if there is a libjpeg-turbo for it.

    Without one only libjpeg's headers are needed, and this machine's will do. Raises `Missing` if there are none.
    """
    command = [*machine.compiler, *FLAGS, *flags]
    libraries: list[str] = []
    if libjpeg is not None:
        command += ["-DWITH_LIBJPEG", f"-I{libjpeg}/include"]
        libraries = [f"{libjpeg}/lib/libjpeg.a"]
    elif machine.emulator:
        command += [f"-idirafter{folder}" for folder in ["/usr/include", *JCONFIG]]
    if machine.emulator:
        command.append("-static")
    check = [*command, "-x", "c++", "-fsyntax-only", "-"]
    headers = "#include <cstdio>\n#include <jpeglib.h>\n"
    done = subprocess.run(check, input=headers, text=True, capture_output=True, check=False)
    if "jpeglib.h" in done.stderr or "jconfig.h" in done.stderr:
        raise Missing("no headers of libjpeg (Debian: libjpeg-dev)")
    subprocess.run([*command, HERE / "decoder_digests.cpp", "-o", program, *libraries], check=True)
    return program


def digests(machine: Machine, program: Path, requests: bytes) -> Digests:
    """Runs the program. It must answer each request."""
    done = subprocess.run([*machine.emulator, program], input=requests, stdout=subprocess.PIPE, check=True)
    first, *lines = done.stdout.decode().splitlines()
    return Digests(int(first), [line.split() for line in lines])


def requests_of(wanted: Iterable[Wanted]) -> bytes:
    parts = []
    for each in wanted:
        raw = isinstance(each.image, np.ndarray)
        image = each.image.tobytes() if isinstance(each.image, np.ndarray) else each.image
        parts += [HEADER.pack(*each.size, *each.box, *each.out, raw, each.flip, len(image)), image]
    return b"".join(parts)


def build_requests(folder: Path) -> Path:
    """Compiles decoder_requests.cpp for this machine."""
    program = folder / "decoder_requests"
    subprocess.run([*this_machine().compiler, *FLAGS, HERE / "decoder_requests.cpp", "-o", program], check=True)
    return program


def wanted_of_file(path: Path, rng: np.random.Generator) -> list[Wanted]:
    """The whole image and two crops, resized to 224 x 224, and the pixels of a small image.

    One request that cannot be met if Pillow cannot open the file; none if the image is huge.
    """
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return [Wanted(data, (1, 1), (0, 0, 1, 1), (8, 8))]
    if height * width > 50_000_000:
        return []
    found = [Wanted(data, (height, width), (0, 0, height, width), (224, 224))]
    for flip in (False, True):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        box = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        found.append(Wanted(data, (height, width), box, (224, 224), flip))
    if height * width < 300_000:
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
            found.append(Wanted(pixels, (height, width), (0, 0, height, width), (224, 224)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="every file in them is decoded")
    parser.add_argument("--changed", type=int, default=0, help="also this number of files that are changed at random")
    parser.add_argument("--libjpeg", nargs=2, type=Path, default=(None, None), help="folders with include/ and lib/")
    parser.add_argument("--zig", action="store_true", help="compile for aarch64 with the package ziglang")
    given = parser.parse_args()
    here, there = this_machine(), find_machine("aarch64", given.zig)
    libjpeg, own_libjpeg = given.libjpeg
    fast = ["-O3"]
    plain = [*fast, "-DSIMD_LEVEL=simd::Level::PLAIN"]
    paths = sorted(Path(base, name) for root in given.folders for base, _, names in os.walk(root) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        programs = [
            (f"{here.name}", here, compiled(here, Path(folder, "own"), own_libjpeg, fast)),
            (f"{here.name} without AVX2", here, compiled(here, Path(folder, "plain"), own_libjpeg, plain)),
            (f"{there.name}", there, compiled(there, Path(folder, "other"), libjpeg, fast)),
        ]
        if here.name == "x86_64":
            wide = find_machine("avx512")
            programs.append((f"{wide.name} (emulated)", wide, compiled(wide, Path(folder, "wide"), own_libjpeg, fast)))
        rng = np.random.default_rng(1)
        lines: dict[str, list[list[str]]] = {name: [] for name, _, _ in programs}
        batches = [requests_of(wanted_of_file(path, rng)) for path in paths]
        if given.changed:
            from decoder_seeds import write_seeds

            seeds = write_seeds(Path(folder, "seeds"))
            made = build_requests(Path(folder))
            for count in (0, given.changed):
                batches.append(
                    subprocess.run([made, str(count), "1", *seeds], stdout=subprocess.PIPE, check=True).stdout
                )
        for name, machine, program in programs:
            for start in range(0, len(batches), 50):
                lines[name] += digests(machine, program, b"".join(batches[start : start + 50])).lines
    first = lines[here.name]
    print(f"{len(paths)} files, {len(first)} requests, {sum(line[0] != '-' for line in first)} by our decoder")
    for name, found in lines.items():
        assert len(found) == len(first)
        equal = Counter()
        for line, expected in zip(found, first, strict=True):
            end = 9 if line[0] == "-" else 6  # without the pixels of files that our decoder leaves to libjpeg
            equal["lines"] += line == expected
            equal["ours"] += line[:6] + line[end:] == expected[:6] + expected[end:]
            equal["levels"] += line[:2] == line[2:4] == line[4:6] and len(set(line[6:9])) <= 1
        print(f"{name}: {equal['lines']} lines are those of {here.name}, {equal['ours']} but for libjpeg's pixels")
        print(f"    all levels agree in {equal['levels']}")
    if libjpeg:
        answers = Counter(each[0] for line in first for each in line[9:])
        print(f"{answers['0']} of {answers.total()} files were encoded by the codec, the others refused")


if __name__ == "__main__":
    main()
