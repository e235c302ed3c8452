"""The device stage: RandAugment, normalisation, erasing, MixUp and CutMix, soft targets.

It runs in plain batched PyTorch (the reference) or, on GPUs that support it, in fused Triton kernels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from sdpnet.pipelines.augment.fused import launch as fused
from sdpnet.pipelines.augment.reference.box_masks import erase, erase_with
from sdpnet.pipelines.augment.reference.mix import mix, mix_targets, soft_targets
from sdpnet.pipelines.augment.reference.noise import normal_noise
from sdpnet.pipelines.augment.reference.operations import apply_operations, pieces
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.memory.buffers import Buffers
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import BatchPlan

__all__ = ["DeviceStage"]

# On a CPU, whole batches were bound by new memory, not by arithmetic: of 490 ms a batch of 128 images, about 400 went
# into pages of 77 MB arrays that malloc gives back each time (records/LOG.md). Pieces of 8 images reuse the same
# memory.
_PIECE = 8  # images that a CPU finishes at once
_KEPT = 4  # free buffers for results on a CPU; a loop holds one batch while it asks for the next, or one of each view
_MAX_DIFFERENCE = 0.01  # levels; operations agree to the bit, noise differed by up to 3e-5 (H200)


def _send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class DeviceStage:
    """Turns uint8 NHWC batches into images for the model and soft targets, with the draws of the batch's plan.

    On a GPU that can run them, the pixels come from the kernels of `sdpnet.pipelines.augment.fused.launch`, as
    `options.fused` says.

    Args:
        options: section `augment` of the config.
        num_classes: the width of the targets.
        dtype: the dtype of the images returned; the arithmetic is float32.
        train: False is for evaluation: images are only normalised, and targets are one-hot.
    """

    def __init__(self, options: AugmentOptions, num_classes: int, dtype: torch.dtype, *, train: bool) -> None:
        self.options = options
        self.num_classes = num_classes
        self.dtype = dtype
        self.train = train
        self._scale: torch.Tensor | None = None
        self._fused: bool | None = None  # decided on the first batch
        self._buffers: Buffers | None = None  # for results on a CPU

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Augments one batch.

        Returns:
            images (B, 3, H, W), channels_last, and targets float32 (B, num_classes). In training, the targets of
            samples that are not valid are zero.

        Raises:
            UserError: with `fused: verify`, the kernels' first batch differs from the reference's.
        """
        return self.images(batch), self.targets(batch)

    def images(self, batch: Batch) -> torch.Tensor:
        """The first result of a call alone."""
        if self._fused is None:
            self._fused = self._choose_fused(batch)
        return self._run_fused(batch, self.dtype) if self._fused else self._run_reference(batch, self.dtype)

    def targets(self, batch: Batch) -> torch.Tensor:
        """The second result of a call alone."""
        targets = soft_targets(batch.labels, self.num_classes, self.options.label_smoothing if self.train else 0.0)
        if self.train and self.options.mix.enabled:
            partners, lambdas = (
                torch.from_numpy(draws).to(batch.images.device, non_blocking=True)
                for draws in (batch.plan.mix_partners, batch.plan.mix_lambdas)
            )
            targets = mix_targets(targets, partners, lambdas)
        if self.train and not batch.plan.valid.all():
            targets = targets * batch.valid.view(-1, 1)  # with zero targets, a sample has no loss and no gradient
        return targets

    def _choose_fused(self, batch: Batch) -> bool:
        """Whether the kernels are used: they can run on the device and did so on this batch.

        With `verify`, their result is also compared with the reference's.
        """
        if self.options.fused == "off" or not fused.runs_on(batch.images.device):
            return False
        try:
            out = self._run_fused(batch, torch.float32 if self.options.fused == "verify" else self.dtype)
        except Exception as error:  # Triton compiles here and may lack a C compiler or refuse the card
            if self.options.fused == "verify":
                raise
            cause = " ".join(str(error).split())[:200]
            warnings.warn(f"augment.fused: slower without the kernel, which cannot run here: {cause}", stacklevel=4)
            return False
        if self.options.fused == "verify":
            reference = self._run_reference(batch, torch.float32)
            levels = (out - reference).abs() / self._factors(batch.images.device)[:3].view(1, 3, 1, 1)
            if not levels.max() <= _MAX_DIFFERENCE:
                off = (levels > _MAX_DIFFERENCE).float().mean().item()
                raise UserError(
                    f"augment.fused: {off:.2%} of the first batch's values differ from the reference's by more than "
                    f"{_MAX_DIFFERENCE} levels (at most {levels.max().item():.1f} levels); set augment.fused to off"
                )
        return True

    def _run_fused(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        scale = self._factors(batch.images.device)
        return fused.finish(batch.images, scale, dtype, self.options, batch.plan if self.train else None)

    def _run_reference(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """The batch through the PyTorch reference: (B, 3, H, W), channels_last."""
        images = batch.images.permute(0, 3, 1, 2)
        randaugment, plan = self.options.randaugment, batch.plan
        if self.train and randaugment.enabled:
            how, fill = randaugment.interpolation, randaugment.fill
            images = apply_operations(images, plan.ops, plan.magnitudes, interpolation=how, fill=fill)
        out = self._result(images, dtype)
        mixing = self.train and self.options.mix.enabled
        for samples in pieces(len(images), _PIECE, images.device):
            if mixing:
                both = np.concatenate([samples, plan.mix_partners[samples]])
                needed, slots = np.unique(both, return_inverse=True)
                part = self._erased(images, plan, needed)
                own, others = np.split(slots, 2)
                partners = part.index_select(0, _send(others, images.device))
                if len(needed) > len(samples):  # not with a plan's own pairs, which lie side by side in one piece
                    part = part.index_select(0, _send(own, images.device))
                draws = (plan.mix_kinds, plan.mix_lambdas, plan.mix_boxes)
                part = mix(part, partners, *(_send(draw[samples], images.device) for draw in draws))
            else:
                part = self._erased(images, plan, samples)
            out[samples[0] : samples[-1] + 1] = part
        return out

    def _result(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for the result of `images`, (B, 3, H, W), channels_last.

        On a CPU it is used again when nobody holds the result any more: with fresh memory, a batch of 256 images took
        1.25 to 2 times as much processor time (records/LOG.md).
        """
        if images.device.type != "cpu":
            return torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
        count, channels, height, width = images.shape
        nbytes = images.numel() * dtype.itemsize
        if self._buffers is None or self._buffers.nbytes < nbytes:
            self._buffers = Buffers(nbytes, keep=_KEPT)
        return self._buffers.lend((count, height, width, channels), dtype).permute(0, 3, 1, 2)

    def _erased(self, images: torch.Tensor, plan: BatchPlan, samples: np.ndarray) -> torch.Tensor:
        """Normalises ((x / 255 - mean) / std) and erases some samples: float32 (N, 3, H, W), contiguous."""
        device, options = images.device, self.options.erase
        factor, offset = self._factors(device).view(2, 1, 3, 1, 1)
        part = images.index_select(0, _send(samples, device)).contiguous().float().mul_(factor).add_(offset)
        if not self.train or options.probability == 0:
            return part
        boxes = plan.erase_boxes[samples]
        if options.mode == "constant":
            return erase(part, _send(boxes, device))
        rows = np.flatnonzero(boxes[:, 2])
        if not len(rows):
            return part
        shape = tuple(part.shape[1:]) if options.mode == "pixel" else (3, 1, 1)
        noise = normal_noise(_send(plan.erase_keys[samples[rows]], device), shape)
        return erase_with(part, _send(rows, device), _send(boxes[rows], device), noise)

    def _factors(self, device: torch.device) -> torch.Tensor:
        """The normalisation of levels as factors and addends, float32 (6,): 1 / (255 std), then -mean / std."""
        if self._scale is None or self._scale.device != device:
            mean = torch.tensor(self.options.mean, device=device)
            std = torch.tensor(self.options.std, device=device)
            self._scale = torch.cat([1 / (255 * std), -mean / std])
        return self._scale
