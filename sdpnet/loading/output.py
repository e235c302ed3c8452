"""The form in which batches are handed out: dtype, memory format, kind of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch

from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.options import AugmentOptions

__all__ = ["IGNORED", "OutputOptions", "finish"]

IGNORED: Final = -100  # the default `ignore_index` of torch's cross entropy
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_FORMATS: Final = (torch.channels_last, torch.contiguous_format)


@dataclass(frozen=True)
class OutputOptions:
    """The form of batches.

    Attributes:
        dtype: of the images: a floating-point dtype of `_DTYPES`, or uint8 for images that are not normalised.
        memory_format: of the images.
        targets: "soft" (float32 rows) or "index" (int64).
        return_ids: whether sample ids are handed out, too.

    Raises `UserError` for other values.
    """

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    targets: Literal["soft", "index"] = "soft"
    return_ids: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {', '.join(map(str, _DTYPES))}")
        formats = " or ".join(map(str, _FORMATS))
        require(self.memory_format in _FORMATS, "memory_format", self.memory_format, formats)
        require(self.targets in ("soft", "index"), "targets", self.targets, "soft or index")
        require(isinstance(self.return_ids, bool), "return_ids", self.return_ids, "True or False")

    def check(self, augment: AugmentOptions, *, train: bool) -> None:
        """Raises `UserError` if augmented batches cannot have this form."""
        if not train:
            return
        if self.targets == "index" and augment.mix.enabled:
            raise UserError(
                "targets = 'index': MixUp and CutMix give an image two classes; use targets='soft', or turn both off"
            )
        if self.targets == "index" and augment.label_smoothing:
            raise UserError(
                f"targets = 'index': label smoothing ({augment.label_smoothing}) is part of soft targets; use "
                "targets='soft', or set augment.label_smoothing to 0 and let the loss smooth"
            )
        parts = {"RandAugment": augment.randaugment.enabled, "erasing": augment.erase.probability > 0}
        if self.dtype == torch.uint8 and (
            on := [name for name, on in parts.items() if on] + ["mixing"] * augment.mix.enabled
        ):
            raise UserError(
                f"dtype = torch.uint8: images are handed out as decoded, but augment has {', '.join(on)}; use a "
                "floating-point dtype, or augment='none' and sdpnet.DeviceAugment afterwards"
            )

    @property
    def stage_dtype(self) -> torch.dtype:
        """The dtype of the device stage, which uint8 images do not pass."""
        return torch.float32 if self.dtype == torch.uint8 else self.dtype


def finish(batch: Batch, stage: DeviceStage, output: OutputOptions, count: int) -> tuple[torch.Tensor, ...]:
    """The images and targets of a batch's first `count` samples, and their ids if `output` says so.

    Samples that are not valid get a soft target of zeros or the index `IGNORED`. On a GPU, all tensors have memory of
    their own.
    """
    if output.dtype == torch.uint8:
        images = batch.images.permute(0, 3, 1, 2)
        if images.is_cuda:  # the pipeline uses this memory again
            images = images.clone(memory_format=cast(Any, output.memory_format))
    else:
        images = stage.images(batch)
    images = images.contiguous(memory_format=output.memory_format)
    if output.targets == "index":
        targets = batch.labels.where(batch.valid, IGNORED)
    else:
        targets = stage.targets(batch)
        if not stage.train and not batch.plan.valid.all():
            targets = targets * batch.valid.view(-1, 1)
    tensors = (images, targets, batch.sample_ids) if output.return_ids else (images, targets)
    return tensors if count == len(batch.images) else tuple(tensor[:count] for tensor in tensors)
