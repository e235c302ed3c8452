"""What a shard set holds, as numbers: from its manifest, its readers' tables and its quarantine; decodes no image."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.plan import CropOptions, Plan
from sdpnet.pipelines.shards.file import read_whole
from sdpnet.pipelines.shards.layout import ShardReader, open_split
from sdpnet.pipelines.shards.manifest import QUARANTINE_NAME, Manifest, Split, read_manifest
from sdpnet.pipelines.shards.origin import text_of
from sdpnet.pipelines.terminal.readable_names import readable_names

__all__ = ["Bad", "SplitSurvey", "Survey", "crop_share", "quarantine_limit", "read_quarantine", "survey"]

CROPS_DRAWN: Final = 1 << 14  # by which the kept share is known to about 0.2 %
FILES_LISTED: Final = 5  # of each reason
_MOST_BYTES: Final = (1 << 20, 64 << 10, 1 << 28)  # of quarantine.jsonl: for itself, for each image, and in all


@dataclass(frozen=True, eq=False)
class SplitSurvey:
    """One split.

    Attributes:
        split: what the manifest says of it.
        reader: its tables, and access to its images.
        class_counts: int64 (num_classes,), images of each class.
    """

    name: str
    split: Split
    reader: ShardReader
    class_counts: np.ndarray

    @property
    def longer(self) -> np.ndarray:
        """Longer sides in pixels, int32 (num_samples,)."""
        return self.reader.sizes.max(axis=1)

    @property
    def shorter(self) -> np.ndarray:
        """Shorter sides in pixels, int32 (num_samples,)."""
        return self.reader.sizes.min(axis=1)

    @property
    def aspect(self) -> np.ndarray:
        """Width / height, float64 (num_samples,)."""
        return self.reader.sizes[:, 1] / self.reader.sizes[:, 0]

    @property
    def nbytes(self) -> np.ndarray:
        """Bytes of each encoded image, int64 (num_samples,)."""
        return self.reader.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of its shard files."""
        return sum(file.bytes for file in self.split.files)

    @property
    def empty_classes(self) -> list[int]:
        """Labels without an image."""
        return np.flatnonzero(self.class_counts == 0).tolist()

    def by_count(self) -> list[int]:
        """Labels, the class with the most images first; equal ones in label order."""
        return np.argsort(-self.class_counts, kind="stable").tolist()


@dataclass
class Bad:
    """Images that were left out for one reason; numbers in it differ from file to file where it says N.

    `files` are the first `FILES_LISTED` ones, each "SPLIT/FILE".
    """

    reason: str
    count: int = 0
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Survey:
    """A whole shard set. `splits` has train first; `quarantine` the most frequent reason."""

    manifest: Manifest
    splits: tuple[SplitSurvey, ...]
    quarantine: tuple[Bad, ...]

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """What people call the classes, in label order."""
        return readable_names(self.manifest.classes)

    @property
    def num_samples(self) -> int:
        return sum(split.split.num_samples for split in self.splits)

    @property
    def file_bytes(self) -> int:
        return sum(split.file_bytes for split in self.splits)

    @property
    def train(self) -> SplitSurvey | None:
        return next((split for split in self.splits if split.name == "train"), None)


def survey(directory: str | Path) -> Survey:
    """Reads a shard set's manifest, tables and quarantine.

    Raises:
        ShardError: for what `open_split` and `read_quarantine` refuse.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    splits = []
    for name in sorted(manifest.splits, key=lambda name: (name != "train", name)):
        _, reader = open_split(directory, name)
        counts = np.bincount(reader.labels, minlength=manifest.num_classes)
        splits.append(SplitSurvey(name, manifest.splits[name], reader, counts))
    return Survey(manifest, tuple(splits), tuple(read_quarantine(directory, quarantine_limit(manifest))))


def quarantine_limit(manifest: Manifest) -> int:
    """The bytes that `quarantine.jsonl` may have, by the number of images that it lists."""
    own, each, most = _MOST_BYTES
    return min(own + each * sum(split.num_quarantined for split in manifest.splits.values()), most)


def read_quarantine(directory: Path, limit: int = _MOST_BYTES[2]) -> list[Bad]:
    """`quarantine.jsonl`, grouped by reason; reasons that differ in their numbers alone are one group.

    Raises:
        ShardError: for what is no file or has more than `limit` bytes, and for a line that is no JSON object with
            split, file and reason.
    """
    path = directory / QUARANTINE_NAME
    groups: dict[str, Bad] = {}
    if not os.path.lexists(path):
        return []
    content = read_whole(path, limit, f"the {limit:,} that a list of the images that were left out may have")
    with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                reason, file = text_of(entry["reason"]), f"{text_of(entry['split'])}/{text_of(entry['file'])}"
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ShardError(
                    f"{path}: line {number}: not a JSON object with split, file and reason; copy the file again"
                ) from None
            kind = re.sub(r"\d[\d,.]*", "N", reason)
            group = groups.setdefault(kind, Bad(reason))
            if group.reason != reason:
                group.reason = kind
            group.count += 1
            if len(group.files) < FILES_LISTED:
                group.files.append(file)
    return sorted(groups.values(), key=lambda group: -group.count)


def crop_share(split: SplitSurvey, crop: CropOptions, image_size: int, seed: int) -> float:
    """The share of the split's encoded bytes that lies in the boxes of a random resized crop.

    From the plan's own boxes of epoch 0, for at most `CROPS_DRAWN` samples, evenly spread; each box counts with its
    share of the image's area times the image's bytes.
    """
    count = split.split.num_samples
    ids = np.linspace(0, count - 1, min(count, CROPS_DRAWN)).astype(np.int64)
    plan = Plan(seed=seed, sizes=split.reader.sizes, batch_size=1, image_size=image_size, crop=crop)
    boxes = plan.crops(0, ids)[0].astype(np.int64)
    kept = boxes[:, 2] * boxes[:, 3] / split.reader.sizes[ids].astype(np.int64).prod(axis=1)
    return float(np.average(kept, weights=split.nbytes[ids]))
