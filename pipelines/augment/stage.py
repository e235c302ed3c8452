"""The device stage, in plain batched PyTorch: RandAugment, normalise, erase, MixUp and CutMix, soft targets."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.augment.boxes import erase, erase_with
from pipelines.augment.mix import mix, soft_targets
from pipelines.augment.noise import normal_noise
from pipelines.augment.operations import apply_operations
from pipelines.contract import AugmentOptions, Batch

__all__ = ["DeviceStage"]


class DeviceStage:
    """uint8 NHWC batches -> (images in channels_last, soft targets), all draws from the batch's plan.

    Args:
        options: section `augment` of the config.
        num_classes: width of the targets.
        dtype: of the images that come out; the arithmetic is float32.
        train: False only normalises and gives one-hot targets: evaluation.
    """

    def __init__(self, options: AugmentOptions, num_classes: int, dtype: torch.dtype, *, train: bool) -> None:
        self.options = options
        self.num_classes = num_classes
        self.dtype = dtype
        self.train = train
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images (B, 3, H, W), channels_last, and targets float32 (B, num_classes), in training zero for the
        samples that are not valid."""
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
        targets = soft_targets(batch.labels, self.num_classes, options.label_smoothing if self.train else 0.0)
        if self.train and options.erase.probability > 0:
            rows = np.flatnonzero(plan.erase_boxes[:, 2])
            if options.erase.mode == "constant":
                images = erase(images, send(plan.erase_boxes))
            elif len(rows):
                shape = tuple(images.shape[1:]) if options.erase.mode == "pixel" else (3, 1, 1)
                noise = normal_noise(send(plan.erase_keys[rows]), shape)
                images = erase_with(images, send(rows), send(plan.erase_boxes[rows]), noise)
        if self.train and options.mix.enabled:
            images, targets = mix(
                images,
                targets,
                send(plan.mix_kinds),
                send(plan.mix_partners),
                send(plan.mix_lambdas),
                send(plan.mix_boxes),
            )
        if self.train:
            targets = targets * batch.valid.view(-1, 1)  # zero targets: no loss, no gradient
        return images.to(self.dtype, memory_format=torch.channels_last), targets

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32 (B, 3, H, W) in the same memory format: (x / 255 - mean) / std."""
        if self._scale is None or self._scale[0].device != images.device:
            mean = torch.tensor(self.options.mean, device=images.device).view(1, 3, 1, 1)
            std = torch.tensor(self.options.std, device=images.device).view(1, 3, 1, 1)
            self._scale = (1 / (255 * std), -mean / std)
        factor, offset = self._scale
        return images.float() * factor + offset
