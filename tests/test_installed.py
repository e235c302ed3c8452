"""What is installed has one top-level name, and works beside folders with the names of this checkout's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launches import TORCHRUN
from trainings import arguments

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "pipelines", "preprocess", "sdpnet")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip does it, with the native libraries that the checkout has."""
    source, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "wheels"))
    for name in FOLDERS:
        leave_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    without_compiler = {**os.environ, "CC": "false", "CXX": "false"}  # which takes a minute, and is not the subject
    subprocess.run(command, cwd=source, env=without_compiler, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    unpacked = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(unpacked)
    for library in (path for name in FOLDERS[1:3] for path in (ROOT / name).rglob("*.so")):
        shutil.copy(library, unpacked / "sdpnet" / library.relative_to(ROOT))
    return unpacked


@pytest.fixture
def alien(tmp_path: Path) -> Path:
    """A directory whose folders have our names, and end whoever imports or reads them."""
    for name in FOLDERS[:3]:
        (tmp_path / name).mkdir()
        for module in ("__init__", "contract", "build_ffcv", "errors"):
            (tmp_path / name / f"{module}.py").write_text("raise SystemExit('an alien module was imported')\n")
    (tmp_path / "configs" / "debug.yaml").write_text("alien: true\n")
    return tmp_path


def test_the_wheel_has_one_name(site: Path) -> None:
    names = {path.name for path in site.iterdir()}
    assert "sdpnet" in names and all(name == "sdpnet" or name.endswith(".dist-info") for name in names)
    for module in (
        "pipelines/plan.py",
        "preprocess/build_ffcv.py",
        "configs/modern/sdpnet_xl.yaml",
        "train.py",
        "py.typed",
    ):
        assert (site / "sdpnet" / module).is_file()
    packed = {path.relative_to(site / "sdpnet") for path in (site / "sdpnet").rglob("*.py")}
    ours = {path.relative_to(ROOT / "sdpnet") for path in (ROOT / "sdpnet").rglob("*.py") if not path.is_symlink()}
    assert packed >= ours and {path.parts[0] for path in packed} >= {"pipelines", "preprocess"}


def test_the_wheel_works_beside_alien_folders(site: Path, alien: Path, shard_set: Path, image_folder: Path) -> None:
    """Import, torchrun, verify and predict."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    settings = ["train.epochs=1", "data.batch_size_per_gpu=2", "train.device=cpu"]
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "sdpnet.train", *arguments(shard_set, alien / "run", *settings)]
    subprocess.run(command, cwd=alien, env=environment, check=True, capture_output=True, timeout=300)
    image = next(path for path in image_folder.rglob("*") if path.is_file())
    code = f"""
import sdpnet.pipelines.plan, sdpnet.preprocess.build_ffcv
from sdpnet import cli
assert sdpnet.__file__.startswith({str(site)!r}), sdpnet.__file__
assert cli.main(["verify", {str(shard_set)!r}]) == 0
assert cli.main(["predict", "--model", "run", {str(image)!r}]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=alien, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize(
    "command", [[str(ROOT / "preprocess" / "verify.py"), "--quick"], ["-m", "sdpnet.preprocess.verify", "--quick"]]
)
def test_the_checkout_works_beside_alien_folders(command: list[str], alien: Path, shard_set: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, str(shard_set)], cwd=alien, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkout_without_links(alien: Path, shard_set: Path) -> None:
    """As torch.hub unpacks it: a link is a small file with the link's text."""
    copy = alien / "hub"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", copy)
    for name in FOLDERS[:3]:
        link = copy / "sdpnet" / name
        text = os.readlink(link)
        link.unlink()
        link.write_text(text)
    code = f"""
import sys; sys.path.insert(0, {str(copy)!r})
import hubconf, sdpnet.pipelines.plan
from sdpnet.config.load import load_config
assert sdpnet.pipelines.plan.__file__.startswith({str(copy)!r})
assert load_config("debug").model.name == "sdpnet_tiny"
hubconf.sdpnet_l(dim=48, heads=2, num_classes=3)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=alien, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
