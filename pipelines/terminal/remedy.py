"""Finds the command that installs a missing dependency and that works for this installation.

sdpnet is not on a package index, so `pip install 'sdpnet[dali]'` does not work. The right command depends on where the
package was imported from: a checkout, or an installation whose metadata lists the requirements of each extra and the
place that it was installed from.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

__all__ = ["checkout", "install", "install_extra", "missing_package", "rebuild", "set_up_again"]

_ABOVE: Final = Path(__file__).resolve().parents[2]
# Packages that conversion and verification do without -> the extra that brings them
_EXTRAS: Final = {
    "torch": "train",
    "torchvision": "train",
    "safetensors": "train",
    "jinja2": "report",
    "markupsafe": "report",
    "plotly": "report",
}
_HEADERS: Final = "install g++ and libjpeg's headers (Debian: g++ libjpeg-dev)"


def checkout() -> Path | None:
    """The directory of the checkout that this package is imported from, or None if it is not from a checkout."""
    try:
        text = (_ABOVE / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    return _ABOVE if re.search(r'^name = "sdpnet"$', text, re.MULTILINE) else None


def install(*requirements: str) -> str:
    """The command that installs packages into the environment of the running Python."""
    words = " ".join(map(shlex.quote, requirements))
    if not _has_pip() and Path(sys.prefix, "pipx_metadata.json").is_file():
        return f"pipx inject {shlex.quote(Path(sys.prefix).name)} {words}"
    return f"{_pip_install()} {words}"


def install_extra(extra: str) -> str:
    """The command that installs the requirements of an extra of sdpnet (such as "dali"; see pyproject.toml)."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import, and seldom needed

    above = checkout()
    if above is not None:
        return f"{_pip_install()} -e {shlex.quote(f'{above}[{extra}]')}"
    try:
        requires = distribution("sdpnet").requires or []
    except PackageNotFoundError:
        requires = []
    extras = [line.split(";")[0].strip() for line in requires if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    # An installation without metadata is a copy of the folders. Then only the extra's name can be given.
    return install(*extras) if extras else f"install what the extra {extra!r} in sdpnet's pyproject.toml lists"


def missing_package(error: Exception) -> str | None:
    """The sentence about a package that is missing or that cannot be imported, with the command that installs it.

    Args:
        error: what an import raised. A package that does not match another one, a driver or the system raises various
            errors, such as torchvision beside another version of torch.

    Returns:
        None if no extra brings the package.
    """
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    package = name.partition(".")[0]
    if package in _EXTRAS:
        extra = _EXTRAS[package]
        return f"{package} is not installed; this needs the extra {extra!r}: {install_extra(extra)}"
    broken = _importing(error)
    if broken is None:
        return None
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{broken} cannot be imported: {reason}; uninstall it, then {install_extra(_EXTRAS[broken])}"


def _importing(error: Exception) -> str | None:
    """The outermost package of an extra that was being imported when an error was raised, or None."""
    trace = error.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if trace.tb_frame.f_code.co_name == "<module>" and package in _EXTRAS:
            return package
        trace = trace.tb_next
    return None


def rebuild() -> str:
    """The command that builds the native libraries (crop decoder, JPEG codec, ceilings)."""
    above = checkout()
    source = f"-e {shlex.quote(str(above))}" if above else f"--no-cache-dir --force-reinstall {_origin()}"
    return set_up_again(f"{_HEADERS}, then {_pip_install()} --no-deps {source}")


def set_up_again(otherwise: str) -> str:
    """`./dev setup --retry (or: OTHERWISE)` if ./dev made the running environment, else `otherwise` alone."""
    above = checkout()
    if above is None or Path(sys.prefix).resolve() != above / ".venv" or not (above / "dev").is_file():
        return otherwise
    dev = "./dev" if Path.cwd() == above else shlex.quote(str(above / "dev"))
    return f"{dev} setup --retry (or: {otherwise})"


def _pip_install() -> str:
    """The command to which packages are appended.

    It is `pip install` if that word starts the pip of the running Python, `uv pip install` if uv made an environment
    without pip, else the running Python with `-m pip install`.
    """
    found, beside = shutil.which("pip"), Path(sys.executable).with_name("pip")
    if found is not None and os.path.realpath(found) == os.path.realpath(beside):
        return "pip install"
    python = shlex.quote(sys.executable)
    if not _has_pip() and (_made_by_uv() or shutil.which("uv")):
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _has_pip() -> bool:
    from importlib.machinery import PathFinder  # seldom needed; the hook of setuptools may warn when it sees "pip"

    return PathFinder.find_spec("pip") is not None


def _made_by_uv() -> bool:
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return re.search(r"^uv = ", text, re.MULTILINE) is not None


def _origin() -> str:
    """The place that this package was installed from (PEP 610), as an argument for pip."""
    from importlib.metadata import PackageNotFoundError, distribution  # these are slow to import, and seldom needed
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        said = distribution("sdpnet").read_text("direct_url.json")
        found = json.loads(said or "{}")
        url = found["url"]
    except (PackageNotFoundError, ValueError, KeyError):
        return "SDPNET, where SDPNET is the folder or address that it was installed from"
    if "vcs_info" in found:
        url = f"{found['vcs_info']['vcs']}+{url}@{found['vcs_info']['commit_id']}"
    elif urlsplit(url).scheme == "file":
        url = url2pathname(urlsplit(url).path)
    return shlex.quote(url)
