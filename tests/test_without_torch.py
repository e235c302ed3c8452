"""A light installation: everything that `pip install sdpnet` brings and nothing else, so neither torch nor the rest of
the extras. Conversion, verification and the plan work with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What the dependencies of pyproject.toml, without extras, are imported under, and what these need in turn.
LIGHT = ("numpy", "PIL", "yaml", "_yaml", "rich", "pygments", "markdown_it", "mdurl", "zlib_ng", "sdpnet")
# As sitecustomize, in the processes that commands start as well: only the standard library and LIGHT can be imported.
SITE = f"""
import sys
LIGHT = {{*sys.stdlib_module_names, *{LIGHT!r}, "__main__", "__mp_main__"}}
class Others:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in LIGHT and not top.startswith(("_editable", "__editable__", "_distutils_hack", "sitecustomize")):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Others)
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes without torch."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "PYTHONNOUSERSITE": "1"}


def run(light: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=light, capture_output=True, text=True, timeout=300, check=False)


def test_the_light_dependencies_are_the_projects() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("\ndependencies = [\n")[2].partition("\n]\n")[0]
    names = set(re.findall(r'^    "([\w-]+)', listed, re.MULTILINE))
    assert names == {"numpy", "pillow", "pyyaml", "rich", "zlib-ng"}


def test_torch_cannot_be_imported_there(light: dict[str, str]) -> None:
    done = run(light, "-c", "import torch")
    assert done.returncode == 1 and done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")


def test_modules_of_preprocess_and_the_plan_are_imported(light: dict[str, str]) -> None:
    code = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("preprocess").rglob("*.py")):
    name = ".".join(("sdpnet", *path.with_suffix("").parts)).removesuffix(".__init__")
    if not name.startswith("sdpnet.preprocess.sources.parquet"):  # its modules are for pyarrow
        importlib.import_module(name)
import sdpnet.pipelines.plan, sdpnet.pipelines.options
"""
    done = run(light, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["build_ffcv", "build_dali", "convert", "adopt"])
def test_conversion_and_verification(command: str, light: dict[str, str], image_folder: Path, tmp_path: Path) -> None:
    words = ["--source", str(image_folder), "--out", str(tmp_path / "shards")]
    done = run(light, "-m", f"sdpnet.preprocess.{command}", *words)
    assert done.returncode == 0, done.stderr
    done = run(light, "-m", "sdpnet.cli", "verify", str(tmp_path / "shards"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["train", "--config", "debug", "--out", "run"], "torch", "train"),
        (["predict", "--model", "m", "i.jpg"], "torch", "train"),
        (["bench", "--data", "shards"], "torch", "train"),
    ],
)
def test_what_needs_an_extra_says_which(words: list[str], package: str, extra: str, light: dict[str, str]) -> None:
    done = run(light, "-m", "sdpnet.cli", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{package} is not installed; this needs the extra '{extra}': " in done.stderr
    assert done.stderr.rstrip().endswith(f"[{extra}]'")


def test_a_page_needs_the_extra_report(light: dict[str, str], shard_set: Path, tmp_path: Path) -> None:
    words = ["describe", str(shard_set), "--images", "0", "--html", str(tmp_path / "page.html")]
    done = run(light, "-m", "sdpnet.cli", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "jinja2 is not installed; this needs the extra 'report': " in done.stderr


def test_the_doctor_says_what_is_missing(light: dict[str, str]) -> None:
    done = run({**light, "COLUMNS": "400"}, "-m", "sdpnet.cli", "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{ROOT / 'sdpnet'} (a checkout)" in done.stdout
    *_, consequence, last = done.stdout.splitlines()
    assert last.startswith("torch is not installed") and last.endswith("[train]'")
    facts = json.loads(run(light, "-m", "sdpnet.cli", "doctor", "--json").stdout)
    assert facts["versions"]["sdpnet"] and facts["imported_from"] == str(ROOT / "sdpnet")
    assert facts["verdict"] == [consequence, last] and facts["usable_cores"] >= 1


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_torch_that_cannot_be_imported(error: str, light: dict[str, str], tmp_path: Path) -> None:
    """As of another CUDA."""
    (tmp_path / "torch.py").write_text(f"raise {error}('libcudart.so.13: no such file\\nmore')\n")
    broken = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    reason = "torch cannot be imported: libcudart.so.13: no such file; uninstall it, then "
    done = run(broken, "-m", "sdpnet", "train", "--config", "debug", "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"error: {reason}")
    done = run(broken, "-m", "sdpnet", "doctor")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[-1].startswith(reason)


def test_a_torchvision_of_another_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    broken = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run(broken, "-m", "sdpnet", "predict", "--model", "m", "i.jpg")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "torchvision cannot be imported: operator torchvision::nms does not exist; uninstall it" in done.stderr
    done = run(broken, "-m", "sdpnet", "doctor", "--json")
    assert "operator torchvision::nms" in json.loads(done.stdout)["pipelines"]["torchvision"]


def test_the_loader_names_the_extra(light: dict[str, str]) -> None:
    done = run(light, "-c", "import sdpnet; sdpnet.ImageLoader")
    assert "ModuleNotFoundError: ImageLoader: torch is not installed; this needs the extra 'train': " in done.stderr
