"""The state of an `ImageLoader`: a place in the order of samples, and what that order depends on.

    {"version": 1, "epoch": 3, "batch": 120, "order": {"fingerprint": ..., "seed": 0, ...}}

It holds only texts, numbers and truth values, so that it can be saved as JSON or by `torch.save(weights_only=True)`.
The number of processes and of workers is not part of it: only the global batch must stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sdpnet.pipelines.contract import Source
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["VERSION", "make_state", "order_of", "place_in"]

VERSION: Final = 1
_NAMES: Final = {"fingerprint": "the data set (its fingerprint)"}
_SHOWN: Final = 16  # characters of a fingerprint in a message


def order_of(source: Source, manifest: Manifest, split: str, *, train: bool, views: int = 0) -> dict[str, Any]:
    """What the order of samples depends on, as values for JSON.

    Args:
        split: the split's name in the shard set.
        train: whether the split is read as for training.
        views: the number of views of each sample; 0 if the loader yields no views.
    """
    plan = source.plan
    return {
        "fingerprint": manifest.splits[split].fingerprint,
        "num_samples": plan.num_samples,
        "train": train,
        "seed": plan.seed,
        "order": plan.order,
        "global_batch_size": plan.batch_size,
        **plan.sampling.description,
        **({"views": views} if views else {}),
    }


def make_state(epoch: int, batch: int, order: dict[str, Any]) -> dict[str, Any]:
    """The state before batch `batch` of epoch `epoch`."""
    return {"version": VERSION, "epoch": epoch, "batch": batch, "order": dict(order)}


def place_in(state: object, order: dict[str, Any], num_batches: int) -> tuple[int, int]:
    """The epoch and the batch of a state.

    Args:
        state: what `make_state` returned, perhaps after a way through JSON.
        order: what the order of samples depends on in the loader that continues.
        num_batches: the number of batches in an epoch of all processes together.

    Returns:
        The epoch and the number of its batches that are done. The end of an epoch is the beginning of the next.

    Raises:
        UserError: it is no state of an `ImageLoader`, or one of another order. The message names each value that
            differs, with both values.
    """
    what = "load_state_dict: not a state of an ImageLoader"
    if not isinstance(state, Mapping):
        raise UserError(f"{what}, but {type(state).__name__}; pass what state_dict() returned")
    keys = ("version", "epoch", "batch", "order")
    if missing := [key for key in keys if key not in state]:
        raise UserError(f"{what}: it has no {missing[0]!r}; pass what state_dict() returned")
    if state["version"] != VERSION:
        raise UserError(
            f"load_state_dict: the state has version {state['version']!r}, but this sdpnet reads version {VERSION}; "
            "use the sdpnet that saved it"
        )
    for key in ("epoch", "batch"):
        if type(state[key]) is not int or not 0 <= state[key] < 1 << 63:
            raise UserError(f"{what}: {key} = {state[key]!r} is not a whole number from 0 on")
    theirs = state["order"]
    if not isinstance(theirs, Mapping):
        raise UserError(f"{what}: its 'order' is {type(theirs).__name__}; pass what state_dict() returned")
    differences = [
        f"{_NAMES.get(key, key)} is {_shown(theirs, key)} in the state and {_shown(order, key)} here"
        for key in sorted({*order, *map(str, theirs)})
        if key not in theirs or key not in order or theirs[key] != order[key]
    ]
    if differences:
        raise UserError(
            f"load_state_dict: the state is of another order of samples: {'; '.join(differences)}; "
            "open the loader with the values of the state, or begin without it"
        )
    epoch, batch = state["epoch"], state["batch"]
    if batch > num_batches:
        raise UserError(f"{what}: batch = {batch}, but an epoch has {num_batches:,} batches")
    return (epoch, batch) if batch < num_batches else (epoch + 1, 0)


def _shown(order: Mapping[str, Any], key: str) -> str:
    if key not in order:
        return "the default"
    text = repr(order[key])
    return f"{text[:_SHOWN]}..." if len(text) > 60 else text
