"""Chooses the samples of an epoch: classes, subsets, weights, repetitions, and labels of one's own.

    SamplingOptions (of a config) --request--> SamplingRequest --resolve: read, check, choose--> Sampling --> Plan

Nothing here is random in time: a subset follows from its own seed, and the plan draws from the weights by counters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.errors import UserError, nearest, require
from sdpnet.pipelines.files.array_file import read_array, read_lines
from sdpnet.pipelines.planning.draws import derive_seed, sample_keys
from sdpnet.pipelines.planning.options import MAX_REPEATS, SamplingOptions

__all__ = ["Sampling", "SamplingOptions", "SamplingRequest"]

_MAX_CLASSES: Final = 1_000_000
_CLASS_BITS: Final = 20
BALANCED: Final = "balanced"
_ALLOWED: Final = {
    "labels": "the path of an .npy file, or a whole number or a row of numbers for each sample",
    "subset": "a share in (0, 1], numbers of samples, or the path of an .npy or .txt file with them",
    "weights": "'balanced', one number for each sample, or the path of an .npy file with them",
}


@dataclass(frozen=True, eq=False)
class SamplingRequest:
    """What is asked of a split, as arrays or as the paths of .npy files.

    Attributes:
        classes, exclude: names of classes; see `SamplingOptions`.
        subset: a share in (0, 1], or int (K,), the numbers of the samples that are used.
        subset_seed: the seed of the share.
        weights: None, "balanced", or (N,), one weight for each sample of the split, at least 0.
        repeats: how many times each sample is used in a row.
        labels: None, or int (N,), or float, bool or int (N, K).
    """

    classes: Any = ()
    exclude: Any = ()
    subset: Any = 1.0
    subset_seed: int = 0
    weights: Any = None
    repeats: int = 1
    labels: Any = None

    def resolve(self, class_names: Sequence[str], labels: np.ndarray, split: str | os.PathLike[str]) -> Sampling:
        """Applies the request to a split.

        Args:
            class_names: the names of the classes, in label order.
            labels: int64 (N,), the labels of the split's samples.
            split: the split's name in errors.

        Raises:
            UserError: a class does not exist, an array has another length or impossible values, or no sample is left.
        """
        require(
            isinstance(self.repeats, int) and 1 <= self.repeats <= MAX_REPEATS,
            "repeats",
            self.repeats,
            f"a whole number from 1 to {MAX_REPEATS:,}",
        )
        where = os.fspath(split)
        described: dict[str, str | int] = {}
        own = None if self.labels is None else _checked_labels(_array(self.labels, "labels"), len(labels), where)
        if own is not None:
            described["labels"] = _hash(own)
        keep = np.ones(len(labels), bool)
        for key, names in (("classes", self.classes), ("exclude", self.exclude)):
            if wanted := _names(names, class_names, key):
                inside = np.isin(labels, _numbers(wanted, class_names, key))
                keep &= inside if key == "classes" else ~inside
                described[key] = ", ".join(sorted(wanted)) if len(wanted) <= 8 else _hash_names(wanted)
        if isinstance(self.subset, (int, float)) and not isinstance(self.subset, bool):
            require(0 < self.subset <= 1, "subset", self.subset, "a share in (0, 1], or numbers of samples")
            if self.subset < 1:
                keep = _share(keep, labels, float(self.subset), self.subset_seed)
                described["subset"] = f"{self.subset:g} (seed {self.subset_seed})"
        else:
            numbers = _checked_ids(_ids(self.subset), len(labels), where)
            chosen = np.zeros(len(labels), bool)
            chosen[numbers] = True
            keep &= chosen
            described["subset"] = _hash(np.unique(numbers))
        if not keep.any():
            raise UserError(f"{where}: no sample is left: {_shown(described) or 'the split is empty'}")
        ids = None if keep.all() else np.flatnonzero(keep)
        cumulative = None
        if self.weights is not None:
            if own is not None and own.ndim == 2 and isinstance(self.weights, str) and self.weights == BALANCED:
                raise UserError("weights = 'balanced': needs one class a sample, but labels has rows; pass weights")
            weights, described["weights"] = _weights(self.weights, labels if own is None else own, keep, where)
            cumulative = np.cumsum(weights if ids is None else weights[ids])
        if self.repeats > 1:
            described["repeats"] = self.repeats
        return Sampling(ids, cumulative, self.repeats, own, described)


@dataclass(frozen=True, eq=False)
class Sampling:
    """Which samples of a split an epoch has.

    Attributes:
        ids: int64 (M,), ascending, the samples that are used; None if all are.
        cumulative: float64 (M,), the sums of the weights of these samples and all before them; None if each sample is
            used once.
        repeats: how many times each sample is used in a row.
        labels: int64 (N,) or float32 (N, K), the labels of all samples; None if the split's own are used.
        description: what was asked for, by its name, for messages and for states; empty if nothing was.
    """

    ids: np.ndarray | None = None
    cumulative: np.ndarray | None = None
    repeats: int = 1
    labels: np.ndarray | None = None
    description: dict[str, str | int] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """What was asked for, in one line."""
        return _shown(self.description) or "every sample once"

    def num_samples(self, split_size: int) -> int:
        """The number of samples that are used, of a split of `split_size`. An epoch has as many."""
        return split_size if self.ids is None else len(self.ids)

    def draw(self, u: np.ndarray) -> np.ndarray:
        """Draws positions among the used samples in proportion to their weights.

        Args:
            u: float64 (k,), uniform in [0, 1).

        Returns:
            int64 (k,).
        """
        assert self.cumulative is not None
        found = np.searchsorted(self.cumulative, u * self.cumulative[-1], side="right")
        last = np.searchsorted(self.cumulative, self.cumulative[-1], side="left")  # the last one with a weight
        return np.minimum(found, last).astype(np.int64)


def _names(names: Any, class_names: Sequence[str], key: str) -> tuple[str, ...]:
    """The names of classes. A .txt file that is no class stands for its lines."""
    if isinstance(names, (str, os.PathLike)):
        names = (names,)
    if not isinstance(names, Iterable):
        raise UserError(f"{key} = {names!r:.80}: must be names of classes")
    found: list[str] = []
    for name in names:
        if isinstance(name, (int, np.integer)) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, (str, os.PathLike)) or not isinstance(os.fspath(name), str):
            raise UserError(f"{key} = {name!r:.80}: must be names of classes")
        name = os.fspath(name)
        is_file = name.endswith(".txt") and name not in class_names
        found += read_lines(name, key) if is_file else [name]
    return tuple(found)


def _numbers(names: Sequence[str], class_names: Sequence[str], key: str) -> np.ndarray:
    known = {name: number for number, name in enumerate(class_names)}
    for name in names:
        if name not in known:
            listed = nearest(name, class_names if len(class_names) <= 20 else [*class_names[:20], "..."])
            close = nearest(name, class_names) if len(class_names) > 20 else listed
            raise UserError(f"{key}: no class {name!r}: {close if close.startswith('did') else listed}")
    return np.array([known[name] for name in names], np.int64)


def _share(keep: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Keeps a share of each class's kept samples, at least one of each class.

    A sample's place among its class follows from the seed and its number alone, so that a smaller share is a part of a
    larger one.
    """
    ids = np.flatnonzero(keep)
    classes = labels[ids]
    counts = np.bincount(classes)
    wanted = np.maximum(1, np.floor(counts * share + 0.5)).astype(np.int64)
    # The class in the upper bits and the key in the lower ones, so that one sort puts the samples of each class in the
    # order of their keys. Sorting values is several times as fast as sorting positions.
    keys = sample_keys(derive_seed(seed), ids).view(np.uint64) >> np.uint64(_CLASS_BITS)
    keys |= classes.astype(np.uint64) << np.uint64(64 - _CLASS_BITS)
    places = np.minimum(np.cumsum(counts) - counts + wanted - 1, len(ids) - 1)  # those of absent classes are not used
    last = np.sort(keys)[places]
    chosen = np.zeros(len(keep), bool)
    chosen[ids[keys <= last[classes]]] = True
    return chosen


def _weights(given: Any, labels: np.ndarray, keep: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    """The weight of each sample of a split, float64 (N,), and a description."""
    if isinstance(given, str) and given == BALANCED:
        counts = np.bincount(labels[keep])
        return 1.0 / np.maximum(counts, 1)[np.where(keep, labels, 0)], BALANCED
    weights = _array(given, "weights")
    if weights.ndim != 1 or weights.dtype.kind not in "iufb":
        raise UserError(f"weights: {weights.dtype} {weights.shape}, must be one number for each sample")
    if len(weights) != len(labels):
        raise UserError(
            f"weights: {len(weights):,} numbers, but {where} has {len(labels):,} samples; give one for each"
        )
    weights = weights.astype(np.float64)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise UserError(f"weights: sample {first} has {weights[first]}: must be finite and at least 0")
    with np.errstate(over="ignore"):
        total = weights.sum(where=keep)
    if not 0 < total < np.inf:
        raise UserError(f"weights: their sum over the samples that are used is {total}: must be above 0 and finite")
    return weights, _hash(weights)


def _checked_labels(labels: np.ndarray, num_samples: int, where: str) -> np.ndarray:
    """Labels as int64 (N,) or float32 (N, K)."""
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "iufb" or (labels.ndim == 2 and labels.shape[1] == 0):
        raise UserError(f"labels: {labels.dtype} {labels.shape}, must be a whole number or a row of numbers a sample")
    if len(labels) != num_samples:
        raise UserError(f"labels: {len(labels):,} rows, but {where} has {num_samples:,} samples; give one for each")
    if labels.ndim == 1 and (labels.dtype.kind == "b" or (labels.dtype.kind == "f" and _all_whole(labels))):
        raise UserError(
            f"labels: {labels.dtype} {labels.shape}: for classes pass whole numbers (.astype(int)), for a regression a "
            "row for each sample ([:, None])"
        )
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        wrong = (labels < 0) | (labels >= _MAX_CLASSES)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise UserError(f"labels: sample {first} has {labels[first]}: must be 0 to {_MAX_CLASSES - 1:,}")
        return np.ascontiguousarray(labels, np.int64)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(labels.reshape(len(labels), -1), np.float32)
    fine = np.isfinite(rows).all(axis=1)
    if not fine.all():
        first = int(np.flatnonzero(~fine)[0])
        raise UserError(f"labels: sample {first} has {rows[first][:8].tolist()}: must be finite in float32")
    return rows


def _all_whole(values: np.ndarray) -> bool:
    return bool((np.isfinite(values) & (values == np.floor(values))).all())


def _checked_ids(ids: np.ndarray, num_samples: int, where: str) -> np.ndarray:
    wrong = (ids < 0) | (ids >= num_samples)
    if wrong.any():
        raise UserError(f"subset: sample {ids[wrong][0]}, but {where} has samples 0 to {num_samples - 1:,}")
    return ids


def _ids(given: Any) -> np.ndarray:
    """Numbers of samples, int64 (K,), from an array or a file."""
    if isinstance(given, (str, os.PathLike)) and os.fspath(given).endswith(".txt"):
        lines = read_lines(given, "subset")
        try:
            ids = np.array([int(line) for line in lines], np.int64)
        except (ValueError, OverflowError):
            raise UserError(f"subset: {os.fspath(given)}: must have one number of a sample in each line") from None
    else:
        ids = _array(given, "subset")
    if ids.dtype == bool and ids.ndim == 1:
        raise UserError("subset: is an array of true and false; pass np.flatnonzero(...) of it")
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise UserError(f"subset: {ids.dtype} {ids.shape}, must be a share in (0, 1] or numbers of samples")
    return ids.astype(np.int64)


def _array(given: Any, key: str) -> np.ndarray:
    """An array, from a path of an .npy file, a tensor or anything else that numpy takes."""
    if isinstance(given, (str, os.PathLike)):
        if not os.fspath(given).endswith(".npy"):
            raise UserError(f"{key} = {os.fspath(given)!r:.80}: must be {_ALLOWED[key]}")
        return read_array(given, key)
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise UserError(f"{key}: an array with masked values; pass one with a number for each of them")
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{key}: {' '.join(str(error).split())[:200]}; pass an array of numbers") from None
    if array.dtype.kind not in "iufb":
        raise UserError(f"{key}: an array of {array.dtype}, must be of numbers")
    return array


def _hash(array: np.ndarray) -> str:
    """A short text that differs for arrays that differ."""
    digest = hashlib.blake2b(f"{array.dtype.str} {array.shape} ".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).data)  # twice as fast as SHA-256: 0.35 s for 14 million weights
    return f"hash {digest.hexdigest()}"


def _hash_names(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(errors="surrogateescape"), digest_size=8)
    return f"{len(names):,} classes, hash {digest.hexdigest()}"


def _shown(described: dict[str, str | int]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in described.items())
