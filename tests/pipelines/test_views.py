"""Several views of each sample: same samples, sizes and draws of their own, on every pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_batches import collect, load, pipeline

from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.views import MultiViewLoader, View
from sdpnet.pipelines.loader import make_view_loader
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import CropOptions, MixOptions
from sdpnet.pipelines.planning.policies import RandAugmentOptions
from sdpnet.pipelines.planning.sampling import SamplingRequest

CPU = torch.device("cpu")
LARGE, SMALL = CropOptions((0.4, 1.0)), CropOptions((0.05, 0.4))
VIEWS = (
    View(32, LARGE, AugmentOptions(randaugment=RandAugmentOptions("increasing"))),
    View(32, LARGE, AugmentOptions()),
    View(16, SMALL, AugmentOptions()),
)


def views_loader(
    data: Path, name: str, shard: ShardOptions | None = None, batch_size: int = 4, views: tuple[View, ...] = VIEWS
) -> MultiViewLoader:
    options = DataOptions(
        path=str(data),
        pipeline=name,  # type: ignore[arg-type]
        batch_size_per_gpu=batch_size,
        image_size=32,
        num_workers=2,
    )
    return make_view_loader(options, views, shard or ShardOptions(), CPU, seed=5)


def steps(loader: MultiViewLoader, epoch: int = 1, start: int = 0) -> list[dict[int, tuple[Batch, torch.Tensor]]]:
    """For each step the batch of each view, with a copy of its images."""
    found: list[dict[int, tuple[Batch, torch.Tensor]]] = []
    for number, batch in loader.batches(epoch, start):
        if not found or number in found[-1]:
            found.append({})
        found[-1][number] = (batch, batch.images.clone())
    return found


@pytest.mark.parametrize("name", [pipeline(n) for n in ("native", "torchvision", "ffcv", "dali", "synthetic")])
def test_views_have_the_same_samples_and_crops_of_their_own(name: str, shard_set: Path) -> None:
    loader = views_loader(shard_set, name)
    found = steps(loader)
    assert len(found) == len(loader) > 1
    for step in found:
        assert sorted(step) == [0, 1, 2]
        (first, _), (second, _), (third, _) = (step[number] for number in range(3))
        for other in (second, third):
            assert torch.equal(first.sample_ids, other.sample_ids) and torch.equal(first.labels, other.labels)
        assert first.images.shape == second.images.shape == (4, 32, 32, 3) and third.images.shape == (4, 16, 16, 3)
        assert (first.plan.crop_boxes != second.plan.crop_boxes).any()
        assert first.plan.ops.any() and not second.plan.ops.any()
    resumed = steps(loader, start=1)
    for again, before in zip(resumed, found[1:], strict=True):
        assert all(torch.equal(again[number][1], before[number][1]) for number in range(3))
    loader.close()


@pytest.mark.parametrize("name", [pipeline("native"), pipeline("dali")])
def test_pixels_are_those_of_a_loader_of_one_view(name: str, shard_set: Path) -> None:
    loader = views_loader(shard_set, name)
    found = steps(loader)
    for number, (view, plan) in enumerate(zip(VIEWS, loader.plans, strict=True)):
        single = load(shard_set, name, image_size=view.image_size)
        single.set_plan(plan)
        for step, images in zip(found, [batch.images.clone() for batch in single.batches(1)], strict=True):
            assert torch.equal(step[number][1], images)
        single.close()
    loader.close()


def test_the_first_view_is_that_of_a_training_without_views(shard_set: Path) -> None:
    from sdpnet.pipelines.loader import make_loader

    options = DataOptions(path=str(shard_set), pipeline="torchvision", batch_size_per_gpu=4, image_size=32, crop=LARGE)
    plain = collect(make_loader(options, AugmentOptions(), "train", ShardOptions(), CPU, seed=5))
    for step, batch in zip(steps(views_loader(shard_set, "torchvision")), plain, strict=True):
        assert torch.equal(step[0][1], batch.images)


def test_ranks_share_the_views_of_a_batch(shard_set: Path) -> None:
    whole = steps(views_loader(shard_set, "torchvision"))
    halves = [steps(views_loader(shard_set, "torchvision", ShardOptions(rank, 2), 2)) for rank in range(2)]
    for step, *parts in zip(whole, *halves, strict=True):
        for number in range(3):
            assert torch.equal(step[number][1], torch.cat([part[number][1] for part in parts]))


def test_views_that_mix_have_one_target(shard_set: Path) -> None:
    mix = AugmentOptions(mix=MixOptions(0.8, 1.0))
    for step in steps(views_loader(shard_set, "torchvision", views=(View(32, LARGE, mix), View(32, SMALL, mix)))):
        first, second = step[0][0].plan, step[1][0].plan
        assert (first.mix_lambdas == second.mix_lambdas).all() and first.mix_kinds.any()
    for views, message in (
        ((View(32, LARGE, mix), View(16, SMALL, mix)), "view 1 has 16 pixels and view 0 32"),
        ((View(32, LARGE, mix), View(32, SMALL, AugmentOptions())), "view 1 mixes images in another way"),
        ((View(32, LARGE, AugmentOptions()), View(32, SMALL, AugmentOptions(label_smoothing=0.1))), "label smoothing"),
        ((), "must be at least one"),
    ):
        with pytest.raises(UserError, match=message):
            views_loader(shard_set, "torchvision", views=views)


def test_views_and_sampling_go_together(shard_set: Path) -> None:
    options = DataOptions(path=str(shard_set), pipeline="torchvision", batch_size_per_gpu=4, image_size=32)
    request = SamplingRequest(exclude=("bee",), repeats=2)
    loader = make_view_loader(options, VIEWS, ShardOptions(), CPU, seed=5, sampling=request)
    for step in steps(loader):
        ids = step[0][0].sample_ids.tolist()
        assert ids == step[2][0].sample_ids.tolist() and len(set(ids)) == 2
