"""The bundle for a GPU machine without a network, and the libraries that are made small for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strip_fatbin = script("strip_fatbin")


def fatbin(*codes: tuple[int, int, bytes]) -> bytes:
    """A blob with entries (kind, capability, code), in NVIDIA's layout."""
    entries = b"".join(
        struct.pack("<HHIQIIII", kind, 1, 64, len(code), 0, 0, 0, capability).ljust(64, b"\x7f") + code
        for kind, capability, code in codes
    )
    return struct.pack("<IHHQ", strip_fatbin.MAGIC, 1, 16, len(entries)) + entries


def elf(**sections: bytes) -> bytes:
    """A 64-bit ELF file with these sections: its header, their contents, their names, their table."""
    names, contents, rows = b"\0", b"", [bytes(64)]
    for name, content in sections.items():
        rows.append(struct.pack("<IIQQQQ", len(names), 1, 0, 0, 64 + len(contents), len(content)).ljust(64, b"\0"))
        names += f".{name}".encode() + b"\0"
        contents += content
    rows.append(struct.pack("<IIQQQQ", 0, 3, 0, 0, 64 + len(contents), len(names)).ljust(64, b"\0"))
    header = bytearray(b"\x7fELF\x02\x01\x01".ljust(64, b"\0"))
    struct.pack_into("<Q", header, 0x28, 64 + len(contents) + len(names))
    struct.pack_into("<HHH", header, 0x3A, 64, len(rows), len(rows) - 1)
    return bytes(header) + contents + names + b"".join(rows)


def test_only_the_code_for_one_generation_is_kept(tmp_path: Path) -> None:
    code = {name: bytes([value]) * 40 for value, name in enumerate(("old", "kept", "ptx", "new", "kept too"), 1)}
    blobs = fatbin((2, 80, code["old"]), (2, 90, code["kept"]), (1, 90, code["ptx"]), (2, 100, code["new"]))
    blobs += bytes(8) + fatbin((2, 90, code["kept too"]))  # padding between blobs
    text = fatbin((2, 80, code["old"]))  # looks like code for GPUs, but lies in another section
    before = elf(text=text, nv_fatbin=blobs)
    path = tmp_path / "library.so"
    path.write_bytes(before)
    assert strip_fatbin.main([str(path), "90"]) == 0
    after = path.read_bytes()
    assert len(after) == len(before)
    changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    gone = (code["old"], code["ptx"], code["new"])
    assert len(changed) == sum(map(len, gone))
    assert code["kept"] in after and code["kept too"] in after and after.count(code["old"]) == 1
    assert code["ptx"] not in after and code["new"] not in after
    assert strip_fatbin.strip(bytearray(elf(text=text)), {90}) == (0, 0)
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        strip_fatbin.strip(bytearray(b"#!/bin/sh\n"), {90})


def make_bundle(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_bundle.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_mistakes(image_folder: Path, tmp_path: Path) -> None:
    done = make_bundle(str(tmp_path), "--images", str(image_folder / "train"))
    assert done.returncode == 2 and "exists already" in done.stderr
    done = make_bundle(str(tmp_path / "out"), "--images", str(tmp_path))
    assert done.returncode == 2 and "no images in class folders" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bundle_runs_by_itself(native: None, image_folder: Path, tmp_path: Path) -> None:
    """In another folder, without git, without the checkout's own path, and without the installed package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git")
    out, python = tmp_path / "bundle", f"{sys.version_info.major}.{sys.version_info.minor}"
    words = ["--images", str(image_folder / "train"), "--python", python, "--no-packages", "--no-dali"]
    done = make_bundle(str(out), *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("24 images\n") and f"{out.name}/gpu --minutes 10" in done.stdout
    for path in out.glob("images/*/*.jpg"):
        with Image.open(path) as image:
            assert max(image.size) <= 500 and image.mode == "RGB"
    assert (out / "checkout/COMMIT").read_text().strip() and not (out / "checkout/.git").exists()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(out / "gpu"), "--rehearsal", "--out", "results", "--parts", "depthwise"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "train 24, val 24 images" in run.stdout and "depthwise  passed" in run.stdout
    commit = (out / "checkout/COMMIT").read_text().strip()
    assert f"commit {commit};" in run.stdout


def test_a_pack_in_parts_has_every_image_once_and_every_class_in_each_part(tmp_path: Path) -> None:
    images = tmp_path / "tiny"
    for split, number in (("train", 7), ("val", 4)):
        for name in ("ant", "bee"):
            (images / split / name).mkdir(parents=True)
            for image in range(number):
                (images / split / name / f"{image}.jpg").write_bytes(f"{split}{name}{image}".encode())
    paths = script("gpu_bundle").pack_parts(images, tmp_path / "packs", 3)
    assert [path.name for path in paths] == ["tiny-1.tar.xz", "tiny-2.tar.xz", "tiny-3.tar.xz"]
    found: list[str] = []
    for path in paths:
        with tarfile.open(path) as archive:
            names = archive.getnames()
            assert {name.rpartition("/")[0] for name in names} == {
                f"{s}/{c}" for s in ("train", "val") for c in ("ant", "bee")
            }
            found += names
    assert len(found) == len(set(found)) == 2 * (7 + 4)
