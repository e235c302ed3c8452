"""Which pipelines there are, which of them can be used here, and which one `auto` stands for.

A new pipeline is a module in this folder with a function `make(source, manifest)`, an entry of `PIPELINES`, and a word
more in `DataOptions.pipeline`.
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

__all__ = ["PIPELINES", "Executor", "choose_pipeline", "executor_of", "why_missing"]


class Executor(NamedTuple):
    """What is known of a pipeline before its module is imported.

    Attributes:
        module: its name.
        package: the name of what it needs; empty for `native`, which needs its library instead.
        remedy: says how to get that.
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
    """The pipeline that `auto` stands for.

    It is the first one that is installed of native, dali (on a GPU only), ffcv (it reads .beton files only) and
    torchvision.
    """
    order = ["native", "dali"] if device.type == "cuda" else ["native"]
    order += ["ffcv"] if shard_format == "beton" else []
    return next((name for name in order if _installed(name)), "torchvision")


def executor_of(name: str) -> Callable[[Source, Manifest], Loader]:
    """Imports a pipeline and returns the function that makes its loader.

    Raises `BackendMissingError` where its library cannot be imported; the message has the cause, the command that
    mends it, and the pipelines that would work.
    """
    executor = PIPELINES[name]
    try:
        if name == "native":
            native_decoder.load()
        return importlib.import_module(executor.module).make
    except (ImportError, OSError) as error:  # OSError: a shared library that the package needs is missing
        working = [other for other in PIPELINES if other != name and _installed(other)]
        cause = " ".join(str(error).split())
        raise BackendMissingError(
            f"pipeline {name!r} cannot be used here: {cause}; to mend it: {executor.remedy()}; "
            f"these would work: {', '.join(working)}"
        ) from error


def why_missing(name: str) -> str | None:
    """None when a pipeline can be used here; else the line that says why not and what to do. Imports its library."""
    try:
        executor_of(name)
    except BackendMissingError as error:
        return str(error)
    return None


def _installed(name: str) -> bool:
    if name == "native":
        return native_decoder.available()
    try:
        return importlib.util.find_spec(PIPELINES[name].package) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is absent
        return False
