"""`ImageLoader`: what it yields, on all pipelines; its epochs, iterators and memory."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_group
from pipeline_batches import installed, pipeline
from torchvision.transforms.v2.functional import normalize

import sdpnet
from sdpnet import ImageLoader
from sdpnet.config.load import load_config
from sdpnet.distributed.processes import join_group, leave_group
from sdpnet.loading import image_loader
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.shards.layout import open_split

PIPELINES = [pipeline(name) for name in ("native", "torchvision", "dali", "ffcv", "synthetic")]
AUGMENT = {
    "randaugment": {"policy": "randaugment"},
    "erase": {"probability": 0.5, "mode": "pixel"},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "label_smoothing": 0.1,
}


def loader(data: Path, split: str = "train", **options: Any) -> ImageLoader:
    common: dict[str, Any] = {"image_size": 32, "batch_size": 4, "device": "cpu", "num_workers": 1, "return_ids": True}
    return ImageLoader(data, split, **{"pipeline": "torchvision", **common, **options})


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def ids_of(batches: Any) -> list[list[int]]:
    return [ids.tolist() for *_, ids in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def test_importing_sdpnet_is_cheap_and_its_names_are_there() -> None:
    code = (
        "import sys, sdpnet; assert not {'torch', 'numpy'} & set(sys.modules); sdpnet.ImageLoader; print(dir(sdpnet))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(repr(name) in printed for name in sdpnet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ImageLoadr'"):
        sdpnet.ImageLoadr  # noqa: B018


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_all_batches_of_an_epoch_in_a_list_are_those_taken_one_at_a_time(
    name: str, dtype: torch.dtype, shard_set: Path
) -> None:
    """What was yielded stays valid as long as it is held."""
    augment: Any = AUGMENT if dtype == torch.float32 else "none"
    options: dict[str, Any] = {"pipeline": name, "dtype": dtype, "augment": augment, "num_workers": 2}
    with loader(shard_set, prefetch_batches=1, batch_size=2, **options) as made:
        for epoch in range(2):
            held = list(made)
            assert len(held) == len(made) == 12
            made.set_epoch(epoch)
            for batch, kept in zip(made, held, strict=True):
                assert same(batch, kept)
        copies = [tuple(tensor.clone() for tensor in batch) for batch in held]
        list(made)
    assert all(map(same, held, copies)), "also after further epochs, and after the loader was closed"


@pytest.mark.parametrize("name", PIPELINES)
def test_images_and_targets_are_what_the_options_say(name: str, shard_set: Path) -> None:
    labels = open_split(shard_set, "train")[1].labels
    with loader(shard_set, pipeline=name, dtype=torch.uint8, targets="index") as raw:
        raw_batches = list(raw)
    all_dtypes = name in ("native", "torchvision")  # making a loader of ffcv compiles for seconds
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if all_dtypes else (torch.float32,):
        for memory_format in (torch.channels_last, torch.contiguous_format) if all_dtypes else (torch.channels_last,):
            with loader(shard_set, pipeline=name, dtype=dtype, memory_format=memory_format) as made:
                for (images, targets, ids), (levels, indices, raw_ids) in zip(made, raw_batches, strict=True):
                    assert torch.equal(ids, raw_ids) and indices.tolist() == labels[ids].tolist()
                    assert images.dtype == dtype and images.is_contiguous(memory_format=memory_format)
                    assert levels.dtype == torch.uint8 and levels.is_contiguous(memory_format=torch.channels_last)
                    assert targets.dtype == torch.float32 and targets.shape == (4, 3)
                    assert torch.equal(targets, torch.nn.functional.one_hot(indices, 3).float())
                    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
                    expected = normalize(levels.float() / 255, mean, std)
                    assert (images.float() - expected).abs().max() < {torch.float32: 1e-5}.get(dtype, 0.02)
    with loader(shard_set, return_ids=False) as pairs:
        images, targets = next(iter(pairs))
    assert images.shape == (4, 3, 32, 32) and len(targets) == 4
    assert pairs.classes == ("ant", "bee", "cow") and (pairs.num_classes, pairs.num_samples) == (3, 24)
    assert (pairs.batch_size, pairs.image_size, pairs.device) == (4, 32, torch.device("cpu"))


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision"])
def test_it_is_a_pipeline_and_its_stage(name: str, shard_set: Path) -> None:
    """`from_options`, which `train` uses, and the arguments make the same batches, raw and finished."""
    data = DataOptions(path=str(shard_set), pipeline=name, image_size=32, batch_size_per_gpu=4, num_workers=2)  # type: ignore[arg-type]
    augment = load_config("sdpnet_xl").augment
    with ImageLoader.from_options(data, augment, "train", ShardOptions(), torch.device("cpu"), seed=5) as made:
        stage = DeviceStage(augment, 3, torch.float32, train=True)
        friendly = loader(shard_set, pipeline=name, augment="sdpnet_xl", seed=5)
        for epoch in range(2):
            for batch, of_options, of_arguments in zip(made.batches(epoch), made, friendly, strict=True):
                expected = [tensor.clone() for tensor in stage(batch)]
                assert same(of_options, tuple(expected)) and same(of_arguments[:2], tuple(expected))
                assert same(made.stage(batch), tuple(expected))
        assert made.state_dict() == friendly.state_dict()


def test_a_recipes_name_brings_its_crops(shard_set: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    crop = "crop: {scale: [0.5, 0.6], flip_probability: 0}"
    recipe.write_text(f"augment: {{mean: [0.5, 0.5, 0.5]}}\ndata: {{{crop}, centre_fraction: 1.0}}\n")
    with loader(shard_set, augment=recipe) as made:
        assert made.source.options.crop.scale == (0.5, 0.6) and made.stage.options.mean == (0.5, 0.5, 0.5)
        assert not any(batch.plan.flips.any() for batch in made.batches())
    with loader(shard_set, augment=recipe, crop={"scale": [0.2, 0.3]}) as made:
        assert made.source.options.crop.scale == (0.2, 0.3) and made.source.options.crop.flip_probability == 0.5
    with loader(shard_set, "val", augment=str(recipe)) as made:
        batch = next(made.batches())
        assert (batch.plan.crop_boxes[:, 2] == open_split(shard_set, "val")[1].sizes[:4].min(axis=1)).all()


# ---- evaluation, last batches, ranks


@pytest.mark.parametrize("name", PIPELINES)
def test_an_evaluation_has_every_sample_once(name: str, shard_set: Path) -> None:
    labels = torch.from_numpy(open_split(shard_set, "val")[1].labels)
    with loader(shard_set, "val", pipeline=name) as made:
        batches = list(made)
        assert len(made) == 3 and [len(images) for images, *_ in batches] == [4, 4, 2]
        assert torch.equal(torch.cat([targets for _, targets, _ in batches]), labels)
        assert flat(ids_of(batches)) == list(range(10))
    if name == "ffcv":  # the rest is the plan's, and making a loader of ffcv compiles for seconds
        return
    with loader(shard_set, "val", pipeline=name, drop_last=True, targets="soft") as made:
        assert len(made) == 2 and ids_of(made) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with loader(shard_set, "val", pipeline=name, padding=True) as made:
        *_, (images, targets, _) = made
        assert len(made) == 3 and len(images) == 4 and targets.tolist() == [*labels[8:].tolist(), -100, -100]
    with loader(shard_set, "val", pipeline=name, padding=True, targets="soft") as made:
        *_, (_, targets, _) = made
        assert targets.sum(dim=1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("ffcv")])
def test_a_training_may_keep_its_incomplete_last_batch(name: str, shard_set: Path) -> None:
    with loader(shard_set, pipeline=name, batch_size=10, augment=AUGMENT, drop_last=False) as made:
        batches = list(made)
        assert len(made) == 3 and [len(images) for images, *_ in batches] == [10, 10, 4]
        assert sorted(flat(ids_of(batches))) == list(range(24))
        assert all(torch.allclose(targets.sum(dim=1), torch.ones(len(targets))) for _, targets, _ in batches)
    with loader(shard_set, batch_size=10, padding=True) as made:
        *_, (images, targets, _) = made
        assert len(images) == 10 and targets.sum(dim=1).tolist() == [1] * 4 + [0] * 6


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_ranks_share_each_global_batch(name: str, shard_set: Path) -> None:
    whole = list(loader(shard_set, pipeline=name, augment=AUGMENT))
    ranks = [
        loader(shard_set, pipeline=name, augment=AUGMENT, batch_size=2, rank=rank, world_size=2) for rank in range(2)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert same(batch, tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_an_evaluations_ranks_have_every_sample_once(world_size: int, shard_set: Path) -> None:
    of_ranks = [{"batch_size": 2, "rank": rank, "world_size": world_size} for rank in range(world_size)]
    ranks = [loader(shard_set, "val", **options) for options in of_ranks]
    batches = [list(rank) for rank in ranks]
    assert [len(of_rank) for of_rank in batches] == [len(rank) for rank in ranks]
    assert all(len(images) > 0 for of_rank in batches for images, *_ in of_rank)
    seen = [sample for of_rank in batches for ids in ids_of(of_rank) for sample in ids]
    assert sorted(seen) == list(range(10))
    padded = [loader(shard_set, "val", padding=True, **options) for options in of_ranks]
    assert len({len(rank) for rank in padded}) == 1
    valid = [ids[targets >= 0].tolist() for rank in padded for _, targets, ids in rank]
    assert sorted(flat(valid)) == list(range(10))


def _of_group(data: str) -> tuple[int, int, int, list[list[int]]]:
    join_group("cpu")
    made = ImageLoader(data, image_size=32, batch_size=2, return_ids=True, pipeline="torchvision", num_workers=1)
    shard = made.source.shard
    result = shard.rank, shard.world_size, shard.local_world_size, ids_of(made)
    made.close()
    leave_group()
    return result


def test_rank_and_world_size_are_those_of_torch_distributed(shard_set: Path, tmp_path: Path) -> None:
    ranks = run_group(_of_group, str(shard_set), world_size=2, scratch=tmp_path)
    assert [rank[:3] for rank in ranks] == [(0, 2, 2), (1, 2, 2)]
    together = [one + two for one, two in zip(*(rank[3] for rank in ranks), strict=True)]
    assert together == ids_of(loader(shard_set))


# ---- epochs and iterators


def test_each_iterator_is_the_next_epoch(shard_set: Path) -> None:
    with loader(shard_set, pipeline="synthetic") as made:
        epochs = [ids_of(made) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2] and made.epoch == 3
        assert all(sorted(flat(epoch)) == list(range(24)) for epoch in epochs)
        made.set_epoch(0)
        assert made.epoch == 0 and ids_of(made) == epochs[0]
        for _ in made:
            assert made.epoch == 1
            break
        assert ids_of(made) == epochs[2], "a break ends its epoch"
        iterator = iter(made)
        made.set_epoch(1)
        assert ids_of(iterator) == epochs[1], "an epoch begins with its first batch"
        iterator = iter(made)
        next(iterator)
        made.set_epoch(1)
        assert ids_of(iterator) == epochs[2][1:] and ids_of(made) == epochs[1], "an epoch that has begun goes on"
        iter(made)  # an iterator that is never asked is no epoch
        assert ids_of(made) == epochs[2]
        made.set_epoch(2)
        made.set_epoch(2)
        assert ids_of(made) == epochs[2]


@pytest.mark.parametrize("name", PIPELINES)
def test_several_iterators_at_once(name: str, shard_set: Path) -> None:
    """Where a pipeline serves one at a time, a new iterator ends the ones before it, with an error instead of a short
    epoch."""
    with loader(shard_set, pipeline=name, dtype=torch.uint8) as made:
        epochs = [list(made), list(made)]
        made.set_epoch(0)
        first, second = iter(made), None
        taken = [next(first)]
        second = iter(made)
        mixed = [next(second)]
        if name in ("dali", "ffcv"):
            with pytest.raises(UserError, match="a newer one began"):
                next(first)
        else:
            taken += list(first)
            assert made.state_dict()["epoch"] == 1, "the newest iterator is the one of the state"
            assert made.state_dict()["batch"] == 1 and all(map(same, taken, epochs[0]))
        mixed += list(second)
        assert all(same(a, b) for a, b in zip(mixed, epochs[1], strict=True))
        assert next(first, None) is None if name not in ("dali", "ffcv") else True


@pytest.mark.parametrize("name", PIPELINES)
def test_an_iterator_may_be_left_at_any_time(name: str, shard_set: Path) -> None:
    with loader(shard_set, pipeline=name, dtype=torch.uint8, batch_size=2) as made:
        whole = list(made)
        for count in (0, 1, 5, 12):
            made.set_epoch(0)
            for batch, expected in zip(made, whole[:count], strict=False):
                assert same(batch, expected)


def test_a_closed_loader_says_so(shard_set: Path) -> None:
    with loader(shard_set, pipeline="torchvision") as made:
        iterator = iter(made)
        images, *_ = next(iterator)
    kept = images.clone()
    made.close()
    for use in (lambda: next(iterator), lambda: iter(made), made.batches):
        with pytest.raises(UserError, match="closed"):
            use()
    assert torch.equal(images, kept) and len(made) == 6
    with loader(shard_set, pipeline="torchvision") as other:
        finished = iter(other)
        assert len(list(finished)) == 6
    assert next(finished, None) is None, "an iterator that has finished stays so"
    assert made.state_dict()["batch"] == 1, "the state of a closed loader can still be saved"


def test_it_belongs_to_the_process_that_made_it(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader(shard_set)
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be sent to another process or copied"):
            send(made)
    monkeypatch.setattr(image_loader.os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="forked"):
        iter(made)


def test_another_image_size(shard_set: Path) -> None:
    with loader(shard_set) as made, loader(shard_set, image_size=48) as other:
        list(made)
        made.set_image_size(48)
        assert made.image_size == 48
        made.set_epoch(0)
        assert all(same(a, b) for a, b in zip(made, other, strict=True))
        for wrong in (4, 5000, "48", 48.0):
            with pytest.raises(UserError, match="image_size = "):
                made.set_image_size(wrong)  # type: ignore[arg-type]


# ---- damage


def damaged(shard_set: Path, tmp_path: Path) -> Path:
    """A copy of the set in which sample 5 of val is no JPEG."""
    broken = tmp_path / "shards"
    shutil.copytree(shard_set, broken)
    _, reader = open_split(broken, "val")
    with (broken / "val.beton").open("r+b") as file:
        file.seek(file.read().index(reader.encoded(5).tobytes()))
        file.write(b"\0" * 200)
    return broken


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("ffcv")])
def test_an_error_in_the_middle_ends_the_iterator_alone(name: str, shard_set: Path, tmp_path: Path) -> None:
    with loader(damaged(shard_set, tmp_path), "val", pipeline=name, batch_size=2, prefetch_batches=1) as made:
        for _ in range(2):
            seen = []
            with pytest.raises(ShardError, match=r"val\.beton: sample 5: damaged JPEG"):
                for _, _, ids in made:
                    seen += ids.tolist()
            assert seen == [0, 1, 2, 3] and made.state_dict()["batch"] == 2
        assert made.epoch == 1


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", ["soft", "index"])
def test_a_masked_image_has_no_target(kind: str, shard_set: Path, tmp_path: Path) -> None:
    broken = damaged(shard_set, tmp_path)
    with loader(broken, "val", pipeline="native", on_error="mask", targets=kind, dtype=torch.uint8) as made:
        batches = list(made)
        assert flat(ids_of(batches)) == list(range(10)) and list(made.masked) == [5]
    images, targets, _ = batches[1]
    assert images[1].max() == 0 < images[2].max()
    assert targets[1].tolist() == (-100 if kind == "index" else [0, 0, 0])
    with loader(broken, "val", train=True, pipeline="native", on_error="mask", augment=AUGMENT, batch_size=10) as made:
        ((_, targets, ids),) = list(made)
        assert targets[ids == 5].abs().sum() == 0


# ---- memory


@pytest.mark.usefixtures("native")
def test_ten_epochs_hold_a_few_buffers(shard_set: Path) -> None:
    with loader(shard_set, pipeline="native", prefetch_batches=2, batch_size=2, augment="none") as made:
        counts = []
        for _ in range(10):
            for images, *_ in made:
                images.add_(1)  # it is the loop's own
            pool = made._feed.loader._pool.lender  # type: ignore[union-attr]
            results = made.stage._buffers
            assert results is not None
            counts.append((pool.num_made, results.num_made))
        assert counts == [counts[0]] * 10 and counts[0][0] <= 4 and counts[0][1] <= 2
        del images
        everything = [list(made) for _ in range(3)]
        assert results.num_made == 36
        del everything
        gc.collect()
        assert pool.num_free <= 4 and results.num_free <= 4, "what is not needed is freed"


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
def test_ffcvs_results_are_lent_too(shard_set: Path) -> None:
    with loader(shard_set, pipeline="ffcv", prefetch_batches=1, batch_size=2, dtype=torch.uint8) as made:
        for _ in range(5):
            for _ in made:
                pass
        assert made._feed.loader._loader.buffers.num_made <= 6  # type: ignore[union-attr]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8], ids=str)
def test_on_a_gpu_what_was_yielded_stays_valid_too(name: str, dtype: torch.dtype, shard_set: Path) -> None:
    augment: Any = "none" if dtype == torch.uint8 else AUGMENT
    options: dict[str, Any] = {"pipeline": name, "dtype": dtype, "batch_size": 2, "augment": augment, "device": None}
    with loader(shard_set, **options) as one, loader(shard_set, **options) as other:
        assert one.device == torch.device("cuda", torch.cuda.current_device())
        held = list(one)
        for batch, kept in zip(other, held, strict=True):
            assert same(batch, kept) and all(tensor.device == one.device for tensor in kept)


def test_the_device_is_the_cpu_where_there_is_no_gpu(shard_set: Path) -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert loader(shard_set, device=None).device.type == expected
    assert loader(shard_set, device=torch.device("cpu")).device == torch.device("cpu")


def test_evaluation_options_are_not_augmented(shard_set: Path) -> None:
    plain = AugmentOptions()
    with loader(shard_set, "val", augment=AUGMENT) as one, loader(shard_set, "val", augment=plain) as other:
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    with loader(shard_set, "train", train=False) as made:
        assert flat(ids_of(made)) == list(range(24))
    with loader(shard_set, "val", train=True) as made:
        assert sorted(flat(ids_of(made))) != list(range(8)) and len(made) == 2
