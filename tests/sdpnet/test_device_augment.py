"""`DeviceAugment`: the device stage for images that come from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_batches import pipeline
from torchvision.transforms.v2.functional import normalize

from sdpnet import DeviceAugment, ImageLoader
from sdpnet.loading import device_augment
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import AugmentOptions, ShardOptions

FULL = {
    "randaugment": {"policy": "randaugment"},
    "erase": {"probability": 0.5, "mode": "pixel"},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "label_smoothing": 0.1,
}


def images_of(count: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 images (B, S, S, 3), labels and ids."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 5, torch.arange(count) + 100


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision"])
def test_it_does_what_the_loader_does_after_its_decoder(name: str, shard_set: Path) -> None:
    """Of the same seed and ids, to the bit."""
    common: dict[str, Any] = {"image_size": 32, "batch_size": 4, "device": "cpu", "pipeline": name, "seed": 3}
    common["return_ids"] = True
    levels = ImageLoader(shard_set, dtype=torch.uint8, targets="index", **common)
    whole = ImageLoader(shard_set, augment=FULL, **common)
    augment = DeviceAugment(FULL, 3, seed=3)
    for epoch in range(2):
        for (raw, labels, ids), (images, targets, _) in zip(levels, whole, strict=True):
            for given in (raw, raw.contiguous(), raw.permute(0, 2, 3, 1)):
                got = augment(given, labels, ids, epoch)
                assert torch.equal(got[0], images) and torch.equal(got[1], targets)
    levels.close()
    whole.close()


def test_draws_follow_seed_epoch_and_sample() -> None:
    without_pairs = {key: value for key, value in FULL.items() if key != "mix"}
    augment = DeviceAugment(without_pairs, 5, seed=1)
    images, labels, ids = images_of(8)
    whole, targets = augment(images, labels, ids, epoch=2)
    order = torch.tensor([5, 0, 7, 2])
    part, some = augment(images[order], labels[order], ids[order], epoch=2)
    assert torch.equal(part, whole[order]) and torch.equal(some, targets[order])
    for other in (
        augment(images, labels, ids, epoch=3),
        DeviceAugment(without_pairs, 5, seed=2)(images, labels, ids, 2),
    ):
        assert not torch.equal(other[0], whole) and torch.equal(other[1], targets)


def test_without_ids_images_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, _ = images_of(4)
    one, other = DeviceAugment(FULL, 5), DeviceAugment(FULL, 5)
    first, second = one(images, labels)[0], one(images, labels)[0]
    assert torch.equal(first, other(images, labels, torch.arange(4))[0])
    assert torch.equal(second, other(images, labels, torch.arange(4, 8))[0]) and not torch.equal(first, second)
    monkeypatch.setattr(device_augment, "shard_from", lambda rank, world_size: ShardOptions(1, 2))
    assert not torch.equal(first, DeviceAugment(FULL, 5)(images, labels)[0]), "another process draws other ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_form_of_the_result(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images, labels, ids = images_of(3)
    for options in ({"train": False}, {"augment": "none", "targets": "index"}):
        made: dict[str, Any] = {"augment": FULL, "num_classes": 5, "dtype": dtype, "memory_format": memory_format}
        got, targets = DeviceAugment(**{**made, **options})(images, labels, ids)
        assert got.dtype == dtype and got.shape == (3, 3, 32, 32) and got.is_contiguous(memory_format=memory_format)
        one_hot = torch.nn.functional.one_hot(labels, 5).float()
        assert torch.equal(targets, labels if "targets" in options else one_hot)
        expected = normalize(images.permute(0, 3, 1, 2).float() / 255, AugmentOptions().mean, AugmentOptions().std)
        assert (got.float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)


def test_the_last_of_an_odd_number_is_not_mixed() -> None:
    images, labels, ids = images_of(5)
    _, targets = DeviceAugment({"mix": {"mixup_alpha": 1.0}}, 5)(images, labels, ids)
    assert targets[4].tolist() == [0, 0, 0, 0, 1] and (targets[:4].max(dim=1).values < 1).all()


@pytest.mark.parametrize("name", ["sdpnet_xl", "modern/sdpnet_xl"])
def test_recipes_by_name(name: str) -> None:
    images, labels, ids = images_of(4)
    got, targets = DeviceAugment(name, 5)(images, labels, ids)
    assert torch.isfinite(got).all() and torch.allclose(targets.sum(dim=1), torch.ones(4))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"augment": "nothing"}, "augment = 'nothing': no config"),
    ({"num_classes": 0}, "num_classes = 0: must be a whole number from 1 on"),
    ({"seed": "1"}, "seed = '1': must be a whole number"),
    ({"dtype": torch.uint8}, "dtype = torch.uint8: must be a floating-point dtype"),
    ({"targets": "index"}, "targets = 'index': MixUp and CutMix"),
    ({"train": "yes"}, "train = 'yes': must be True or False"),
    ({"images": torch.zeros(4, 3, 32, 32)}, "images = torch.float32 (4, 3, 32, 32): must be a uint8 tensor"),
    ({"images": torch.zeros(4, 32, 16, 3, dtype=torch.uint8)}, "images = (4, 32, 16, 3): must be a uint8 tensor"),
    ({"images": torch.zeros(0, 32, 32, 3, dtype=torch.uint8)}, "must be a uint8 tensor (B, S, S, 3)"),
    ({"images": [1]}, "images = list: must be a uint8 tensor"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels = torch.int64 (3,): must be an int64 tensor (4,)"),
    ({"labels": torch.zeros(4)}, "labels = torch.float32 (4,): must be an int64 tensor (4,)"),
    ({"labels": torch.tensor([0, 1, -1, 2])}, "labels: -1, but there are 5 classes"),
    ({"labels": torch.tensor([0, 1, 5, 2])}, "labels: 5, but there are 5 classes"),
    ({"sample_ids": torch.tensor([0, 1, -5, 2])}, "sample_ids: from -5 to 2: must be from 0 on"),
    ({"sample_ids": [0, 1, 2, 3]}, "sample_ids = list: must be an int64 tensor (4,)"),
    ({"epoch": -1}, "epoch = -1: must be a whole number from 0 on"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_use_is_one_line(changes: dict[str, Any], message: str) -> None:
    images, labels, ids = images_of(4)
    call: dict[str, Any] = {"images": images, "labels": labels, "sample_ids": ids, "epoch": 0}
    make: dict[str, Any] = {"augment": FULL, "num_classes": 5}
    for key, value in changes.items():
        (call if key in call else make)[key] = value
    with pytest.raises(UserError) as caught:
        DeviceAugment(**make)(**call)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    images, labels, ids = images_of(8)
    expected, targets = DeviceAugment(FULL, 5)(images, labels, ids)
    got, same_targets = DeviceAugment(FULL, 5)(images.cuda(), labels, ids)
    assert got.is_cuda and torch.allclose(same_targets.cpu(), targets)
    assert ((got.cpu() - expected).abs() < 1e-3).float().mean() > 0.999
