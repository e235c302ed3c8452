"""Lists the pipelines, finds out which of them can be used here, and chooses the one that `auto` stands for.

To add a pipeline, write a module in this folder with a function `make(source, manifest)`, and add its name to
`PIPELINES` and to `DataOptions.pipeline`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from sdpnet.pipelines.errors import BackendMissingError
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.terminal.remedy import install, install_extra, rebuild, set_up_again

if TYPE_CHECKING:  # torch and the contract are imported by the executors themselves
    import torch

    from sdpnet.pipelines.contract import Loader, Source
    from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["PIPELINES", "Executor", "choose_pipeline", "executor_of", "installed", "why_missing"]


class Executor(NamedTuple):
    """What is known about a pipeline before its module is imported.

    Attributes:
        module: the name of the pipeline's module.
        package: the name of the package that it needs; empty for `native`, which needs its native library instead.
        remedy: returns the command that installs what it needs.
        can_mask: whether `data.on_error` may be "mask".
    """

    module: str
    package: str
    remedy: Callable[[], str]
    can_mask: bool = False


PIPELINES: Final[dict[str, Executor]] = {
    "native": Executor("sdpnet.pipelines.executors.native", "", rebuild, can_mask=True),
    "torchvision": Executor("sdpnet.pipelines.executors.torchvision", "torchvision", lambda: install("torchvision")),
    "ffcv": Executor("sdpnet.pipelines.executors.ffcv", "ffcv", lambda: set_up_again(install_extra("ffcv"))),
    "dali": Executor("sdpnet.pipelines.executors.dali", "nvidia.dali", lambda: set_up_again(install_extra("dali"))),
    "synthetic": Executor("sdpnet.pipelines.executors.synthetic", "torch", lambda: install("torch")),
}


def choose_pipeline(device: torch.device, shard_format: str) -> str:
    """The pipeline that `auto` stands for: the first one of native, dali, ffcv and torchvision that is installed.

    dali is considered only on a GPU, and ffcv only for `.beton` files.
    """
    order = ["native", "dali"] if device.type == "cuda" else ["native"]
    order += ["ffcv"] if shard_format == "beton" else []
    return next((name for name in order if installed(name)), "torchvision")


def executor_of(name: str) -> Callable[[Source, Manifest], Loader]:
    """Imports a pipeline and returns the function that makes its loader.

    Raises `BackendMissingError` if its library cannot be imported. The message names the cause, the command that fixes
    it, and the pipelines that would work.
    """
    executor = PIPELINES[name]
    try:
        if name == "native":
            native_decoder.load()
        return importlib.import_module(executor.module).make
    except (ImportError, OSError, RuntimeError) as error:
        # OSError: a shared library that the package needs is missing. RuntimeError: torchvision is of another torch.
        working = [other for other in PIPELINES if other != name and installed(other)]
        cause = " ".join(str(error).split())
        raise BackendMissingError(
            f"pipeline {name!r} cannot be used here: {cause}; to fix it: {executor.remedy()}; "
            f"these would work: {', '.join(working)}"
        ) from error


def why_missing(name: str) -> str | None:
    """Returns None if a pipeline can be used here, or else one line that says why not and what to do.

    The pipeline's library is imported.
    """
    try:
        executor_of(name)
    except BackendMissingError as error:
        return str(error)
    return None


def installed(name: str) -> bool:
    """Whether what a pipeline needs is here. It is not imported."""
    if name == "native":
        return native_decoder.available()
    try:
        return importlib.util.find_spec(PIPELINES[name].package) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is absent
        return False
