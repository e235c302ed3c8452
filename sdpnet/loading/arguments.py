"""What the arguments of `ImageLoader` mean: the options of the data path, this process's part, and the device.

Values are checked as those of a config file are, and messages name the argument instead of the config key.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from sdpnet.config.load import load_config, section_from
from sdpnet.pipelines.errors import UserError, nearest, require
from sdpnet.pipelines.executors.views import View
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import CropOptions

__all__ = [
    "Augment",
    "argument_names",
    "augment_options",
    "classes_from",
    "data_options",
    "device_from",
    "flag_from",
    "integer_from",
    "shard_from",
    "split_role",
    "views_from",
]

Augment = str | os.PathLike[str] | AugmentOptions | Mapping[str, Any]

_KEYS: Final = "|".join(field.name for field in fields(DataOptions))
_MAX_VIEWS: Final = 64
_SPLIT_KEYS: Final = " (see data.train_split and data.val_split)"


@contextlib.contextmanager
def argument_names() -> Iterator[None]:
    """Names the arguments of `ImageLoader` in the messages of `UserError`s, in place of config keys and flags."""
    try:
        yield
    except UserError as error:
        text = str(error).replace(_SPLIT_KEYS, "").replace("data.batch_size_per_gpu", "batch_size")
        text = re.sub(rf"\bdata\.({_KEYS})\b", r"\1", text).replace("--pipeline ", "pipeline ")
        raise type(error)(text) from None


def augment_options(augment: Augment) -> tuple[AugmentOptions, dict[str, Any]]:
    """The augmentations, and what else a recipe says about crops.

    Args:
        augment: "none", a recipe's name, the path of a .yaml file, the options, or a mapping of their keys.

    Returns:
        The options, and the keys `crop` and `centre_fraction` of a recipe's section `data`, if it is one.

    Raises:
        UserError: there is no such recipe, or a key or value is not valid.
    """
    if isinstance(augment, AugmentOptions):
        return augment, {}
    if isinstance(augment, Mapping):
        return section_from(AugmentOptions, augment, "augment"), {}
    allowed = '"none", the name of a recipe, the path of a .yaml file, AugmentOptions or a mapping of their keys'
    require(isinstance(augment, (str, os.PathLike)), "augment", augment, allowed)
    name = os.fspath(augment)
    if name == "none":
        return AugmentOptions(), {}
    try:
        config = load_config(str(name))
    except UserError as error:
        raise UserError(f"augment = {name!r}: {error}") from None
    return config.augment, {"crop": config.data.crop, "centre_fraction": config.data.centre_fraction}


def data_options(
    data: str | os.PathLike[str], split: str, crop: CropOptions | Mapping[str, Any] | None, values: dict[str, Any]
) -> DataOptions:
    """The options of the data path.

    Args:
        data: the path of a shard set.
        split: the split's name.
        crop: the random resized crops of a training, or None for those in `values`.
        values: further keys of `DataOptions`.

    Raises:
        UserError: a value is not valid. Use it within `argument_names`.
    """
    is_path = isinstance(data, (str, os.PathLike)) and isinstance(os.fspath(data), str) and bool(os.fspath(data))
    require(is_path and "\0" not in os.fspath(data), "data", data, "the path of a shard set")
    require(isinstance(split, str), "split", split, "the name of a split, such as 'train' or 'val'")
    values = {**values, "path": os.fspath(data), "train_split": split, "val_split": split}
    for name in ("image_size", "batch_size_per_gpu", "num_workers"):
        values[name] = _whole(values[name])
    ahead = values["prefetch_batches"] = _whole(values["prefetch_batches"])
    require(ahead == "auto" or not isinstance(ahead, str), "prefetch_batches", ahead, "1 to 4,096, or auto")
    if crop is not None:
        require(isinstance(crop, (CropOptions, Mapping)), "crop", crop, "CropOptions or a mapping of their keys")
        values["crop"] = crop
    return section_from(DataOptions, values, "data")


def _whole(value: Any) -> Any:
    """A whole number of any type (such as numpy's) as an int; other values as they are."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def integer_from(name: str, value: Any, smallest: int | None = None) -> int:
    """A whole number of any type as an int. Raises `UserError` for other values."""
    whole = _whole(value)
    is_whole = isinstance(whole, int) and not isinstance(whole, bool)
    allowed = "a whole number" if smallest is None else f"a whole number from {smallest} on"
    require(is_whole and (smallest is None or whole >= smallest), name, value, allowed)
    return int(whole)


def flag_from(name: str, value: Any) -> bool:
    """True or False. Raises `UserError` for other values."""
    require(isinstance(value, bool), name, value, "True or False")
    return bool(value)


def device_from(device: str | int | torch.device | None) -> torch.device:
    """The device of an argument; None is the current CUDA device if there is one, else the CPU.

    Raises:
        UserError: it is no device, not a CPU or CUDA device, or not usable here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    allowed = 'None, "cpu", "cuda", "cuda:1", the number of a GPU or a torch.device of these'
    require(isinstance(device, (str, int, torch.device)) and not isinstance(device, bool), "device", device, allowed)
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise UserError(f"device = {device!r}: must be {allowed}") from None
    require(found.type in ("cpu", "cuda"), "device", str(device), allowed)
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device = {str(device)!r}: this torch sees no usable GPU; use device='cpu'")
    index, count = torch.cuda.current_device() if found.index is None else found.index, torch.cuda.device_count()
    if index >= count:
        shown = device if isinstance(device, int) else str(device)
        raise UserError(f"device = {shown!r}: there are {count} GPUs, numbered from 0")
    return torch.device("cuda", index)


def shard_from(rank: int | None, world_size: int | None) -> ShardOptions:
    """This process's part of every batch: as given, or from `torch.distributed` if it is initialised.

    Raises:
        UserError: only one of the two is given, or the rank is outside of the world.
    """
    if (rank is None) != (world_size is None):
        raise UserError(f"rank = {rank!r}, world_size = {world_size!r}: give both, or none of them")
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    num_local = int(local) if re.fullmatch("[1-9][0-9]{0,8}", local) else 0
    if rank is not None:
        own, world = integer_from("rank", rank, 0), integer_from("world_size", world_size, 1)
        require(own < world, "rank", own, f"less than world_size ({world})")
        return ShardOptions(own, world, min(num_local or 1, world))
    if not (dist.is_available() and dist.is_initialized()):
        return ShardOptions()
    own, world = dist.get_rank(), dist.get_world_size()
    # Without torchrun's variable, the processes of a machine are taken to be as many as its GPUs.
    return ShardOptions(own, world, min(num_local or torch.cuda.device_count() or world, world))


def classes_from(classes: Any) -> Any:
    """The argument `classes`, checked to name something: an empty list is not all classes."""
    if isinstance(classes, Iterable) and not isinstance(classes, str):
        classes = list(classes)
    if isinstance(classes, (str, list)) and len(classes) == 0:
        raise UserError("classes: names no class; name one, or pass None for all of them")
    return classes


def views_from(
    views: int | Sequence[Mapping[str, Any]], data: DataOptions, augment: AugmentOptions
) -> tuple[View, ...]:
    """The views of an argument; see `ImageLoader`.

    Args:
        views: their number, or a mapping for each of them.
        data: the loader's image size and crops, which are the default of each view.
        augment: the loader's augmentations, likewise.

    Raises:
        UserError: a key or a value is not valid.
    """
    allowed = "a number of views from 1 to 64, or for each view a mapping of image_size, crop and augment"
    if isinstance(count := _whole(views), int) and not isinstance(count, bool):
        require(1 <= count <= _MAX_VIEWS, "views", views, allowed)
        views = [{}] * count
    require(isinstance(views, Sequence) and not isinstance(views, str), "views", views, allowed)
    assert isinstance(views, Sequence)
    require(1 <= len(views) <= _MAX_VIEWS, "views", views, allowed)
    found = []
    for number, view in enumerate(views):
        require(isinstance(view, Mapping), f"views[{number}]", view, allowed)
        for key in view:
            if key not in ("image_size", "crop", "augment"):
                raise UserError(f"views[{number}]: {key!r}: {nearest(str(key), ('image_size', 'crop', 'augment'))}")
        of_view, of_recipe = augment_options(view["augment"]) if "augment" in view else (augment, {})
        values = {key: view[key] for key in ("image_size", "crop") if key in view}
        own = section_from(
            DataOptions, {"image_size": data.image_size, "crop": data.crop, **of_recipe, **values}, "data"
        )
        found.append(View(own.image_size, own.crop, of_view))
    return tuple(found)


def split_role(split: str, train: bool | None) -> Literal["train", "val"]:
    """Whether a split is read as for training or as for evaluation; None goes by its name."""
    trains = split == "train" if train is None else flag_from("train", train)
    return "train" if trains else "val"
