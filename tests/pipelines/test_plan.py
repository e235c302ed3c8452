from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import rand_bbox
from torchvision.transforms.v2 import RandomErasing, RandomResizedCrop

from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, CropOptions, EraseOptions, MixOptions, Order, Plan
from sdpnet.pipelines.planning.policies import RandAugmentOptions

SIGNIFICANCE = 1e-6


def sizes_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 600, (n, 2)).astype(np.int32)


def training_plan(n: int = 1000, batch_size: int = 32, order: Order = "random", **changes: object) -> Plan:
    options: dict[str, object] = {
        "seed": 7,
        "sizes": sizes_of(n),
        "batch_size": batch_size,
        "image_size": 32,
        "order": order,
        "crop": CropOptions(),
        "randaugment": RandAugmentOptions("increasing"),
        "erase": EraseOptions(0.5, mode="pixel"),
        "mix": MixOptions(0.8, 1.0, 0.9),
    }
    return Plan(**{**options, **changes})  # type: ignore[arg-type]


def batches(plan: Plan, epoch: int = 0) -> Iterator[np.ndarray]:
    return (plan.batch(epoch, index).sample_ids for index in range(len(plan)))


@pytest.mark.parametrize("order", ["random", "blocks"])
@given(n=st.integers(1, 700), batch_size=st.integers(1, 64), epoch=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_training_epoch_has_each_sample_at_most_once(order: Order, n: int, batch_size: int, epoch: int) -> None:
    plan = training_plan(n, batch_size, order, block_size=5, window_blocks=3, mix=MixOptions())
    ids = np.concatenate([*batches(plan, epoch), np.zeros(0, np.int64)])
    assert len(plan) == n // batch_size and len(ids) == len(plan) * batch_size
    assert len(np.unique(ids)) == len(ids)
    assert np.array_equal(np.sort(plan.sample_at(epoch, np.arange(n))), np.arange(n))


@given(n=st.integers(1, 300), batch_size=st.integers(1, 64))
@settings(deadline=None)
def test_evaluation_scores_each_sample_exactly_once(n: int, batch_size: int) -> None:
    plan = Plan(seed=0, sizes=sizes_of(n), batch_size=batch_size, image_size=32, order="sequential")
    seen = [plan.batch(3, index) for index in range(len(plan))]
    assert all(len(batch) == batch_size for batch in seen)
    assert np.concatenate([batch.sample_ids[batch.valid] for batch in seen]).tolist() == list(range(n))


def test_orders_change_with_epoch_and_seed_only() -> None:
    plan = training_plan()
    first, again = plan.sample_at(0, np.arange(1000)), training_plan().sample_at(0, np.arange(1000))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plan.sample_at(1, np.arange(1000)))
    assert not np.array_equal(first, training_plan(seed=8).sample_at(0, np.arange(1000)))


def test_operations_and_noise_change_with_the_epoch() -> None:
    sequential = training_plan(order="sequential")
    first, second = sequential.batch(0, 0), sequential.batch(1, 0)
    assert np.array_equal(first.sample_ids, second.sample_ids)
    assert not np.array_equal(first.magnitudes, second.magnitudes)
    assert (first.erase_keys != second.erase_keys).all() and len(np.unique(first.erase_keys)) == len(first)
    plain = training_plan(order="sequential", randaugment=None, erase=EraseOptions(0.5)).batch(0, 0)
    assert plain.ops.shape == plain.magnitudes.shape == (len(plain), 0) and not plain.erase_keys.any()
    assert np.array_equal(plain.erase_boxes, first.erase_boxes)


def test_block_order_reads_neighbours_together() -> None:
    plan = training_plan(6400, 64, "blocks", block_size=64, window_blocks=2)
    order = plan.sample_at(0, np.arange(6400))
    for window in order.reshape(-1, 128):
        assert len(np.unique(window // 64)) == 2  # two blocks of 64 neighbours in each window
    assert not np.array_equal(order, np.sort(order))


def test_any_batch_alone_equals_the_batch_in_sequence() -> None:
    plan = training_plan()
    in_sequence = [plan.batch(2, index) for index in range(len(plan))]
    for index in (20, 3, 0, len(plan) - 1):
        alone = training_plan().batch(2, index)
        for field in fields(alone):
            assert np.array_equal(getattr(alone, field.name), getattr(in_sequence[index], field.name)), field.name


def test_a_samples_draws_do_not_depend_on_the_batch_size() -> None:
    def draws(batch_size: int) -> dict[int, tuple]:
        plan = training_plan(960, batch_size)
        return {
            int(i): (
                *(b.crop_boxes[k].tolist(), bool(b.flips[k]), b.erase_boxes[k].tolist(), int(b.mix_kinds[k])),
                *(b.ops[k].tolist(), b.magnitudes[k].tolist(), int(b.erase_keys[k])),
            )
            for b in (plan.batch(1, index) for index in range(len(plan)))
            for k, i in enumerate(b.sample_ids)
        }

    assert draws(32) == draws(96)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_are_the_whole_batch(world_size: int) -> None:
    whole = training_plan().batch(0, 5)
    parts = [whole.shard(rank, world_size) for rank in range(world_size)]
    for field in fields(whole):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "mix_partners":  # indices into each rank's own batch
            values = [value + rank * len(parts[0]) for rank, value in enumerate(values)]
        assert np.array_equal(np.concatenate(values), getattr(whole, field.name)), field.name


def test_a_partner_on_another_rank_means_no_mixing() -> None:
    part = training_plan(batch_size=6).batch(0, 0).shard(0, 2)  # 3 each: the third one's partner is elsewhere
    assert part.mix_kinds[2] == MIX_NONE and part.mix_partners[2] == 2 and part.mix_lambdas[2] == 1


def test_boxes_lie_inside() -> None:
    plan = training_plan(20_000, 1000)
    for index in range(len(plan)):
        batch = plan.batch(0, index)
        top, left, height, width = batch.crop_boxes.T
        assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
        assert (top + height <= plan.sizes[batch.sample_ids, 0]).all()
        assert (left + width <= plan.sizes[batch.sample_ids, 1]).all()
        for boxes in (batch.erase_boxes, batch.mix_boxes):
            assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 32).all()


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(stats.ks_2samp(ours, theirs).pvalue > SIGNIFICANCE)


def test_crops_are_distributed_as_torchvisions() -> None:
    n = 8000
    plan = training_plan(n, n, sizes=np.tile(np.array([[375, 500]], np.int32), (n, 1)))
    ours = plan.batch(0, 0).crop_boxes
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(32), torch.empty(3, 375, 500)
    drawn = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), column
    assert same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    flips = plan.batch(0, 0).flips
    assert stats.binomtest(int(flips.sum()), n, 0.5).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1), (5, 1)])
def test_crop_of_an_extreme_shape_falls_back_as_torchvisions(size: tuple[int, int]) -> None:
    plan = training_plan(50, 50, sizes=np.tile(np.array([size], np.int32), (50, 1)), crop=CropOptions((1.0, 1.0)))
    params = RandomResizedCrop(32, scale=(1.0, 1.0)).make_params([torch.empty(3, *size)])
    expected = [params["top"], params["left"], params["height"], params["width"]]
    assert (plan.batch(0, 0).crop_boxes == expected).all()


@pytest.mark.parametrize("ratio", [(0.3, 3.3), (0.2, 0.5)])
def test_erase_boxes_are_distributed_as_torchvisions(ratio: tuple[float, float]) -> None:
    n = 100_000
    plan = training_plan(n, n, image_size=100, erase=EraseOptions(0.25, ratio=ratio))
    boxes = plan.batch(0, 0).erase_boxes
    erased = boxes[boxes[:, 2] > 0]
    assert stats.binomtest(len(erased), n, 0.25).pvalue > SIGNIFICANCE
    torch.manual_seed(0)
    transform, image = RandomErasing(p=1.0, ratio=ratio), torch.empty(3, 100, 100)
    drawn = [transform.make_params([image]) for _ in range(4000)]
    theirs = np.array([[d["i"], d["j"], d["h"], d["w"]] for d in drawn])
    for column in range(4):
        assert same_distribution(erased[:, column], theirs[:, column]), column
    for measure in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]):  # area, aspect ratio
        assert same_distribution(measure(erased), measure(theirs))


def test_mixing_is_distributed_as_defined() -> None:
    n = 100_000
    plan = training_plan(n, n, image_size=224, mix=MixOptions(0.8, 1.0, 0.9, 0.3))
    batch = plan.batch(0, 0)
    up, cut = batch.mix_kinds == MIX_MIXUP, batch.mix_kinds == MIX_CUTMIX
    assert stats.binomtest(int((up | cut).sum()), n, 0.9).pvalue > SIGNIFICANCE
    assert stats.binomtest(int(cut.sum()), int((up | cut).sum()), 0.3).pvalue > SIGNIFICANCE
    assert stats.kstest(batch.mix_lambdas[up], stats.beta(0.8, 0.8).cdf).pvalue > SIGNIFICANCE
    area = batch.mix_boxes[:, 2] * batch.mix_boxes[:, 3]
    assert np.allclose(batch.mix_lambdas[cut], 1 - area[cut] / 224**2)
    assert (area[~cut] == 0).all() and (batch.mix_lambdas[~(up | cut)] == 1).all()
    np.random.seed(0)  # timm draws its centres from numpy's global generator
    drawn = [rand_bbox((3, 224, 224), lam) for lam in np.random.default_rng(0).random(8000)]
    theirs = np.array([[y0, x0, y1 - y0, x1 - x0] for y0, y1, x0, x1 in drawn])
    for column in range(4):
        assert same_distribution(batch.mix_boxes[cut, column], theirs[:, column]), column


def test_partners_come_in_pairs() -> None:
    batch = training_plan(batch_size=33).batch(0, 0)
    partners = batch.mix_partners
    assert np.array_equal(partners[partners], np.arange(33))
    assert partners[32] == 32 and batch.mix_kinds[32] == MIX_NONE


def test_centre_crop_is_resize_then_centre_crop() -> None:
    plan = Plan(
        seed=0, sizes=np.array([[256, 341], [500, 333], [1, 9]]), batch_size=3, image_size=224, order="sequential"
    )
    assert plan.batch(0, 0).crop_boxes.tolist() == [[16, 58, 224, 224], [104, 21, 291, 291], [0, 4, 1, 1]]
