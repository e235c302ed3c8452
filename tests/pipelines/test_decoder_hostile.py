"""Hostile files through the whole crop decoder, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from decoder_seeds import request, seeds
from jpeg_files import joined, make_image, pillow_jpeg, segments

HERE = Path(__file__).resolve().parents[1] / "support"
NUM_CHANGED = 12_000
SANITIZE = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TRIAL = "#include <cstdio>\n#include <jpeglib.h>\nint main() { return 0; }\n"

Run = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """`decoder_sanitizers.cpp` with these arguments, in one process: how often each status came."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "trial.cpp").write_text(TRIAL)
    compiler = shutil.which("g++") or "false"
    trial = [compiler, *SANITIZE, folder / "trial.cpp", "-o", folder / "trial"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("needs g++ with its sanitizers and libjpeg's headers (Debian: g++ libjpeg-dev)")
    environment = os.environ
    ended = subprocess.run([folder / "trial"], capture_output=True, text=True, check=False)
    if "LeakSanitizer" in ended.stderr:  # it needs ptrace
        environment = {**environment, "ASAN_OPTIONS": "detect_leaks=0"}
        ended = subprocess.run([folder / "trial"], capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        pytest.skip(f"programs with sanitizers do not run here: {ended.stderr[:200]}")
    program = folder / "program"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    build = [compiler, *SANITIZE, *warnings, HERE / "decoder_sanitizers.cpp", "-o", program, "-ljpeg"]
    subprocess.run(build, check=True)

    def run(*arguments: object) -> dict[str, int]:
        command = [program, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("seeds")
    paths = []
    for number, (name, jpeg) in enumerate(seeds().items()):
        size = (3, 3) if "tiny" in name else (33, 39)
        paths.append(folder / str(number))
        paths[-1].write_bytes(jpeg + request(0, 0, *size, 8 + number % 30, 8))
    return paths


def test_the_seeds_are_whole(run, files):
    assert run(0, 0, *files) == {**dict.fromkeys(run(0, 0, files[0]), 0), "ok": len(files) - 1, "unsupported": 1}


def test_changed_files_do_no_harm(run, files):
    """No report, nothing written but the output, and that only with success; the same answer from fresh memory and
    from memory that other images have used."""
    found = run(NUM_CHANGED, 1, *files)
    assert sum(found.values()) == NUM_CHANGED
    assert found["no_memory"] == 0 and found["skipped"] < NUM_CHANGED / 20
    assert found["ok"] > NUM_CHANGED / 10 and found["damaged"] > NUM_CHANGED / 3  # both are reached


def test_blocks_that_never_end_are_not_read_far(run, tmp_path):
    """Nearly all bits are codes of large coefficients, also those that lie behind the scan's three bytes."""
    found, _ = segments(pillow_jpeg(make_image(1, 64, 64), subsampling=2))
    counts = bytes([*7 * [0], 255, *8 * [0]])  # all codes of eight bits but the last
    dc, ac = counts + 255 * bytes([11]), counts + 255 * bytes([10])
    tables = b"".join(bytes([number]) + dc + bytes([0x10 | number]) + ac for number in range(2))
    header = [(marker, body) for marker, body in found if marker != 0xC4]
    header.insert(-1, (0xC4, tables))
    path = tmp_path / "endless"
    path.write_bytes(joined(header, b"\0\0\0\xff\xd9") + request(0, 0, 64, 64, 40, 40))
    statuses = run(0, 0, path)
    assert statuses["damaged"] == 1 and sum(statuses.values()) == 1


def test_restart_markers_near_the_start_are_moved_within_the_file(run, tmp_path):
    """The harness itself stays inside its file."""
    path = tmp_path / "early"
    path.write_bytes(b"\xff\xd8" + 40 * b"\xff\xd0\0")
    assert sum(run(500, 1, path).values()) == 500
