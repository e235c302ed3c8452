from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.plan import CropOptions
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.inspection.survey import SplitSurvey, crop_share, read_quarantine, survey


def test_the_numbers_are_those_of_the_images(image_folder: Path, shard_set: Path) -> None:
    found = survey(shard_set)
    assert [split.name for split in found.splits] == ["train", "val"] and found.train is found.splits[0]
    assert found.num_samples == 34 and found.quarantine == ()
    assert found.file_bytes == sum(path.stat().st_size for path in shard_set.glob("*.beton"))
    for split in found.splits:
        _, reader = open_split(shard_set, split.name)
        files = [reader.encoded(i).tobytes() for i in range(reader.num_samples)]
        sizes = [Image.open(BytesIO(file)).size for file in files]
        assert split.nbytes.tolist() == [len(file) for file in files]
        assert split.longer.tolist() == [max(size) for size in sizes]
        assert split.shorter.tolist() == [min(size) for size in sizes]
        assert split.aspect.tolist() == [width / height for width, height in sizes]
        folders = sorted((image_folder / split.name).iterdir())
        assert split.class_counts.tolist() == [len(list(folder.iterdir())) for folder in folders]


def split_of(counts: list[int]) -> SplitSurvey:
    return SplitSurvey("train", SimpleNamespace(), SimpleNamespace(), np.array(counts))  # type: ignore[arg-type]


def test_classes_by_their_number_of_images() -> None:
    assert split_of([3, 0, 7, 3, 0]).by_count() == [2, 0, 3, 1, 4]
    assert split_of([3, 0, 7, 3, 0]).empty_classes == [1, 4]


def test_the_share_that_crops_keep_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(60, 500, (6000, 2)).astype(np.int32)
    # Long images lose more to a crop; here they are the heavy ones too, so that the weights count.
    nbytes = 2_000 * sizes.max(axis=1) // sizes.min(axis=1)
    reader: Any = SimpleNamespace(sizes=sizes, nbytes=nbytes)
    split = SplitSurvey("train", SimpleNamespace(num_samples=6000), reader, np.array([6000]))  # type: ignore[arg-type]
    crop = CropOptions()
    torch.manual_seed(0)
    kept = 0.0
    for (height, width), size in zip(sizes.tolist(), nbytes.tolist(), strict=True):
        image = torch.empty(1, height, width, device="meta")
        _, _, h, w = RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
        kept += size * h * w / (height * width)
    expected = kept / nbytes.sum()
    # One box an image has a standard deviation of about 0.25: 0.0035 for each mean of 6,000.
    assert crop_share(split, crop, 224, seed=5) == pytest.approx(expected, abs=0.02)
    assert crop_share(split, CropOptions(scale=(1, 1), ratio=(1e-9, 1e9)), 224, seed=0) == pytest.approx(1, abs=1e-4)


def write_quarantine(directory: Path, entries: list[tuple[str, str, str]]) -> None:
    lines = [json.dumps(dict(zip(("split", "file", "reason"), entry, strict=True))) + "\n" for entry in entries]
    (directory / "quarantine.jsonl").write_text("".join(lines))


def test_the_quarantine_is_grouped_by_reason(tmp_path: Path) -> None:
    assert read_quarantine(tmp_path) == []
    entries = [("train", f"a/{i}.jpg", f"truncated ({i} bytes left)") for i in range(7)]
    entries += [("val", "b/x.jpg", "empty (0 bytes)"), ("train", "a/y.jpg", "empty (0 bytes)"), ("val", "c/z", "bad")]
    write_quarantine(tmp_path, entries)
    groups = [(group.reason, group.count, group.files) for group in read_quarantine(tmp_path)]
    assert groups == [
        ("truncated (N bytes left)", 7, [f"train/a/{i}.jpg" for i in range(5)]),
        ("empty (0 bytes)", 2, ["val/b/x.jpg", "train/a/y.jpg"]),
        ("bad", 1, ["val/c/z"]),
    ]


@pytest.mark.parametrize("line", ["not json", '["a list"]', '{"split": "train", "file": "a"}', "3", ""])
def test_a_damaged_quarantine_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    write_quarantine(tmp_path, [("train", "a", "b")])
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ShardError, match=r"quarantine\.jsonl: line 2: not a JSON object") as caught:
        read_quarantine(tmp_path)
    assert "\n" not in str(caught.value)
