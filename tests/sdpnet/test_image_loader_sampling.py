"""`ImageLoader` with sampling, views and labels of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_batches import pipeline

from sdpnet import ImageLoader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.layout import open_split

PIPELINES = [pipeline(name) for name in ("native", "torchvision", "dali", "ffcv", "synthetic")]
SAMPLINGS: list[dict[str, Any]] = [
    {"classes": ["ant", "cow"]},
    {"exclude": ["bee"], "weights": "balanced"},
    {"subset": 0.5, "repeats": 3},
    {"weights": "balanced", "repeats": 2, "drop_last": False},
    {"views": [{"image_size": 32}, {"image_size": 16, "crop": {"scale": [0.05, 0.4]}}, {}]},
]


def loader(data: Path, **options: Any) -> ImageLoader:
    common: dict[str, Any] = {"image_size": 32, "batch_size": 4, "device": "cpu", "num_workers": 1}
    return ImageLoader(data, "train", **{"pipeline": "torchvision", "return_ids": True, **common, **options})


def tensors(batch: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors of what a loader yields; views are first."""
    images, *others = batch
    return [*(images if isinstance(images, tuple) else [images]), *others]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda value: " ".join(value))
def test_a_state_continues_at_any_batch_with_other_workers_and_ranks(shard_set: Path, sampling: dict[str, Any]) -> None:
    whole = loader(shard_set, **sampling)
    batches, states = [], [json.loads(json.dumps(whole.state_dict()))]
    for batch in whole:
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert len(batches) == len(whole) > 0
    for start, state in enumerate(states[:-1]):
        again = loader(shard_set, num_workers=2, **sampling)
        again.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(again, batches[start:], strict=True))
        ranks = [
            loader(shard_set, batch_size=2, rank=rank, world_size=2, padding="drop_last" in sampling, **sampling)
            for rank in range(2)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        for expected, *parts in zip(batches[start:], *ranks, strict=True):
            for tensor, *own in zip(tensors(expected), *map(tensors, parts), strict=True):
                assert torch.equal(tensor, torch.cat(own)[: len(tensor)])
    last = loader(shard_set, **sampling)
    last.load_state_dict(states[-1])
    assert last.epoch == 1 and not all(same(a, b) for a, b in zip(last, batches, strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_views_on_every_pipeline(name: str, shard_set: Path) -> None:
    views = [{"image_size": 32}, {"image_size": 16}, {"image_size": 32, "augment": {"erase": {"probability": 1.0}}}]
    with loader(shard_set, pipeline=name, views=views, num_workers=2) as both:
        kept = list(both)
        for images, targets, ids in kept:
            assert [image.shape for image in images] == [(4, 3, 32, 32), (4, 3, 16, 16), (4, 3, 32, 32)]
            assert targets.shape == (4, 3) and len(ids) == 4 and not torch.equal(images[0], images[2])
        both.set_epoch(0)
        for before, again in zip(kept, both, strict=True):
            assert same(before, again), "what was yielded stays as it was"


@pytest.mark.parametrize(
    ("name", "soft"), [("classes", True), ("classes", False), ("rows", True), ("values", True)], ids=str
)
def test_labels_of_ones_own(name: str, soft: bool, shard_set: Path, tmp_path: Path) -> None:
    n = open_split(shard_set, "train")[1].num_samples
    made = {
        "classes": np.arange(n) % 7,
        "rows": (np.arange(4 * n).reshape(n, 4) % 3 == 0).astype(np.uint8),
        "values": np.linspace(-1, 1, n, dtype=np.float32),
    }[name]
    np.save(tmp_path / "labels.npy", made)
    for labels in (made, torch.from_numpy(made), tmp_path / "labels.npy"):
        with loader(shard_set, labels=labels, targets="soft" if soft else "index") as own:
            for _, targets, ids in own:
                expected = torch.from_numpy(made)[ids]
                if name == "classes":
                    assert torch.equal(targets.argmax(1) if soft else targets, expected)
                else:
                    assert torch.equal(targets, expected.float().view(len(ids), -1)) and targets.dtype == torch.float32
            assert own.num_classes == {"classes": 7, "rows": 4, "values": 1}[name]


def test_an_evaluation_of_some_classes_with_labels_of_ones_own(shard_set: Path) -> None:
    n = open_split(shard_set, "val")[1].num_samples
    rows = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    val = ImageLoader(
        shard_set,
        "val",
        batch_size=3,
        image_size=32,
        device="cpu",
        labels=rows,
        exclude=["ant"],
        return_ids=True,
        pipeline="torchvision",
    )
    seen = []
    for _, targets, ids in val:
        assert np.array_equal(targets.numpy(), rows[ids])
        seen += ids.tolist()
    labels = open_split(shard_set, "val")[1].labels
    assert seen == np.flatnonzero(labels != 0).tolist() and val.num_samples == len(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["bea"]}, "classes: no class 'bea': did you mean 'bee'?"),
        ({"weights": np.ones(5)}, "weights: 5 numbers, but"),
        ({"weights": "balancd"}, "weights = 'balancd': must be 'balanced'"),
        ({"classes": []}, "classes: names no class; name one, or pass None for all of them"),
        ({"repeats": 5}, "repeats = 5: must be at most 4, the samples of a global batch"),
        ({"weights": "balanced", "order": "blocks"}, "draws samples at random"),
        ({"weights": "balanced", "train": False}, "weights: only for training"),
        ({"repeats": 2, "train": False}, "repeats: only for training"),
        ({"repeats": 1.5}, "repeats = 1.5: must be a whole number"),
        ({"subset": 0}, "subset = 0: must be a share in (0, 1]"),
        ({"subset": [10_000]}, "subset: sample 10000"),
        ({"views": 0}, "views = 0: must be a number of views from 1 to 64"),
        ({"views": "two"}, "views = 'two': must be a number of views"),
        ({"views": [{"size": 32}]}, "views[0]: 'size': did you mean 'image_size'?"),
        ({"views": [{"image_size": 4}]}, "image_size = 4: must be 8 to 4,096 pixels"),
        ({"views": 2, "train": False}, "views: only for training"),
        (
            {"views": [{"image_size": 32}, {"image_size": 16}], "augment": {"mix": {"mixup_alpha": 0.8}}},
            "views of different sizes would give them different targets",
        ),
        ({"views": [{}, {"augment": {"mix": {"mixup_alpha": 0.8}}}]}, "mixes images in another way"),
        ({"labels": np.zeros(3, int)}, "labels: 3 rows, but"),
        ({"labels": np.zeros((24, 2)), "targets": "index"}, "labels has rows of numbers, not classes"),
        ({"labels": np.zeros((24, 2)), "augment": {"label_smoothing": 0.1}}, "needs one class a sample"),
        ({"labels": "labels.txt"}, "labels = 'labels.txt': must be the path of an .npy file"),
        ({"labels": "labels.npy"}, "labels: labels.npy: cannot be read"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else " ".join(value),
)
def test_wrong_use_is_one_line_with_the_remedy(options: dict[str, Any], message: str, shard_set: Path) -> None:
    with pytest.raises(UserError) as caught:
        loader(shard_set, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_state_of_another_sampling_is_refused_by_name(shard_set: Path) -> None:
    plain, balanced = loader(shard_set), loader(shard_set, weights="balanced", repeats=2)
    with pytest.raises(UserError, match="repeats is 2 in the state and the default here; weights is 'balanced'"):
        plain.load_state_dict(balanced.state_dict())
    with pytest.raises(UserError, match="views is the default in the state and 2 here"):
        loader(shard_set, views=2).load_state_dict(plain.state_dict())
    some, others = loader(shard_set, subset=[1, 2, 3, 4, 5]), loader(shard_set, subset=[1, 2, 3, 4, 6])
    with pytest.raises(UserError, match="subset is 'hash"):
        some.load_state_dict(others.state_dict())


def test_raw_batches_are_not_for_views(shard_set: Path) -> None:
    both = loader(shard_set, views=2)
    for call in (both.batches, lambda: both.set_image_size(16)):
        with pytest.raises(UserError, match="not with views"):
            call()
