"""The plan: every random decision of training, as data, computed in one place from counters.

    Plan.batch(epoch, index) -> BatchPlan(sample_ids, valid, crop_boxes, flips, ops, magnitudes, erase_*, mix_*)

Each value is a function of (seed, epoch, sample id, purpose) alone, so it does not depend on the number of workers, on
the pipeline that executes it or on the number of ranks, and any batch can be computed without the ones before it. Where
a sample occurs several times in an epoch, the number of the occurrence is part of the function, and so is the view
where a sample has several.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace

import numpy as np

from sdpnet.pipelines.planning.crop_boxes import CropOptions, centre_crops, random_resized_crops
from sdpnet.pipelines.planning.draws import Permutation, derive_seed, sample_keys, uniforms
from sdpnet.pipelines.planning.erasing import ERASE_MODES, EraseOptions, draw_erase_boxes
from sdpnet.pipelines.planning.mixing import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, MixOptions, draw_mixes
from sdpnet.pipelines.planning.options import Order
from sdpnet.pipelines.planning.policies import RandAugmentOptions, draw_operations
from sdpnet.pipelines.planning.sampling import Sampling

__all__ = [
    "ERASE_MODES",
    "MIX_CUTMIX",
    "MIX_MIXUP",
    "MIX_NONE",
    "BatchPlan",
    "CropOptions",
    "EraseOptions",
    "MixOptions",
    "Order",
    "Plan",
]


# The purposes of draws. They are part of every key: another number would change all trainings.
_ORDER, _CROP, _FLIP, _ERASE, _MIX, _WINDOW, _OPERATIONS, _NOISE, _WEIGHTS = range(9)

# The draws of a sample's later occurrences in an epoch are those of a sample with a larger number.
_ID_BITS, _OCCURRENCE_BITS = 31, 26


@dataclass(frozen=True)
class BatchPlan:
    """The decisions for one batch of B samples. Boxes are (top, left, height, width).

    Attributes:
        sample_ids: int64 (B,).
        valid: bool (B,). False marks samples that must be neither scored nor trained on: padding, which repeats a
            sample, and samples that could not be decoded.
        crop_boxes: int32 (B, 4) in source pixels, inside the image.
        flips: bool (B,): whether the crop is mirrored left-right.
        ops: uint8 (B, K), values of `sdpnet.pipelines.planning.policies.Operation`, in the order of their application.
        magnitudes: float32 (B, K), in each operation's unit.
        erase_boxes: int32 (B, 4) in output pixels; height 0 means none.
        erase_keys: int64 (B,): the keys of the noise that fills the erased boxes; 0 where no noise is needed.
        mix_kinds: uint8 (B,): MIX_NONE, MIX_MIXUP or MIX_CUTMIX.
        mix_partners: int64 (B,): the index in this batch of the sample that is mixed in.
        mix_lambdas: float32 (B,): the weight of the sample's own label (and, for MixUp, of its own pixels).
        mix_boxes: int32 (B, 4) in output pixels: the region that CutMix takes from the partner.
    """

    sample_ids: np.ndarray
    valid: np.ndarray
    crop_boxes: np.ndarray
    flips: np.ndarray
    ops: np.ndarray
    magnitudes: np.ndarray
    erase_boxes: np.ndarray
    erase_keys: np.ndarray
    mix_kinds: np.ndarray
    mix_partners: np.ndarray
    mix_lambdas: np.ndarray
    mix_boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_ids)

    def shard(self, rank: int, world_size: int) -> BatchPlan:
        """The contiguous part of this batch that belongs to one rank; the size must divide evenly."""
        size, rest = divmod(len(self), world_size)
        assert rest == 0, f"batch of {len(self)} on {world_size} ranks"
        start = rank * size
        part = {field.name: getattr(self, field.name)[start : start + size] for field in fields(self)}
        partners = part["mix_partners"] - start
        inside = (partners >= 0) & (partners < size)
        part["mix_partners"] = np.where(inside, partners, np.arange(size))
        return BatchPlan(**part)._mixed_only_where(inside)

    def mask(self, samples: np.ndarray) -> BatchPlan:
        """The plan for a batch in which these samples (bool (B,)) could not be decoded: they are not valid, and no
        other sample is mixed with them."""
        plan = replace(self, valid=self.valid & ~samples)
        return plan._mixed_only_where(~(samples | samples[self.mix_partners]))

    def _mixed_only_where(self, keep: np.ndarray) -> BatchPlan:
        return replace(
            self,
            mix_kinds=np.where(keep, self.mix_kinds, np.uint8(MIX_NONE)),
            mix_lambdas=np.where(keep, self.mix_lambdas, np.float32(1)),
        )


class Plan:
    """All random decisions for one split, in all epochs.

    Args:
        seed: any integer.
        sizes: int32 (N, 2): height and width of each stored image.
        batch_size: the number of samples in one batch over all ranks.
        image_size: the side of the output images in pixels.
        order: "random" (a permutation of all samples), "blocks" (blocks of `block_size` neighbours are shuffled, then
            samples inside windows of `window_blocks` blocks, which keeps reads local), or "sequential".
        crop: random resized crops and flips for training. None means evaluation: the box is the central square with a
            side of `centre_fraction` times the shorter side, as after resizing the shorter side and a centre crop.
        randaugment: the operations of the device stage; none by default.
        erase: the boxes that the device stage erases; none by default.
        mix: MixUp and CutMix; none by default.
        drop_last: whether the incomplete last batch is dropped. By default, training plans ("random", "blocks") drop
            it. Otherwise it is padded with the last sample and `valid` False, so that every sample is used.
        sampling: which samples are used, and how often; by default each one once.
        view: the number of this view of the samples, for plans that differ only in their draws. Views have the same
            samples in the same order, and mix the same ones.

    Attributes:
        num_samples: the number of samples in an epoch.
    """

    def __init__(
        self,
        *,
        seed: int,
        sizes: np.ndarray,
        batch_size: int,
        image_size: int,
        order: Order = "random",
        crop: CropOptions | None = None,
        centre_fraction: float = 0.875,
        randaugment: RandAugmentOptions | None = None,
        erase: EraseOptions | None = None,
        mix: MixOptions | None = None,
        drop_last: bool | None = None,
        sampling: Sampling | None = None,
        view: int = 0,
        block_size: int = 64,
        window_blocks: int = 64,
    ) -> None:
        self.seed = seed
        self.sizes = np.asarray(sizes)
        self.sampling = sampling or Sampling()
        self.num_samples = self.sampling.num_samples(len(self.sizes))
        self.drop_last = order != "sequential" if drop_last is None else drop_last
        self.view = view
        self.batch_size = batch_size
        self.image_size = image_size
        self.order = order
        self.crop = crop
        self.centre_fraction = centre_fraction
        self.randaugment = randaugment or RandAugmentOptions()
        self.erase = erase or EraseOptions()
        self.mix = mix or MixOptions()
        self.block_size = block_size
        self.window_blocks = window_blocks
        self._cached_order: tuple[int, Permutation, np.ndarray | None] | None = None

    def resized(self, image_size: int) -> Plan:
        """The same plan for output images of another size: the draws stay, and boxes in output pixels scale."""
        plan = copy.copy(self)
        plan.image_size = image_size
        return plan

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        if self.drop_last:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def sample_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample ids, int64, at these positions (0 <= position < num_samples) of an epoch's order."""
        positions = np.asarray(positions, np.int64) // self.sampling.repeats
        if self.sampling.cumulative is not None:
            u = uniforms(derive_seed(self.seed, epoch, _WEIGHTS), positions, 1)[:, 0]
            places = self.sampling.draw(u)
        else:
            places = self._ordered(epoch, positions)
        return places if self.sampling.ids is None else self.sampling.ids[places]

    def _ordered(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The places, among the samples that are used, at these positions of an epoch in which each is used once."""
        if self.order == "sequential":
            return positions
        permutation, starts = self._epoch_order(epoch)
        if starts is None:
            return permutation(positions)
        # Two shuffles, each computable at any position: blocks of neighbours are permuted as wholes, and the positions
        # inside a window of blocks are permuted again. So a window's reads come from few places of the file.
        window = self.block_size * self.window_blocks
        shuffled = np.empty_like(positions)
        by_window = np.argsort(positions // window, kind="stable")
        windows, begins = np.unique(positions[by_window] // window, return_index=True)
        for w, inside in zip(windows.tolist(), np.split(by_window, begins[1:]), strict=True):
            first, size = w * window, min(window, self.num_samples - w * window)
            within = Permutation(size, derive_seed(self.seed, epoch, _WINDOW, w))
            shuffled[inside] = first + within(positions[inside] - first)
        block = np.searchsorted(starts, shuffled, side="right") - 1
        return permutation(block) * self.block_size + (shuffled - starts[block])

    def _epoch_order(self, epoch: int) -> tuple[Permutation, np.ndarray | None]:
        cached = self._cached_order
        if cached is None or cached[0] != epoch:
            key = derive_seed(self.seed, epoch, _ORDER)
            starts = None
            if self.order == "blocks":
                num_blocks = -(-self.num_samples // self.block_size)
                permutation = Permutation(num_blocks, key)
                blocks = permutation(np.arange(num_blocks))
                lengths = np.minimum(self.block_size, self.num_samples - blocks * self.block_size)
                starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            else:
                permutation = Permutation(self.num_samples, key)
            self._cached_order = cached = (epoch, permutation, starts)
        return cached[1], cached[2]

    def positions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions in an epoch's order of a batch over all ranks, int64 (B,), and `valid`, bool (B,).

        The batch has its positions in their order, but repeated samples are far apart in it: first come all first
        occurrences, then all second ones. Neighbours, which are mixed, are then different samples, and the occurrences
        of a sample are on several ranks, if there are any.
        """
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        valid = positions < self.num_samples
        if self.sampling.repeats > 1:
            order = np.argsort(np.where(valid, positions % self.sampling.repeats, self.sampling.repeats), kind="stable")
            positions, valid = positions[order], valid[order]
        return np.minimum(positions, self.num_samples - 1), valid

    def batch_ids(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample ids, int64 (B,), and `valid`, bool (B,), of a batch over all ranks."""
        assert 0 <= index < len(self), f"batch {index} of {len(self)}"
        positions, valid = self.positions(index)
        return self.sample_at(epoch, positions), valid

    def batch(self, epoch: int, index: int) -> BatchPlan:
        """The plan of batch `index` (0 <= index < len(self)) of an epoch, over all ranks."""
        assert 0 <= index < len(self), f"batch {index} of {len(self)}"
        positions, valid = self.positions(index)
        return self.draw(epoch, self.sample_at(epoch, positions), valid, self._occurrences(positions))

    def _occurrences(self, positions: np.ndarray) -> np.ndarray | None:
        """The number of the occurrence of the sample at each position, int64 (B,); None if all samples occur once."""
        if self.sampling.cumulative is not None:
            return positions  # a sample may be drawn at any position
        return None if self.sampling.repeats == 1 else positions % self.sampling.repeats

    def draw(
        self, epoch: int, ids: np.ndarray, valid: np.ndarray | None = None, occurrences: np.ndarray | None = None
    ) -> BatchPlan:
        """Makes all draws for any samples of an epoch.

        Args:
            epoch: at least 0.
            ids: int64 (B,), the samples.
            valid: bool (B,); all are by default.
            occurrences: int64 (B,), how many times each sample occurred in the epoch before; 0 by default.
        """
        size = len(ids)
        valid = np.ones(size, bool) if valid is None else valid
        keys = ids if occurrences is None else ids + ((occurrences & ((1 << _OCCURRENCE_BITS) - 1)) << _ID_BITS)
        boxes, flips = self.crops(epoch, ids, keys)
        ops, magnitudes = draw_operations(self.randaugment, self._key(epoch, _OPERATIONS), keys, self.image_size)
        empty = np.zeros((size, 4), np.int32)
        draws: dict[str, np.ndarray] = {
            "erase_boxes": empty,
            "erase_keys": np.zeros(size, np.int64),
            "mix_kinds": np.zeros(size, np.uint8),
            "mix_partners": np.arange(size),
            "mix_lambdas": np.ones(size, np.float32),
            "mix_boxes": empty,
        }
        if self.erase.probability > 0:
            draws["erase_boxes"] = draw_erase_boxes(self.erase, self._key(epoch, _ERASE), keys, self.image_size)
            if self.erase.mode != "constant":
                draws["erase_keys"] = sample_keys(self._key(epoch, _NOISE), keys)
        if self.mix.enabled:
            draws |= draw_mixes(self.mix, derive_seed(self.seed, epoch, _MIX), keys, self.image_size)
        plan = BatchPlan(
            sample_ids=ids, valid=valid, crop_boxes=boxes, flips=flips, ops=ops, magnitudes=magnitudes, **draws
        )
        if self.mix.enabled and not valid.all():  # padding is not mixed into a sample
            plan = plan._mixed_only_where(valid & valid[plan.mix_partners])
        return plan

    def _key(self, epoch: int, purpose: int) -> int:
        """The key of the draws for a purpose. Views after the first have keys of their own."""
        return derive_seed(self.seed, epoch, purpose, *([self.view] if self.view else []))

    def crops(
        self, epoch: int, sample_ids: np.ndarray, keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The crop boxes, int32 (B, 4), and flips, bool (B,), of any samples.

        Each draw follows from a number in `keys`, int64 (B,); by default it is the one of a sample's first occurrence.
        """
        keys = sample_ids if keys is None else keys
        sizes = self.sizes[sample_ids].astype(np.int64)
        if self.crop is None:
            return centre_crops(sizes, self.centre_fraction), np.zeros(len(sizes), bool)
        boxes = random_resized_crops(sizes, self._key(epoch, _CROP), keys, self.crop)
        flips = uniforms(self._key(epoch, _FLIP), keys, 1)[:, 0] < self.crop.flip_probability
        return boxes, flips
