from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import mixup_target
from torchvision.transforms.v2 import functional as TF

from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.augment.reference.box_masks import box_mask, erase
from sdpnet.pipelines.augment.reference.mix import mix, mix_targets, soft_targets
from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, CropOptions, EraseOptions, MixOptions, Plan
from sdpnet.pipelines.planning.policies import RandAugmentOptions


def test_normalisation_equals_torchvisions() -> None:
    images = torch.randint(0, 256, (4, 17, 23, 3), dtype=torch.uint8)
    out, targets = DeviceStage(AugmentOptions(), 5, torch.float32, train=False)(batch_of(images))
    expected = TF.normalize(images.permute(0, 3, 1, 2).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(out, expected, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(targets, torch.eye(5)[torch.tensor([0, 1, 2, 3])])


def batch_of(images: torch.Tensor, options: AugmentOptions | None = None, seed: int = 0) -> Batch:
    options = options or AugmentOptions()
    n, size = len(images), images.shape[1]
    plan = Plan(
        seed=seed,
        sizes=np.full((n, 2), 50, np.int32),
        batch_size=n,
        image_size=size,
        crop=CropOptions(),
        randaugment=options.randaugment,
        erase=options.erase,
        mix=options.mix,
    ).batch(0, 0)
    labels = torch.arange(n)
    return Batch(images, labels, torch.from_numpy(plan.sample_ids), torch.ones(n, dtype=torch.bool), plan)


def test_erase_equals_torchvisions_sample_by_sample() -> None:
    images = torch.randn(5, 3, 20, 30)
    boxes = torch.tensor([[0, 0, 0, 0], [3, 4, 5, 6], [0, 0, 19, 29], [19, 29, 1, 1], [5, 5, 0, 9]])
    out = erase(images.clone(), boxes)
    for image, result, (top, left, height, width) in zip(images, out, boxes.tolist(), strict=True):
        assert torch.equal(result, TF.erase(image, top, left, height, width, torch.zeros(())))
    assert box_mask(boxes, 20, 30).sum().item() == sum(h * w for _, _, h, w in boxes.tolist())


def test_mix_equals_the_definitions_and_timms_targets() -> None:
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    kinds = torch.tensor([MIX_NONE, MIX_MIXUP, MIX_CUTMIX, MIX_CUTMIX, MIX_MIXUP, MIX_NONE], dtype=torch.uint8)
    partners = torch.tensor([1, 0, 3, 2, 5, 4])
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [2, 3, 8, 4], [0, 0, 16, 16], [0, 0, 0, 0], [0, 0, 0, 0]])
    lambdas = torch.tensor([1.0, 0.3, 1 - 32 / 256, 0.0, 0.9, 1.0])
    targets = soft_targets(labels, 5, 0.1)
    mixed = mix(images.clone(), images[partners], kinds, lambdas, boxes)
    mixed_targets = mix_targets(targets, partners, lambdas)
    assert torch.equal(mixed[0], images[0]) and torch.equal(mixed[5], images[5])
    assert torch.allclose(mixed[1], images[1] * 0.3 + images[0] * 0.7, atol=1e-6)
    assert torch.allclose(mixed[4], images[4] * 0.9 + images[5] * 0.1, atol=1e-6)
    expected = images[2].clone()
    expected[:, 2:10, 3:7] = images[3][:, 2:10, 3:7]
    assert torch.equal(mixed[2], expected) and torch.equal(mixed[3], images[2])
    for i in range(6):  # timm mixes a batch with its reverse: a batch of two, this sample first
        pair = labels[[i, int(partners[i])]]
        timm = mixup_target(pair, 5, lam=lambdas[i].item(), smoothing=0.1)
        assert torch.allclose(mixed_targets[i], timm[0], atol=1e-6)


def test_smoothing_equals_torchs_cross_entropy() -> None:
    logits, labels = torch.randn(8, 11), torch.randint(0, 11, (8,))
    ours = torch.nn.functional.cross_entropy(logits, soft_targets(labels, 11, 0.2))
    assert torch.allclose(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2))


@pytest.mark.parametrize("far", [False, True], ids=["neighbours", "far partners"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stage_puts_it_together(dtype: torch.dtype, far: bool) -> None:
    options = AugmentOptions(erase=EraseOptions(0.5), mix=MixOptions(0.8, 1.0), label_smoothing=0.1)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    batch = batch_of(images, options)
    if far:
        batch = replace(batch, plan=replace(batch.plan, mix_partners=np.arange(16)[::-1].copy()))
    before = images.clone()
    out, targets = DeviceStage(options, 16, dtype, train=True)(batch)
    assert torch.equal(batch.images, before)
    assert out.dtype == dtype and out.shape == (16, 3, 32, 32) and out.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.float32 and torch.allclose(targets.sum(1), torch.ones(16))
    plan = batch.plan
    plain, one_hot = DeviceStage(options, 16, torch.float32, train=False)(batch)
    smooth = one_hot * 0.9 + 0.1 / 16
    for i, (top, left, height, width) in enumerate(plan.erase_boxes.tolist()):
        plain[i, :, top : top + height, left : left + width] = 0
    for i in range(16):
        j, lam = int(plan.mix_partners[i]), float(plan.mix_lambdas[i])
        top, left, height, width = plan.mix_boxes[i].tolist()
        expected = plain[i] * lam + plain[j] * (1 - lam) if plan.mix_kinds[i] == MIX_MIXUP else plain[i].clone()
        if plan.mix_kinds[i] == MIX_CUTMIX:
            rows, columns = slice(top, top + height), slice(left, left + width)
            expected[:, rows, columns] = plain[j][:, rows, columns]
        assert torch.allclose(out[i].float(), expected.to(dtype).float(), atol=1e-5)
        assert torch.allclose(targets[i], smooth[i] * lam + smooth[j] * (1 - lam), atol=1e-6)


@pytest.mark.parametrize("policy", ["randaugment", "increasing", "three"])
def test_operations_come_first_and_in_training_only(policy: str) -> None:
    options = AugmentOptions(randaugment=RandAugmentOptions(policy, interpolation="bilinear", fill=(1.0, 2.0, 3.0)))  # type: ignore[arg-type]
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    batch, before = batch_of(images, options), images.clone()
    out, _ = DeviceStage(options, 16, torch.float32, train=True)(batch)
    done = apply_operations(
        images.permute(0, 3, 1, 2),
        batch.plan.ops,
        batch.plan.magnitudes,
        interpolation="bilinear",
        fill=(1.0, 2.0, 3.0),
    )
    normalised = TF.normalize(done.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(out, normalised, atol=1e-5) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before) and not torch.equal(done, images.permute(0, 3, 1, 2))
    plain, _ = DeviceStage(options, 16, torch.float32, train=False)(batch)
    assert torch.equal(plain, DeviceStage(AugmentOptions(), 16, torch.float32, train=False)(batch)[0])


@pytest.mark.parametrize("mode", ["colour", "pixel"])
def test_erasing_with_noise(mode: str) -> None:
    options = AugmentOptions(erase=EraseOptions(0.6, mode=mode))  # type: ignore[arg-type]
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    batch = batch_of(images, options)
    out, _ = DeviceStage(options, 16, torch.float32, train=True)(batch)
    plain, _ = DeviceStage(options, 16, torch.float32, train=False)(batch)
    erased = box_mask(torch.from_numpy(batch.plan.erase_boxes), 32, 32).expand_as(out)
    assert erased.any() and torch.equal(out[~erased], plain[~erased])
    drawn = []
    for image, (top, left, height, width) in zip(out, batch.plan.erase_boxes.tolist(), strict=True):
        box = image[:, top : top + height, left : left + width]
        if height:
            assert (box == box[:, :1, :1]).all() == (mode == "colour")
            drawn.append(box[:, 0, 0] if mode == "colour" else box.flatten())
    assert stats.kstest(torch.cat(drawn).numpy(), "norm").pvalue > 1e-6
    shifted = replace(
        batch, images=images[8:], labels=batch.labels[8:], valid=batch.valid[8:], plan=batch.plan.shard(1, 2)
    )
    assert torch.equal(DeviceStage(options, 16, torch.float32, train=True)(shifted)[0], out[8:])
