"""The decoder's threads under the thread sanitizer, with images in memory and in files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from jpeg_files import make_image, pillow_jpeg

SOURCE = Path(__file__).resolve().parents[1] / "support" / "decoder_races.cpp"
TRIAL = "#include <cstdio>\n#include <jpeglib.h>\n#include <thread>\nint main() { std::thread([] {}).join(); }\n"
SANITIZE = ["-std=c++17", "-g", "-O1", "-fsanitize=thread"]


def test_no_data_race(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or "false"
    (tmp_path / "trial.cpp").write_text(TRIAL)
    trial = [compiler, *SANITIZE, tmp_path / "trial.cpp", "-ljpeg", "-lpthread", "-o", tmp_path / "trial"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("needs g++ with its sanitizers and libjpeg's headers (Debian: g++ libjpeg-dev)")
    if (ended := subprocess.run([tmp_path / "trial"], capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"programs with the thread sanitizer do not run here: {ended.stderr[:200]}")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        data = pillow_jpeg(make_image(number, 60, 80), progressive=number % 4 == 3, restart_marker_rows=number % 2)
        (images / f"{number}.jpg").write_bytes(data)
    program = tmp_path / "races"
    subprocess.run([compiler, *SANITIZE, SOURCE, "-ljpeg", "-lpthread", "-o", program], check=True)
    ended = subprocess.run([program, images, "60", "80"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "240 of 240\n"), ended.stderr[-3000:]
