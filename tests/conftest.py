"""Fixtures that several test modules share: a tiny image folder, and the shard set made from it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion import convert_folder
from decoder_parts import CropLibrary, RegionLibrary, build_shim
from faults import Commands, command_line
from PIL import Image

from sdpnet.pipelines.machine import core_share
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.terminal.remedy import rebuild
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding import jpeg

CLASSES = ("ant", "bee", "cow")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the number of threads, hides GPUs and restores the handling of signals.

    Each of pytest-xdist's workers gets its share of the cores, because surplus threads spin while they wait. The number
    is explicit, so that no test depends on the load. GPUs are hidden unless `-m gpu` selects their tests: trainings
    would otherwise run there, compile for a minute each, and not reproduce the golden losses of a CPU.
    """
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also applies to the processes that tests start
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # for machines that cannot resolve their own name
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        # torch's cache of compiled code does not tell instruction sets apart: code for AVX2 from an earlier run does
        # not compile for plain x86-64 (torch 2.14).
        folder = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # A shell starts background jobs, and jobs under nohup, with these signals ignored. All processes that the tests
    # start would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None):
        return  # this process only starts the workers, which would inherit its number
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, core_share(workers))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


def make_image(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random image with a little grain: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def earlier_loaders_collected() -> None:
    """For tests that count threads: collects the loaders that earlier tests have not closed."""
    gc.collect()


@pytest.fixture(scope="session")
def native() -> None:
    """Requires the native libraries: skips if they cannot be built, and fails if they could be but are not."""
    if os.environ.get("SDPNET_SKIP_NATIVE"):
        pytest.skip("SDPNET_SKIP_NATIVE is set")
    if jpeg.available() and native_decoder.available():
        return
    compiler = shutil.which("c++") or shutil.which("g++")
    headers = "#include <cstdio>\n#include <jpeglib.h>\n"
    if (
        compiler is None
        or subprocess.run(
            [compiler, "-x", "c++", "-fsyntax-only", "-"], input=headers, text=True, capture_output=True, check=False
        ).returncode
    ):
        pytest.skip(f"not built: {rebuild()}")
    pytest.fail("a native library is not built though a compiler and libjpeg's headers are here: pip install -e .")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 24 training and 10 validation images of 33 to 700 pixels a side; JPEG, PNG, grey, alpha."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(7)
    for split, counts in (("train", (8, 8, 8)), ("val", (4, 3, 3))):
        for name, count in zip(CLASSES, counts, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(33, 320, 2) if number else rng.integers(501, 700, 2)
                image = Image.fromarray(make_image(int(rng.integers(1 << 30)), int(height), int(width)))
                if number == 1:
                    image.convert("L").save(folder / f"{number}_grey.JPEG", quality=95)
                elif number == 2:
                    image.convert("RGBA").save(folder / f"{number}_alpha.png")
                else:
                    image.save(folder / f"{number}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def shard_set(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` converted with the default settings."""
    out = tmp_path_factory.mktemp("shards")
    convert_folder(image_folder, out)
    return out


@pytest.fixture(scope="session")
def tar_set(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` converted to tars, several in each split."""
    out = tmp_path_factory.mktemp("tars")
    manifest = convert_folder(image_folder, out, partial(TarWriter, shard_bytes=60_000))
    assert all(len(split.files) > 2 for split in manifest.splits.values())
    return out


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Runs build commands with faults."""
    with Commands() as running:
        yield running


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with 10 training and 5 validation images of a few pixels; 2 and 1 of them are bad."""
    root = tmp_path_factory.mktemp("tiny")
    for split, count, bad in (("train", 5, (0, 7)), ("val", 2, (2,))):
        for label, name in enumerate(CLASSES[:2]):
            (root / split / name).mkdir(parents=True)
            for number in range(count + (split == "val" and label)):
                path = root / split / name / f"{number}.png"
                Image.fromarray(make_image(number, 9 + number, 8 + label)).save(path)
                if label * count + number in bad:
                    path.write_text("no image")
    return root


@pytest.fixture(scope="session")
def tiny_sets(commands: Commands, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny_folder` converted without a fault, by format."""
    sets = {}
    for format in ("beton", "tar"):
        sets[format] = tmp_path_factory.mktemp("sets") / format
        ended = commands.run(format, command_line(tiny_folder, sets[format]))
        assert ended.status == 0, ended.stderr
    return sets


@pytest.fixture(scope="session")
def crop_library(tmp_path_factory: pytest.TempPathFactory) -> CropLibrary:
    return CropLibrary(build_shim("crop_shim", tmp_path_factory.mktemp("crop")))


@pytest.fixture(scope="session")
def region(tmp_path_factory: pytest.TempPathFactory) -> RegionLibrary:
    return RegionLibrary(build_shim("region_shim", tmp_path_factory.mktemp("region")))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch has one thread during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stops the trainings of a test after a given step, as Ctrl-C would; see `trainings.stop_after`."""
    from trainings import stop_after  # imports many modules, which tests of conversions do not need

    return lambda step: stop_after(step, monkeypatch)


@pytest.fixture(scope="module")
def uninterrupted(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training that was not interrupted."""
    from trainings import arguments

    from sdpnet.train import main

    out = tmp_path_factory.mktemp("run")
    assert main(arguments(shard_set, out)) == 0
    return out
