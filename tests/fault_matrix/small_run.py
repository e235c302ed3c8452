"""A shard set of 36 images and the command that trains on it for a few seconds: what the trials of runs begin with."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["in_process", "load_all", "loaded", "make_shards", "training"]

_PRELOADED = ("PIL", "mpmath", "networkx", "numpy", "optree", "pipelines", "rich", "sdpnet", "sympy", "torch", "triton")
SETTINGS = ("data.num_workers=1", "train.checkpoint_interval=2", "train.device=cpu", "ema.decay=0.9")
SETTINGS += ("model.dropout=0.2", "train.amp=fp32", "data.batch_size_per_gpu=4")


def make_shards(folder: Path) -> Path:
    """24 training and 12 validation images of three classes, converted."""
    from conftest import make_image
    from conversion import convert_folder
    from PIL import Image

    for split, number in (("train", 8), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cow")):
            of_class = folder / "images" / split / name
            of_class.mkdir(parents=True)
            for index in range(number):
                pixels = make_image(100 * label + index, 40 + 7 * index, 90 - 5 * index)
                Image.fromarray(pixels).save(of_class / f"{index}.png")
    data = folder / "shards"
    data.mkdir()
    convert_folder(folder / "images", data)
    return data


def training(data: Path, out: Path, *settings: str) -> list[str]:
    """The flags of `train`: six steps an epoch in a global batch of four, saved after every second step."""
    from sdpnet.pipelines.native import decoder as native_decoder

    pipeline = "native" if native_decoder.available() else "torchvision"
    command = ["--config", "debug", "--data", str(data), "--out", str(out), "--pipeline", pipeline]
    return command + [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]


def loaded() -> list[str]:
    """The modules that a child has loaded by now and that its parent may load for the next ones: no backends."""
    return sorted(name for name in sys.modules if name.split(".")[0] in _PRELOADED)


def load_all(modules: Iterable[str] = ()) -> None:
    """Imports everything that a training imports, once, before the first fork, and other modules by name."""
    import torch

    import sdpnet.train  # noqa: F401

    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    torch.set_num_threads(1)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own: the one that asks has more threads, and must not fork."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
