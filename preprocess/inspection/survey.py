"""Statistics of a shard set, from its manifest, the tables of its files and its list of bad images.

No image is decoded.
"""

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

CROPS_DRAWN: Final = 1 << 14  # so many crops give the share of kept bytes to about 0.2 %
FILES_LISTED: Final = 5  # the number of files that are named for each reason
# quarantine.jsonl may have _BASE_BYTES, plus _BYTES_PER_IMAGE for each image that it lists, but at most _MAX_BYTES.
_BASE_BYTES: Final = 1 << 20
_BYTES_PER_IMAGE: Final = 64 << 10
_MAX_BYTES: Final = 1 << 28


@dataclass(frozen=True, eq=False)
class SplitSurvey:
    """The statistics of one split.

    Attributes:
        name: the name of the split.
        split: its entry in the manifest.
        reader: its tables, and access to its images.
        class_counts: int64 (num_classes,), the number of images of each class.
    """

    name: str
    split: Split
    reader: ShardReader
    class_counts: np.ndarray

    @property
    def longer(self) -> np.ndarray:
        """The longer sides in pixels, int32 (num_samples,)."""
        return self.reader.sizes.max(axis=1)

    @property
    def shorter(self) -> np.ndarray:
        """The shorter sides in pixels, int32 (num_samples,)."""
        return self.reader.sizes.min(axis=1)

    @property
    def aspect(self) -> np.ndarray:
        """Width / height, float64 (num_samples,)."""
        return self.reader.sizes[:, 1] / self.reader.sizes[:, 0]

    @property
    def nbytes(self) -> np.ndarray:
        """The sizes of the encoded images in bytes, int64 (num_samples,)."""
        return self.reader.nbytes

    @property
    def file_bytes(self) -> int:
        """The total size of its files in bytes, including the images that an index points to."""
        elsewhere = int(self.nbytes.sum()) if self.split.format == "index" else 0
        return sum(file.bytes for file in self.split.files) + elsewhere

    @property
    def empty_classes(self) -> list[int]:
        """The labels without images."""
        return np.flatnonzero(self.class_counts == 0).tolist()

    def by_count(self) -> list[int]:
        """All labels, sorted by the number of images, largest first; classes of equal size are in label order."""
        return np.argsort(-self.class_counts, kind="stable").tolist()


@dataclass
class Bad:
    """Images that were skipped for one reason.

    Attributes:
        reason: the reason. Numbers that differ between the files are replaced by N.
        count: the number of images.
        files: the first `FILES_LISTED` of them, each as "SPLIT/FILE".
    """

    reason: str
    count: int = 0
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Survey:
    """The statistics of a shard set.

    Attributes:
        manifest: its manifest.
        splits: its splits, train first.
        quarantine: the images that were skipped, the most frequent reason first.
    """

    manifest: Manifest
    splits: tuple[SplitSurvey, ...]
    quarantine: tuple[Bad, ...]

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Readable names of the classes, in label order."""
        return readable_names(self.manifest.classes)

    @property
    def num_samples(self) -> int:
        """The number of samples in all splits."""
        return sum(split.split.num_samples for split in self.splits)

    @property
    def file_bytes(self) -> int:
        """The total size of all shard files in bytes."""
        return sum(split.file_bytes for split in self.splits)

    @property
    def train(self) -> SplitSurvey | None:
        """The train split; None if there is none."""
        return next((split for split in self.splits if split.name == "train"), None)


def survey(directory: str | Path) -> Survey:
    """Reads the manifest, the tables and the list of bad images of a shard set.

    Raises:
        ShardError: as in `open_split` and `read_quarantine`.
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
    """The largest size of `quarantine.jsonl` in bytes, for the number of images that it lists."""
    num_images = sum(split.num_quarantined for split in manifest.splits.values())
    return min(_BASE_BYTES + _BYTES_PER_IMAGE * num_images, _MAX_BYTES)


def read_quarantine(directory: Path, limit: int = _MAX_BYTES) -> list[Bad]:
    """Reads `quarantine.jsonl` and groups its images by reason. Reasons that differ only in numbers are one group.

    Raises:
        ShardError: it is not a regular file, has more than `limit` bytes, or has a line that is not a JSON object with
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
    """Estimates the share of the encoded bytes of a split that lies in the boxes of random resized crops.

    The boxes are those of the plan in epoch 0, for at most `CROPS_DRAWN` evenly spaced samples. The bytes of an image
    are assumed to be spread evenly over its area.
    """
    count = split.split.num_samples
    ids = np.linspace(0, count - 1, min(count, CROPS_DRAWN)).astype(np.int64)
    plan = Plan(seed=seed, sizes=split.reader.sizes, batch_size=1, image_size=image_size, crop=crop)
    boxes = plan.crops(0, ids)[0].astype(np.int64)
    kept = boxes[:, 2] * boxes[:, 3] / split.reader.sizes[ids].astype(np.int64).prod(axis=1)
    return float(np.average(kept, weights=split.nbytes[ids]))
