"""Sampling: which samples an epoch has and how often, against torch's and timm's samplers in distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_batches import collect, load, pipeline
from scipy import stats
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import WeightedRandomSampler

from sdpnet.config.load import load_config
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import CropOptions, MixOptions, Plan
from sdpnet.pipelines.planning.sampling import Sampling, SamplingOptions, SamplingRequest
from sdpnet.pipelines.shards.layout import open_split

NAMES = ("ant", "bee", "cow")
LABELS = np.repeat([0, 1, 2], [60, 30, 10])
SIGNIFICANCE = 1e-6
DRAWS = 100_000


def resolve(own: np.ndarray = LABELS, /, **request: Any) -> Sampling:
    return SamplingRequest(**request).resolve(NAMES, own, "train.beton")


def plan_of(sampling: Sampling, num_samples: int = len(LABELS), batch_size: int = 20, **changes: Any) -> Plan:
    options: dict[str, Any] = {"seed": 3, "image_size": 16, "order": "random", "crop": CropOptions()}
    sizes = np.full((num_samples, 2), 64, np.int32)
    return Plan(sizes=sizes, batch_size=batch_size, sampling=sampling, **{**options, **changes})


def epoch_ids(plan: Plan, epoch: int = 0) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, index).sample_ids for index in range(len(plan))])


def test_classes_are_chosen_and_left_out_by_name(tmp_path: Path) -> None:
    assert set(LABELS[resolve(classes=["bee", "cow"]).ids]) == {1, 2}
    assert set(LABELS[resolve(exclude=["bee"]).ids]) == {0, 2}
    assert set(LABELS[resolve(classes=["ant", "bee"], exclude=["ant"]).ids]) == {1}
    (tmp_path / "list.txt").write_text("cow\n\n ant \n", encoding="utf-8")
    listed = resolve(classes=[str(tmp_path / "list.txt")])
    assert set(LABELS[listed.ids]) == {0, 2} and listed.description == {"classes": "ant, cow"}
    assert resolve(classes=NAMES).ids is None, "all of them"
    assert set(LABELS[resolve(classes=(name for name in NAMES[:1])).ids]) == {0}
    assert set(LABELS[resolve(classes=tmp_path / "list.txt").ids]) == {0, 2}


@given(share=st.floats(0.001, 1), larger=st.floats(0.001, 1), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_subset_has_the_share_of_each_class_and_is_a_part_of_a_larger_one(
    share: float, larger: float, seed: int
) -> None:
    share, larger = sorted((share, larger))
    small, large = (resolve(subset=s, subset_seed=seed) for s in (share, larger))
    ids = np.arange(100) if small.ids is None else small.ids
    assert set(ids) <= set(np.arange(100) if large.ids is None else large.ids)
    for label, count in enumerate((60, 30, 10)):
        assert (LABELS[ids] == label).sum() == max(1, int(np.floor(count * share + 0.5)))


def test_a_share_of_some_classes_leaves_the_others_out() -> None:
    for names, counts in ((["bee"], [0, 15, 0]), (["ant", "cow"], [30, 0, 5]), (["cow"], [0, 0, 5])):
        ids = resolve(subset=0.5, classes=names).ids
        assert np.bincount(LABELS[ids], minlength=3).tolist() == counts


def test_a_subset_is_drawn_evenly_and_by_its_own_seed() -> None:
    hits = np.zeros(100)
    for seed in range(2000):
        hits[resolve(subset=0.5, subset_seed=seed).ids] += 1
    assert stats.chisquare(hits[:60]).pvalue > SIGNIFICANCE and hits[:60].sum() == 60_000
    assert not np.array_equal(resolve(subset=0.5, subset_seed=1).ids, resolve(subset=0.5, subset_seed=2).ids)


def test_a_subset_may_be_numbers_of_samples(tmp_path: Path) -> None:
    assert resolve(subset=[7, 3, 3]).ids.tolist() == [3, 7]
    np.save(tmp_path / "ids.npy", np.array([99, 0]))
    assert resolve(subset=tmp_path / "ids.npy").ids.tolist() == [0, 99]
    (tmp_path / "ids.txt").write_text("5\n4\n")
    request = SamplingOptions(subset=str(tmp_path / "ids.txt")).request(train=True)
    assert request.resolve(NAMES, LABELS, "x").ids.tolist() == [4, 5]
    assert resolve(subset=torch.tensor([1, 2]), classes=["ant"]).ids.tolist() == [1, 2]


def test_weights_have_the_distribution_of_torch() -> None:
    """The drawn samples: against the weights themselves, and against torch's sampler (both: chi-square, 1e-6)."""
    weights = np.random.default_rng(0).exponential(size=200) + 0.02
    weights[::7] = 0
    plan = plan_of(resolve(np.zeros(200, int), weights=weights), 200)
    ours = np.bincount(
        np.concatenate([plan.sample_at(epoch, np.arange(200)) for epoch in range(DRAWS // 200)]), minlength=200
    )
    torchs = np.bincount(
        list(WeightedRandomSampler(weights.tolist(), DRAWS, generator=torch.Generator().manual_seed(0))), minlength=200
    )
    used = weights > 0
    assert ours.sum() == torchs.sum() == DRAWS and not ours[~used].any()
    assert stats.chisquare(ours[used], DRAWS * weights[used] / weights.sum()).pvalue > SIGNIFICANCE
    assert stats.chi2_contingency([ours[used], torchs[used]]).pvalue > SIGNIFICANCE


def test_drawn_samples_do_not_depend_on_the_one_before() -> None:
    plan = plan_of(resolve(np.zeros(10, int), weights=np.ones(10)), 10)
    drawn = np.concatenate([plan.sample_at(epoch, np.arange(10)) for epoch in range(DRAWS // 10)])
    pairs = np.bincount(drawn[:-1] * 10 + drawn[1:], minlength=100)
    assert stats.chisquare(pairs).pvalue > SIGNIFICANCE


def test_balanced_makes_classes_equally_likely_and_samples_within_them() -> None:
    plan = plan_of(resolve(weights="balanced"))
    drawn = np.concatenate([epoch_ids(plan, epoch) for epoch in range(DRAWS // 100)])
    counts = np.bincount(drawn, minlength=100)
    expected = DRAWS / 3 / np.repeat([60, 30, 10], [60, 30, 10])
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > SIGNIFICANCE
    # Classes that are left out get no share of it.
    plan = plan_of(resolve(weights="balanced", classes=["ant", "cow"]), batch_size=10)
    drawn = np.concatenate([epoch_ids(plan, epoch) for epoch in range(500)])
    assert 0.47 < (LABELS[drawn] == 2).mean() < 0.53 and not (LABELS[drawn] == 1).any()


def test_repeats_have_the_distribution_of_deits_sampler() -> None:
    """Occurrences in an epoch are equal; over epochs, samples are chosen evenly (chi-square, 1e-6, 100,000 draws)."""
    n, repeats = 999, 3
    plan = plan_of(resolve(np.zeros(n, int), repeats=repeats), n, batch_size=27)
    deit = RepeatAugSampler(
        range(n), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0
    )  # from DeiT's RASampler
    ours, theirs = np.zeros(n, int), np.zeros(n, int)
    for epoch in range(DRAWS // n):
        deit.set_epoch(epoch)
        mine, reference = np.bincount(epoch_ids(plan, epoch), minlength=n), np.bincount(list(deit), minlength=n)
        assert np.array_equal(np.bincount(mine), np.bincount(reference)) and set(mine) == {0, repeats}
        ours, theirs = ours + (mine > 0), theirs + (reference > 0)
    assert stats.chisquare(ours).pvalue > SIGNIFICANCE
    assert stats.chi2_contingency([ours, theirs]).pvalue > SIGNIFICANCE


def test_each_occurrence_of_a_sample_has_its_own_draws() -> None:
    for sampling in (resolve(repeats=4), resolve(weights="balanced")):
        batch = plan_of(sampling, batch_size=40, mix=MixOptions(0.8, 1.0)).batch(0, 0)
        ids, counts = np.unique(batch.sample_ids, return_counts=True)
        sample = ids[counts.argmax()]
        boxes = batch.crop_boxes[batch.sample_ids == sample]
        assert len(boxes) > 1 and len(np.unique(boxes, axis=0)) == len(boxes)


def test_occurrences_are_apart_in_a_batch_and_on_different_ranks() -> None:
    plan = plan_of(resolve(repeats=2), batch_size=20, mix=MixOptions(0.8, 1.0))
    for index in range(len(plan)):
        batch = plan.batch(5, index)
        assert (batch.sample_ids != batch.sample_ids[batch.mix_partners]).all(), "no sample is mixed with itself"
        ranks = [set(batch.shard(rank, 2).sample_ids.tolist()) for rank in range(2)]
        assert ranks[0] == ranks[1] and len(ranks[0]) == 10


@pytest.mark.parametrize(
    "request_",
    [
        {"repeats": 3},
        {"weights": "balanced"},
        {"weights": "balanced", "repeats": 2, "classes": ["ant", "cow"]},
        {"subset": 0.5},
    ],
    ids=str,
)
def test_any_batch_is_the_same_without_the_ones_before_and_on_any_number_of_ranks(request_: dict[str, Any]) -> None:
    whole, again = (plan_of(resolve(**request_), batch_size=12) for _ in range(2))
    for index in reversed(range(len(whole))):
        batch = whole.batch(2, index)
        for world_size in (1, 2, 3, 6):
            parts = [again.batch(2, index).shard(rank, world_size) for rank in range(world_size)]
            assert np.array_equal(batch.sample_ids, np.concatenate([part.sample_ids for part in parts]))
            assert np.array_equal(batch.crop_boxes, np.concatenate([part.crop_boxes for part in parts]))


@pytest.mark.parametrize("request_", [{"repeats": 3}, {"weights": "balanced"}], ids=str)
def test_a_plan_that_repeats_its_batches_repeats_their_draws(request_: dict[str, Any]) -> None:
    plan = plan_of(resolve(**request_), batch_size=12)
    repeated = RepeatedPlan(plan, 3 * len(plan))
    for index in range(len(repeated)):
        ours, theirs = repeated.batch(0, index), plan.batch(0, index % len(plan))
        assert np.array_equal(ours.sample_ids, theirs.sample_ids) and ours.valid.all()
        assert np.array_equal(ours.crop_boxes, theirs.crop_boxes)


@given(
    n=st.integers(1, 60), batch_size=st.integers(1, 20), repeats=st.integers(1, 3), order=st.sampled_from(["r", "b"])
)
@settings(max_examples=80, deadline=None)
def test_the_last_batch_is_kept_where_it_is_asked_for(n: int, batch_size: int, repeats: int, order: str) -> None:
    sampling = resolve(np.zeros(n, int), repeats=repeats)
    plan = plan_of(
        sampling, n, batch_size, drop_last=False, order="random" if order == "r" else "blocks", mix=MixOptions(0.8)
    )
    seen = []
    for index in range(len(plan)):
        batch = plan.batch(1, index)
        last = int(batch.valid.sum())
        assert batch.valid[:last].all() and (last == batch_size or index == len(plan) - 1)
        assert batch.valid[batch.mix_partners][batch.mix_kinds > 0].all(), "padding is mixed into nothing"
        seen.append(batch.sample_ids[batch.valid])
    counts = np.bincount(np.concatenate(seen), minlength=n)
    assert counts.sum() == n and counts.max() <= repeats and (repeats > 1 or counts.min() == 1)


def test_a_million_weights() -> None:
    """The sums are made once, and a batch looks its samples up in them."""
    n = 1_000_000
    weights = np.ones(n)
    weights[0] = n
    plan = plan_of(resolve(np.zeros(n, np.int64), weights=weights), n, batch_size=1000)
    ids = plan.batch(0, 0).sample_ids
    assert 400 < (ids == 0).sum() < 600 and ids.max() < n


def test_labels_of_ones_own(shard_set: Path, tmp_path: Path) -> None:
    _, reader = open_split(shard_set, "train")
    n = reader.num_samples
    np.save(tmp_path / "classes.npy", (np.arange(n) % 5).astype(np.int16))
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).random((n, 4)) > 0.5)
    np.save(tmp_path / "values.npy", np.linspace(-1, 1, n))
    for name, classes in (("classes", 5), ("rows", 4), ("values", 1)):
        sampling = SamplingOptions(labels=str(tmp_path / f"{name}.npy"))
        loader = load(shard_set, "torchvision", sampling=sampling)
        given_labels = np.load(tmp_path / f"{name}.npy")
        for batch in collect(loader):
            expected = given_labels[batch.sample_ids.numpy()].reshape(batch.labels.shape)
            assert np.allclose(batch.labels.numpy(), expected)
        assert loader.manifest.num_classes == classes
        loader.close()


@pytest.mark.parametrize("name", [pipeline(n) for n in ("native", "torchvision", "ffcv", "dali", "synthetic")])
def test_every_pipeline_executes_the_same_sampling(name: str, shard_set: Path) -> None:
    sampling = SamplingOptions(exclude=("bee",), weights="balanced", repeats=2)
    loader = load(shard_set, name, sampling=sampling)
    reference = load(shard_set, "torchvision", sampling=sampling)
    expected = collect(reference)
    got = collect(loader)
    assert len(got) == len(expected) > 1
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.sample_ids, theirs.sample_ids) and torch.equal(ours.labels, theirs.labels)
        if name != "synthetic":
            assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 5
    resumed = collect(loader, start=1)
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, got[1:], strict=True))
    halves = [
        collect(load(shard_set, name, shard=ShardOptions(rank, 2), batch_size_per_gpu=2, sampling=sampling))
        for rank in range(2)
    ]
    for whole, *parts in zip(got, *halves, strict=True):
        assert torch.equal(whole.sample_ids, torch.cat([part.sample_ids for part in parts]))
        if name != "synthetic":
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    loader.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classes": ["bea"]}, "classes: no class 'bea': did you mean 'bee'?"),
        ({"exclude": ["zzz"]}, "exclude: no class 'zzz': there are ant, bee, cow"),
        ({"classes": ["ant"], "exclude": ["ant"]}, "no sample is left: classes = ant, exclude = ant"),
        ({"classes": [1.5]}, "classes = 1.5: must be names of classes"),
        ({"classes": ["missing.txt"]}, "classes: missing.txt: cannot be read"),
        ({"subset": 0.0}, "subset = 0.0: must be a share in (0, 1]"),
        ({"subset": 1.5}, "subset = 1.5: must be a share in (0, 1]"),
        ({"subset": [100]}, "subset: sample 100, but train.beton has samples 0 to 99"),
        ({"subset": [-1]}, "subset: sample -1"),
        ({"subset": [0.5]}, "subset: float64 (1,), must be a share"),
        ({"subset": np.ones(100, bool)}, "pass np.flatnonzero"),
        ({"subset": []}, "must be a share in (0, 1] or numbers of samples"),
        ({"weights": np.ones(99)}, "weights: 99 numbers, but train.beton has 100 samples"),
        ({"weights": np.r_[np.ones(99), -1]}, "weights: sample 99 has -1.0: must be finite and at least 0"),
        ({"weights": np.r_[np.nan, np.ones(99)]}, "weights: sample 0 has nan"),
        ({"weights": np.zeros(100)}, "their sum over the samples that are used is 0.0"),
        ({"weights": np.full(100, 1e308)}, "their sum over the samples that are used is inf"),
        ({"weights": "balance"}, "weights = 'balance': must be 'balanced', one number for each sample, or the path"),
        ({"weights": "weights.npy"}, "weights: weights.npy: cannot be read"),
        ({"weights": np.ma.masked_all(100)}, "weights: an array with masked values"),
        ({"weights": np.ones((100, 1))}, "must be one number for each sample"),
        ({"weights": ["a"] * 100}, "must be of numbers"),
        ({"repeats": 0}, "repeats = 0: must be a whole number from 1 to 1,024"),
        ({"repeats": 2.0}, "repeats = 2.0: must be a whole number"),
        ({"labels": np.zeros(7, int)}, "labels: 7 rows, but train.beton has 100 samples"),
        ({"labels": np.full(100, -1)}, "labels: sample 0 has -1: must be 0 to 999,999"),
        ({"labels": np.full((100, 2), np.inf)}, "labels: sample 0 has [inf, inf]: must be finite"),
        ({"labels": np.ones(100)}, "for classes pass whole numbers (.astype(int))"),
        ({"labels": np.ones(100, bool)}, "for classes pass whole numbers (.astype(int))"),
        ({"labels": "labels.csv"}, "labels = 'labels.csv': must be the path of an .npy file"),
        ({"classes": 3}, "classes = 3: must be names of classes"),
        ({"labels": np.zeros((100, 2, 2))}, "must be a whole number or a row of numbers"),
        ({"labels": np.zeros((100, 0))}, "must be a whole number or a row of numbers"),
        ({"labels": np.zeros((100, 3)), "weights": "balanced"}, "needs one class a sample, but labels has rows"),
        ({"labels": [object()] * 100}, "labels: an array of object, must be of numbers"),
        ({"labels": [[1], [1, 2]]}, "pass an array of numbers"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else " ".join(value),
)
def test_wrong_use_is_one_line_with_the_remedy(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(**request_)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(shard_set: Path) -> None:
    with pytest.raises(UserError, match=r"data.order = 'blocks': data.sampling.weights draws samples at random"):
        DataOptions(order="blocks", sampling=SamplingOptions(weights="balanced"))
    with pytest.raises(UserError, match="fewer than one batch") as caught:
        load(shard_set, "torchvision", sampling=SamplingOptions(subset=0.01), batch_size_per_gpu=8)
    assert "that data.sampling chooses" in str(caught.value)
    _, reader = open_split(shard_set, "train")
    rows = SamplingRequest(labels=np.zeros((reader.num_samples, 2)))
    from sdpnet.pipelines.loader import make_loader

    data = DataOptions(path=str(shard_set), pipeline="torchvision", batch_size_per_gpu=4, image_size=16)
    smooth = AugmentOptions(label_smoothing=0.1)
    with pytest.raises(UserError, match="needs one class a sample, but labels has rows"):
        make_loader(data, smooth, "train", ShardOptions(), torch.device("cpu"), seed=0, sampling=rows)
    for wrong in (SamplingRequest(repeats=2), SamplingRequest(weights="balanced")):
        with pytest.raises(UserError, match="only for training"):
            make_loader(data, smooth, "val", ShardOptions(), torch.device("cpu"), seed=0, sampling=wrong)


def test_the_same_keys_are_in_the_config() -> None:
    config = load_config(
        "debug",
        ["data.sampling.classes=[ant, 3]", "data.sampling.subset=1e-1", "data.sampling.weights=balanced"],
    )
    assert config.data.sampling == SamplingOptions(classes=("ant", "3"), subset=0.1, weights="balanced")
    assert load_config("debug", ["data.sampling.subset=ids.npy"]).data.sampling.subset == "ids.npy"
    for setting, message in (
        ("classes=ant", "must be a list of names"),
        ("subset=2", "must be in (0, 1], or a path"),
        ("subset=nan", "must be a finite number"),
        ("repeats=0", "must be 1 to 1,024"),
    ):
        with pytest.raises(UserError) as caught:
            load_config("debug", [f"data.sampling.{setting}"])
        assert message in str(caught.value)
