from __future__ import annotations

import builtins
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion import convert_folder
from PIL import Image
from pipeline_batches import loader_for

from sdpnet.config.load import load_config
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.inspection.contact_sheet import ContactSheet, contact_sheet
from sdpnet.preprocess.inspection.recipe import CROP, ERASE, IMAGE_SIZE, MIX, RANDAUGMENT
from sdpnet.preprocess.inspection.survey import survey


@pytest.fixture
def shards(shard_set: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "shards"
    shutil.copytree(shard_set, copy)
    return copy


def sheet_of(directory: Path, num_images: int, seed: int = 0, split: int = 0) -> ContactSheet:
    found = survey(directory)
    return contact_sheet(directory, found.splits[split], found.manifest.classes, num_images, seed)


def pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(BytesIO(jpeg), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def replace_image(directory: Path, split: str, sample: int, content: bytes) -> None:
    """Puts other bytes where the beginning of a sample's image is."""
    _, reader = open_split(directory, split)
    path = directory / f"{split}.beton"
    where = path.read_bytes().index(reader.encoded(sample).tobytes())
    with path.open("r+b") as file:
        file.seek(where)
        file.write(content)


def test_the_recipe_is_that_of_the_shipped_config() -> None:
    config = load_config("sdpnet_xl")
    assert config.augment == AugmentOptions(randaugment=RANDAUGMENT, erase=ERASE, mix=MIX)
    assert (config.data.crop, config.data.image_size, config.data.order) == (CROP, IMAGE_SIZE, "random")


def test_the_augmented_half_is_what_the_model_gets(shard_set: Path) -> None:
    """A training run of the shipped config with this seed and batch size, up to the JPEG of the page."""
    settings = [f"data.path={shard_set}", "data.pipeline=torchvision", "data.num_workers=1"]
    config = load_config("sdpnet_xl", [*settings, "data.batch_size_per_gpu=8", "seed=3"])
    loader = loader_for(config, "train")
    batch = next(iter(loader.batches()))
    images, _ = DeviceStage(config.augment, 3, torch.float32, train=True)(batch)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    expected = ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()

    sheet = sheet_of(shard_set, 8, seed=3)
    assert [tile.sample_id for tile in sheet.tiles] == batch.sample_ids.tolist()
    for tile, image in zip(sheet.tiles, expected, strict=True):
        assert tile.augmented is not None
        assert np.abs(pixels(tile.augmented) - image).mean() < 4
        for other in expected[expected.mean((1, 2, 3)) != image.mean()]:
            assert np.abs(pixels(tile.augmented) - other).mean() > 4
    for i, tile in enumerate(sheet.tiles):
        height, width = batch.plan.crop_boxes[i, 2:]
        assert tile.change.startswith(f"crop {width} × {height}, ")
        assert ("flipped" in tile.change) == batch.plan.flips[i]
        assert ("erased" in tile.change) == (batch.plan.erase_boxes[i].prod() > 0)
        partner = batch.sample_ids[batch.plan.mix_partners[i]]
        kind = {MIX_MIXUP: "MixUp", MIX_CUTMIX: "CutMix"}[batch.plan.mix_kinds[i]]
        assert tile.change.endswith(f"{kind}: {100 * batch.plan.mix_lambdas[i]:.0f}% its own, rest {partner}")
    other_seed = sheet_of(shard_set, 8, seed=4)
    assert {tile.augmented for tile in sheet.tiles}.isdisjoint(tile.augmented for tile in other_seed.tiles)


def test_the_original_half_is_the_stored_image(shard_set: Path) -> None:
    manifest, reader = open_split(shard_set, "train")
    for tile in sheet_of(shard_set, 24).tiles:
        stored = Image.open(BytesIO(reader.encoded(tile.sample_id).tobytes())).convert("RGB")
        assert (tile.width, tile.height) == stored.size
        assert tile.class_name == manifest.classes[reader.labels[tile.sample_id]]
        shown = pixels(tile.original)
        assert max(shown.shape) <= 224
        small = np.asarray(stored.resize((shown.shape[1], shown.shape[0])), np.float64)
        assert np.abs(shown - small).mean() < 6


@pytest.mark.parametrize(("asked", "shown"), [(1, 1), (2, 2), (7, 6), (24, 24), (500, 24)])
def test_the_number_of_images_is_even_and_at_most_the_splits(shard_set: Path, asked: int, shown: int) -> None:
    sheet = sheet_of(shard_set, asked)
    assert len({tile.sample_id for tile in sheet.tiles}) == len(sheet.tiles) == shown
    assert all(tile.augmented is not None for tile in sheet.tiles)
    mixed = [tile for tile in sheet.tiles if "MixUp" in tile.change or "CutMix" in tile.change]
    assert len(mixed) == (0 if shown == 1 else shown)


def test_a_set_of_one_image(tmp_path: Path) -> None:
    (tmp_path / "images" / "only").mkdir(parents=True)
    Image.new("RGB", (3, 400), (200, 30, 30)).save(tmp_path / "images" / "only" / "1.png")
    convert_folder(tmp_path / "images", tmp_path / "shards")
    (tile,) = sheet_of(tmp_path / "shards", 24).tiles
    assert (tile.sample_id, tile.class_name, tile.height, tile.width) == (0, "only", 400, 3)
    assert tile.augmented is not None and pixels(tile.augmented).shape == (224, 224, 3)


def test_a_raw_image_is_shown_as_it_is(shards: Path) -> None:
    """The stored bytes of one sample become pixels; its size is chosen so that they fit."""
    _, reader = open_split(shards, "train")
    num_pixels = int(reader.nbytes[5]) // 3
    path = shards / "train.beton"
    content = bytearray(path.read_bytes())
    metadata, table = 24 + 2 * 1041 + 5 * 24, len(content) - 24 * 24 + 5 * 24
    width = next(width for width in range(40, num_pixels) if num_pixels // width < 65_536)
    height = num_pixels // width
    content[metadata : metadata + 5] = bytes([1]) + width.to_bytes(2, "little") + height.to_bytes(2, "little")
    content[table + 16 : table + 24] = (3 * width * height).to_bytes(8, "little")
    start = int.from_bytes(content[metadata + 5 : metadata + 13], "little")
    rows = np.broadcast_to(np.linspace(0, 255, height).astype(np.uint8)[:, None, None], (height, width, 3))
    content[start : start + rows.size] = rows.tobytes()
    path.write_bytes(content)
    tile = next(tile for tile in sheet_of(shards, 24).tiles if tile.sample_id == 5)
    assert (tile.height, tile.width) == (height, width)
    shown = pixels(tile.original)
    assert np.abs(shown.mean((1, 2)) - np.linspace(0, 255, len(shown))).max() < 4


def test_a_damaged_image_is_named(shards: Path) -> None:
    replace_image(shards, "train", 9, bytes(200))
    with pytest.raises(ShardError, match=r"split 'train': sample 9: damaged JPEG"):
        sheet_of(shards, 24)
    other = Image.new("RGB", (8, 8))
    file = BytesIO()
    other.save(file, "JPEG")
    replace_image(shards, "val", 4, file.getvalue())
    with pytest.raises(ShardError, match=r"split 'val': sample 4: .*8 x 8 pixels, but the shard says"):
        sheet_of(shards, 10, split=1)


@pytest.mark.parametrize(
    ("missing", "says"), [("torch", "PyTorch cannot be used here"), ("torchvision", "torchvision")]
)
def test_without_the_libraries_the_originals_remain(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch, missing: str, says: str
) -> None:
    ids = [tile.sample_id for tile in sheet_of(shard_set, 6).tiles]
    original_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}")
        return original_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "sdpnet.pipelines.executors.torchvision", raising=False)
    sheet = sheet_of(shard_set, 6)
    assert [tile.sample_id for tile in sheet.tiles] == ids
    assert all(tile.augmented is None and tile.change == "" for tile in sheet.tiles)
    assert says in sheet.note and "\n" not in sheet.note
