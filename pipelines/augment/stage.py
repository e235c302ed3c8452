"""The device stage: RandAugment, normalise, erase, MixUp and CutMix, soft targets.

In plain batched PyTorch, the reference, or fused into one kernel where there is a GPU for it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from pipelines.augment import fused
from pipelines.augment.boxes import erase, erase_with
from pipelines.augment.mix import mix, mix_targets, soft_targets
from pipelines.augment.noise import normal_noise
from pipelines.augment.operations import apply_operations
from pipelines.contract import AugmentOptions, Batch
from pipelines.errors import UserError

__all__ = ["DeviceStage"]

_MAX_OFF = 1e-3  # share of values; two operations in turn can carry a difference in rounding over a threshold


class DeviceStage:
    """uint8 NHWC batches -> (images in channels_last, soft targets), all draws from the batch's plan.

    Args:
        options: section `augment` of the config.
        num_classes: width of the targets.
        dtype: of the images that come out; the arithmetic is float32.
        train: False only normalises and gives one-hot targets: evaluation.

    On a GPU that can run it, the pixels come from the kernel of `pipelines.augment.fused` (`options.fused`).
    """

    def __init__(self, options: AugmentOptions, num_classes: int, dtype: torch.dtype, *, train: bool) -> None:
        self.options = options
        self.num_classes = num_classes
        self.dtype = dtype
        self.train = train
        self._scale: torch.Tensor | None = None
        self._fused: bool | None = None  # decided on the first batch

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images (B, 3, H, W), channels_last, and targets float32 (B, num_classes), in training zero for the
        samples that are not valid.

        Raises:
            UserError: with `fused: verify`, the kernel's first batch is not the reference's.
        """
        if self._fused is None:
            self._fused = self._choose(batch)
        targets = soft_targets(batch.labels, self.num_classes, self.options.label_smoothing if self.train else 0.0)
        if self.train and self.options.mix.enabled:
            partners, lambdas = (
                torch.from_numpy(draws).to(batch.images.device, non_blocking=True)
                for draws in (batch.plan.mix_partners, batch.plan.mix_lambdas)
            )
            targets = mix_targets(targets, partners, lambdas)
        if self.train:
            targets = targets * batch.valid.view(-1, 1)  # zero targets: no loss, no gradient
        if self._fused:
            return self._fuse(batch, self.dtype), targets
        return self._refer(batch).to(self.dtype, memory_format=torch.channels_last), targets

    def _choose(self, batch: Batch) -> bool:
        """Whether the kernel is used: where it can be, and runs on this batch (with `verify`, rightly)."""
        if self.options.fused == "off" or not fused.runs_on(batch.images.device):
            return False
        try:
            out = self._fuse(batch, torch.float32 if self.options.fused == "verify" else self.dtype)
        except Exception as error:  # Triton compiles here and may lack a C compiler or refuse the card
            if self.options.fused == "verify":
                raise
            cause = " ".join(str(error).split())[:200]
            warnings.warn(f"augment.fused: slower without the kernel, which cannot run here: {cause}", stacklevel=3)
            return False
        if self.options.fused == "verify":
            levels = (out - self._refer(batch)).abs() / self._factors(batch.images.device)[:3].view(1, 3, 1, 1)
            off = (levels > 1).float().mean().item()
            if off > _MAX_OFF:
                raise UserError(
                    f"augment.fused: {off:.2%} of the first batch's values are more than a level off the reference's "
                    f"(at most {levels.max().item():.1f} levels); set augment.fused to off"
                )
        return True

    def _fuse(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        scale = self._factors(batch.images.device)
        return fused.finish(batch.images, scale, dtype, self.options, batch.plan if self.train else None)

    def _refer(self, batch: Batch) -> torch.Tensor:
        """float32 (B, 3, H, W)."""
        device, plan, options = batch.images.device, batch.plan, self.options

        def send(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        images = batch.images.permute(0, 3, 1, 2)
        if self.train and options.randaugment.enabled:
            images = apply_operations(
                images,
                plan.ops,
                plan.magnitudes,
                interpolation=options.randaugment.interpolation,
                fill=options.randaugment.fill,
            )
        images = self._normalize(images)
        if self.train and options.erase.probability > 0:
            rows = np.flatnonzero(plan.erase_boxes[:, 2])
            if options.erase.mode == "constant":
                images = erase(images, send(plan.erase_boxes))
            elif len(rows):
                shape = tuple(images.shape[1:]) if options.erase.mode == "pixel" else (3, 1, 1)
                noise = normal_noise(send(plan.erase_keys[rows]), shape)
                images = erase_with(images, send(rows), send(plan.erase_boxes[rows]), noise)
        if self.train and options.mix.enabled:
            images = mix(
                images,
                send(plan.mix_kinds),
                send(plan.mix_partners),
                send(plan.mix_lambdas),
                send(plan.mix_boxes),
            )
        return images

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32 (B, 3, H, W) in the same memory format: (x / 255 - mean) / std."""
        factor, offset = self._factors(images.device).view(2, 1, 3, 1, 1)
        return images.float() * factor + offset

    def _factors(self, device: torch.device) -> torch.Tensor:
        """float32 (6,): 1 / (255 std), then -mean / std."""
        if self._scale is None or self._scale.device != device:
            mean = torch.tensor(self.options.mean, device=device)
            std = torch.tensor(self.options.std, device=device)
            self._scale = torch.cat([1 / (255 * std), -mean / std])
        return self._scale
