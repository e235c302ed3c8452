"""Remedies: the commands that errors print work for the installation that prints them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sdpnet.pipelines.terminal import remedy
from sdpnet.pipelines.terminal.remedy import checkout, install, install_extra, rebuild, set_up_again

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """What `importlib.metadata.distribution` gives: `origin` is direct_url.json's text."""

    requires = ("torch<2.16,>=2.10", 'ffcv==1.0.2; extra == "ffcv"', 'numba<0.69,>=0.61; extra == "ffcv"')

    def __init__(self, origin: str | None = None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.origin


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package in a site-packages directory, without a checkout around it."""
    monkeypatch.setattr(remedy, "_ABOVE", tmp_path)
    return tmp_path


def test_this_is_a_checkout() -> None:
    assert checkout() == ROOT


@pytest.mark.parametrize("extra", ["ffcv", "dali", "timm", "export", "ray", "tensorboard", "wandb"])
def test_an_extra_of_a_checkout(extra: str) -> None:
    *pip, action, editable, target = shlex.split(install_extra(extra))
    assert pip in (["pip"], [sys.executable, "-m", "pip"]) and (action, editable) == ("install", "-e")
    path, _, name = target.partition("[")
    assert (Path(path) / "pyproject.toml").samefile(ROOT / "pyproject.toml") and name == f"{extra}]"
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), "no such extra"


def test_a_path_with_blanks_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "my projects" / "sdp net"
    place.mkdir(parents=True)
    (place / "pyproject.toml").write_text('[project]\nname = "sdpnet"\n')
    monkeypatch.setattr(remedy, "_ABOVE", place)
    assert shlex.split(install_extra("dali"))[-1] == f"{place}[dali]"
    assert shlex.split(rebuild().split(", then ")[1])[-1] == str(place)


def test_another_projects_pyproject_is_no_checkout(copied: Path) -> None:
    (copied / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert checkout() is None


def test_an_extra_of_an_installed_copy(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on no index: what the extra needs is."""
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert shlex.split(install_extra("ffcv"))[-2:] == ["ffcv==1.0.2", "numba<0.69,>=0.61"]

    def none(name: str) -> Installed:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", none)
    assert install_extra("ffcv") == "install what the extra 'ffcv' in sdpnet's pyproject.toml lists"
    assert "where it was installed from" not in rebuild() and rebuild().endswith("that it was installed from")


@pytest.mark.parametrize(
    ("origin", "argument"),
    [
        ('{"url": "file:///home/me/sdp%20net", "dir_info": {}}', "/home/me/sdp net"),
        (
            '{"url": "https://host/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}',
            "git+https://host/r.git@ab12",
        ),
    ],
)
def test_a_copy_is_built_again_from_where_it_came(
    origin: str, argument: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed(origin))
    assert "libjpeg" in rebuild() and shlex.split(rebuild().split(", then ")[1])[-2:] == ["--force-reinstall", argument]


def test_dev_is_named_where_it_made_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert set_up_again("pip install x") == "pip install x", "./dev would change another environment"
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    monkeypatch.setattr(remedy.Path, "resolve", lambda self: self)  # .venv may be a link
    monkeypatch.chdir(tmp_path)
    assert set_up_again("pip install x") == f"{ROOT}/dev setup --retry (or: pip install x)"
    monkeypatch.chdir(ROOT)
    assert set_up_again("pip install x") == "./dev setup --retry (or: pip install x)"


def test_pip_is_the_running_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` may be started by its path, with another environment's pip in PATH."""
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "pip").write_text("")
        (tmp_path / place / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "ours" / "python"))
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "ours"))
    assert install("a>=1", "b") == "pip install 'a>=1' b"
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "theirs"))
    assert install("b") == f"{tmp_path}/ours/python -m pip install b"


@pytest.mark.parametrize("reason", ["made by uv", "uv in PATH", "pipx", "neither"])
def test_an_environment_without_pip(reason: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv makes environments without pip, and so does pipx with uv."""
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    prefix = copied / "my env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\n" + ("uv = 0.13.9\n" if reason == "made by uv" else ""))
    if reason == "pipx":
        (prefix / "pipx_metadata.json").write_text("{}")
    if reason == "uv in PATH":
        (prefix / "bin" / "uv").write_text("")
        (prefix / "bin" / "uv").chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    monkeypatch.setenv("PATH", str(prefix / "bin"))
    python = f"'{prefix}/bin/python'"
    wanted = {"pipx": "pipx inject 'my env'", "neither": f"{python} -m pip install"}
    assert install("a>=1", "b") == f"{wanted.get(reason, f'uv pip install --python {python}')} 'a>=1' b"


def test_no_message_names_an_index_that_lacks_sdpnet() -> None:
    for package in ("pipelines", "preprocess", "sdpnet"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "remedy.py":
                assert "install 'sdpnet" not in path.read_text(encoding="utf-8"), path
