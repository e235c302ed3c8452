"""What is installed has one top-level name, and works beside folders with the names of this checkout's."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from launches import TORCHRUN
from trainings import arguments

from sdpnet import __version__

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "pipelines", "preprocess", "sdpnet")


def build(source: Path, hook: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build backend, with the packages that are installed here."""
    code = f"from scikit_build_core import build; print(build.{hook}({str(out)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked as pip does it."""
    pytest.importorskip("scikit_build_core")
    out = tmp_path_factory.mktemp("sdist")
    done = build(ROOT, "build_sdist", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.iterdir()
    with tarfile.open(archive) as opened:
        opened.extractall(out, filter="data")
    archive.unlink()
    (unpacked,) = out.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def site(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist gives, unpacked as pip does it, with the native libraries that the checkout has."""
    wheels, unpacked = (tmp_path_factory.mktemp(name) for name in ("wheels", "site"))
    # Compiling takes a minute, and is not the subject.
    done = build(sdist, "build_wheel", wheels, SDPNET_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"sdpnet-{__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(unpacked)
    for library in (path for name in FOLDERS[1:3] for path in (ROOT / name).rglob("*.so")):
        target = unpacked / "sdpnet" / library.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(library, target)
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


def test_the_sdist_has_what_the_suite_needs(sdist: Path) -> None:
    for folder in (*FOLDERS, "cmake", "docs", "examples", "records", "scripts", "tests"):
        ours = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file() and not skipped(path)}
        packed = {path.relative_to(sdist) for path in (sdist / folder).rglob("*") if path.is_file()}
        assert packed == ours
    for name in (
        "CITATION.cff",
        "SECURITY.md",
        "dev",
        "hubconf.py",
        "mkdocs.yml",
        "pyproject.toml",
        "requirements.lock",
    ):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(sdist / "dev", os.X_OK) and os.readlink(sdist / "sdpnet" / "pipelines") == "../pipelines"


def skipped(path: Path) -> bool:
    """Whether git ignores a file."""
    return path.suffix in (".pyc", ".so") or "__pycache__" in path.parts


def test_without_a_compiler_the_build_fails_and_says_what_to_do(sdist: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    done = build(sdist, "build_wheel", tmp_path, CC="/none/cc", CXX="/none/c++")
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []
    said = done.stdout + done.stderr
    assert "could not be built. To do, one of:" in said
    assert "g++ libjpeg-dev" in said and "SDPNET_SKIP_NATIVE=1 pip install" in said


def test_links_that_were_lost_are_noticed(sdist: Path, tmp_path: Path) -> None:
    """As in a .zip file of the checkout."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    copy = tmp_path / "copy"
    shutil.copytree(sdist, copy, symlinks=True)
    (copy / "sdpnet" / "pipelines").unlink()
    (copy / "sdpnet" / "pipelines").write_text("../pipelines")
    done = build(copy, "build_wheel", tmp_path / "out")
    assert done.returncode != 0 and "sdpnet/pipelines is no folder: the symbolic links" in done.stdout + done.stderr


def test_the_wheel_names_the_bundled_library(tmp_path: Path) -> None:
    """The SBOM, as the configuration of the build writes it; `./dev wheel` looks for it in the wheel."""
    assembler = platform.machine() != "x86_64" or shutil.which("nasm")
    if not (shutil.which("cmake") and shutil.which("c++") and shutil.which("ninja") and assembler):
        pytest.skip("no cmake, compiler, ninja or assembler")
    variables = (
        "SDPNET_LIBJPEG=bundled",
        f"SKBUILD_PROJECT_VERSION_FULL={__version__}",
        f"SKBUILD_METADATA_DIR={tmp_path}",
    )
    command = ["cmake", "-S", str(ROOT / "cmake"), "-B", str(tmp_path), "-G", "Ninja"]
    command += [f"-D{variable}" for variable in variables]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sbom = json.loads((tmp_path / "libjpeg-turbo.cdx.json").read_text(encoding="utf-8"))
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    ours, (bundled,) = sbom["metadata"]["component"], sbom["components"]
    assert (ours["name"], ours["version"]) == ("sdpnet", __version__)
    assert sbom["dependencies"] == [{"ref": ours["bom-ref"], "dependsOn": [bundled["bom-ref"]]}]
    recipe = (ROOT / "cmake" / "libjpeg_turbo.cmake").read_text(encoding="utf-8")
    version, digest = (re.search(rf"libjpeg_turbo_{name} (\S+)\)", recipe)[1] for name in ("version", "sha256"))  # type: ignore[index]
    assert bundled["version"] == version and all(version in bundled[key] for key in ("cpe", "purl"))
    (source,) = bundled["externalReferences"]
    assert source["hashes"] == [{"alg": "SHA-256", "content": digest}] and source["url"].endswith(f"/{version}.tar.gz")
    installed = (tmp_path / "cmake_install.cmake").read_text(encoding="utf-8")
    for name in ("sboms", "licenses", "LICENSE-libjpeg-turbo.md", "README-libjpeg-turbo.ijg", "libjpeg-turbo.cdx.json"):
        assert name in installed


def test_the_libraries_show_only_our_functions(native: None) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    for name in ("pipelines/native/crop_decoder.so", "pipelines/native/ceilings.so", "preprocess/native/jpeg_codec.so"):
        command = [readelf, "--wide", "--dyn-syms", str(ROOT / name)]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [row.split() for row in table.splitlines() if re.match(r" +\d+:", row)]
        shown = {row[7].partition("@")[0] for row in rows if len(row) > 7 and row[6] != "UND"}
        assert shown and all(re.match("(ceilings|codec|decoder|mapping)_", symbol) for symbol in shown), name


def test_the_version_is_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and not re.search("^version", project, re.MULTILINE)
    assert "\nversion" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


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
    assert not [path for path in site.rglob("*") if path.suffix in (".cpp", ".h")]
    packed = {path.relative_to(site / "sdpnet") for path in (site / "sdpnet").rglob("*.py")}
    ours = {path.relative_to(ROOT / "sdpnet") for path in (ROOT / "sdpnet").rglob("*.py") if not path.is_symlink()}
    assert packed >= ours and {path.parts[0] for path in packed} >= {"pipelines", "preprocess"}


def test_the_program_train_is_for_a_checkout_only(site: Path, sdist: Path, tmp_path: Path) -> None:
    """Other packages install a program of this name, too."""
    (entries,) = site.glob("sdpnet-*.dist-info/entry_points.txt")
    programs = [line for line in entries.read_text().splitlines() if "=" in line]
    assert [line.replace(" ", "") for line in programs] == ["sdpnet=sdpnet.cli:main"]
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    done = build(sdist, "build_editable", tmp_path, SDPNET_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.iterdir()
    unpacked = zipfile.ZipFile(wheel)
    (name,) = (name for name in unpacked.namelist() if name.endswith(".data/scripts/train"))
    script = unpacked.read(name).decode()
    assert script.startswith("#!python\n"), "installers replace it"
    (tmp_path / "train").write_text(script)
    command = [sys.executable, str(tmp_path / "train"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert text.startswith("usage: sdpnet train ")


def test_an_archive_cannot_be_imported(site: Path, tmp_path: Path) -> None:
    """The libraries and the configs could not be loaded from it."""
    archive = Path(shutil.make_archive(str(tmp_path / "sdpnet"), "zip", site))
    command = [sys.executable, "-m", "sdpnet", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(archive)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"sdpnet cannot be imported from an archive ({archive}/sdpnet)" in last and "install it with pip" in last


def test_an_installed_copy_has_no_commit(site: Path, tmp_path: Path) -> None:
    """Its environment may lie in the checkout of another project."""
    shutil.copytree(site / "sdpnet", tmp_path / ".venv" / "sdpnet")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    code = "from sdpnet.pipelines import machine; print(machine.__file__, machine.commit())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / ".venv")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/.venv/sdpnet/pipelines/machine.py None\n"


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
