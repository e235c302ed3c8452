"""The device stage for images that come from elsewhere: augmentation, normalisation, mixing, targets.

uint8 images, labels, sample ids --draws by (seed, epoch, sample id)--> BatchPlan --DeviceStage--> images, targets
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch

from sdpnet.loading.arguments import Augment, augment_options, flag_from, integer_from, shard_from
from sdpnet.loading.output import OutputOptions, finish
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import Plan

__all__ = ["DeviceAugment"]

_IDS_OF_A_RANK: Final = 1 << 40


class DeviceAugment:
    """Augments batches of decoded images on their device, as `ImageLoader` does after its decoder.

        augment = DeviceAugment("sdpnet_xl", num_classes=1000)
        images, targets = augment(images, labels, sample_ids, epoch)

    The draws for an image are a function of the seed, the epoch and its sample id, so the same image gets other draws
    in each epoch, and the same ones in any order and on any device. Only the partners of MixUp and CutMix depend on the
    batch: images 2k and 2k + 1 are mixed with each other. The last image of a batch of odd size is not mixed.

    Args:
        augment: the name of a recipe or the path of a .yaml file, `AugmentOptions`, a mapping of their keys, or "none".
        num_classes: the width of soft targets.
        seed: any integer.
        dtype: the dtype of the result: `torch.float32`, `torch.float16` or `torch.bfloat16`.
        memory_format: `torch.channels_last` or `torch.contiguous_format`.
        targets: "soft" is float32 (B, num_classes): one-hot, smoothed or mixed. "index" is int64 (B,), for
            augmentations without mixing and label smoothing.
        train: False only normalises.

    Raises:
        UserError: an argument is not valid, or does not go with another one.
    """

    def __init__(
        self,
        augment: Augment,
        num_classes: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        targets: Literal["soft", "index"] = "soft",
        train: bool = True,
    ) -> None:
        self._options, _ = augment_options(augment)
        self._output = OutputOptions(dtype, memory_format, targets)
        require(dtype != torch.uint8, "dtype", dtype, "a floating-point dtype")
        self._train = flag_from("train", train)
        self._output.check(self._options, train=self._train)
        self._seed = integer_from("seed", seed)
        num_classes = integer_from("num_classes", num_classes, 1)
        self._stage = DeviceStage(self._options, num_classes, dtype, train=self._train)
        self._counter = 0

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, sample_ids: torch.Tensor | None = None, epoch: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augments one batch.

        Args:
            images: uint8 (B, S, S, 3) or (B, 3, S, S), RGB, values 0 to 255, on any device.
            labels: int64 (B,), on any device.
            sample_ids: int64 (B,), from 0, preferably on the CPU, because they are needed there. None numbers the
                images of this process in the order of the calls; the draws then depend on that order.
            epoch: the epoch, from 0.

        Returns:
            images (B, 3, S, S) and targets on the device of `images`.

        Raises:
            UserError: a tensor has another dtype or shape, or a label or an id is out of range. Labels on a GPU are not
                looked at.
        """
        nhwc = _nhwc(images)
        count = len(nhwc)
        _require_vector("labels", labels, count)
        if not labels.is_cuda:  # a GPU would have to be waited for
            outside = (labels < 0) | (labels >= self._stage.num_classes)
            if outside.any():
                wrong = int(labels[outside][0])
                raise UserError(f"labels: {wrong}, but there are {self._stage.num_classes} classes: must be from 0 on")
        if sample_ids is None:
            rank = shard_from(None, None).rank  # so that no two processes draw the same
            ids = rank * _IDS_OF_A_RANK + np.arange(self._counter, self._counter + count)
            self._counter += count
        else:
            _require_vector("sample_ids", sample_ids, count)
            ids = sample_ids.cpu().numpy()
            if count and not 0 <= ids.min() <= ids.max() < 1 << 57:
                raise UserError(f"sample_ids: from {ids.min()} to {ids.max()}: must be from 0 on, below 2**57")
        plan = _DrawsAlone(self._options, self._seed, nhwc.shape[1]).draw(integer_from("epoch", epoch, 0), ids)
        device = images.device
        batch = Batch(
            images=nhwc,
            labels=labels.to(device, non_blocking=True),
            sample_ids=torch.from_numpy(ids),
            valid=torch.ones(count, dtype=torch.bool, device=device),
            plan=plan,
        )
        done, targets = finish(batch, self._stage, self._output, count)
        return done, targets


class _DrawsAlone(Plan):
    """The draws of a training for any samples, but for the crops, which are made already.

    Args:
        augment: the augmentations.
        seed: any integer.
        image_size: pixels a side.
    """

    def __init__(self, augment: AugmentOptions, seed: int, image_size: int) -> None:
        super().__init__(
            seed=seed,
            sizes=np.zeros((0, 2), np.int32),
            batch_size=1,
            image_size=image_size,
            randaugment=augment.randaugment,
            erase=augment.erase,
            mix=augment.mix,
        )

    def crops(
        self, epoch: int, sample_ids: np.ndarray, keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(sample_ids), 4), np.int32), np.zeros(len(sample_ids), bool)


def _nhwc(images: torch.Tensor) -> torch.Tensor:
    """The images as uint8 (B, S, S, 3). Raises `UserError` for other tensors."""
    allowed = "a uint8 tensor (B, S, S, 3) or (B, 3, S, S)"
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        shown = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise UserError(f"images = {shown}: must be {allowed}")
    if images.shape[3] != 3 and images.shape[1] == 3:
        images = images.permute(0, 2, 3, 1)
    square = images.shape[3] == 3 and images.shape[1] == images.shape[2] and len(images) > 0
    require(square, "images", tuple(images.shape), allowed)
    return images


def _require_vector(name: str, values: torch.Tensor, count: int) -> None:
    """Raises `UserError` unless `values` is int64 (count,)."""
    if not isinstance(values, torch.Tensor) or values.dtype != torch.int64 or values.shape != (count,):
        shown = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise UserError(f"{name} = {shown}: must be an int64 tensor ({count},), one for each image")
