"""The native pipeline: the same bytes however it is run, damaged samples, what it leaves behind and what it holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_threads import assert_no_thread_is_left, our_threads
from pipeline_batches import collect, config_for, load, loader_for

from sdpnet import train
from sdpnet.optim.loss import soft_cross_entropy
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.errors import BackendMissingError, ShardError, UserError
from sdpnet.pipelines.executors.native import NativeLoader, _PrefetchDepth
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.options import NativeOptions, ShardOptions
from sdpnet.pipelines.plan import MIX_NONE
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.remedy import rebuild

pytestmark = pytest.mark.usefixtures("native", "earlier_loaders_collected")


@pytest.fixture(params=["beton", "tar"])
def shards(request: pytest.FixtureRequest, shard_set: Path, tar_set: Path) -> Path:
    return shard_set if request.param == "beton" else tar_set


@pytest.fixture
def native_loader() -> Iterator[Callable[..., NativeLoader]]:
    """As `load`, and closed in the end."""
    loaders: list[NativeLoader] = []

    def made(data: Path, split: str = "train", **changes: Any) -> NativeLoader:
        loader = load(data, "native", split, **changes)
        assert isinstance(loader, NativeLoader)
        loaders.append(loader)
        return loader

    yield made
    for loader in loaders:
        loader.close()


def same(one: list[Batch], other: list[Batch]) -> bool:
    fields = ("images", "labels", "sample_ids", "valid")
    return len(one) == len(other) and all(
        torch.equal(getattr(a, field), getattr(b, field)) for a, b in zip(one, other, strict=True) for field in fields
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_bytes_for_any_number_of_threads_from_any_batch_on(
    split: str, shards: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    one = native_loader(shards, split, num_workers=1, prefetch_batches=1, native=NativeOptions(read_ahead_batches=0))
    whole = collect(one)
    assert len(whole) == len(one) > 2
    for threads in (2, 3, 8):
        assert same(collect(native_loader(shards, split, num_workers=threads)), whole)
    for start in range(len(one) + 1):
        assert same(collect(one, start=start), whole[start:])
    assert not same(collect(one, epoch=2), whole) or split == "val"


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_together_read_what_one_process_reads(
    split: str, world_size: int, shards: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    whole = collect(native_loader(shards, split, batch_size_per_gpu=8))
    options = {"batch_size_per_gpu": 8 // world_size}
    ranks = [
        collect(native_loader(shards, split, shard=ShardOptions(rank, world_size), **options))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for batch, *parts in zip(whole, *ranks, strict=True):
        for field in ("images", "labels", "sample_ids", "valid"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(part, field) for part in parts])), field


def test_both_formats_give_the_same_bytes(
    shard_set: Path, tar_set: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    assert same(collect(native_loader(shard_set)), collect(native_loader(tar_set)))


def test_another_image_size_from_the_next_iterator_on(
    shard_set: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    loader = native_loader(shard_set, image_size=64)
    iterator = loader.batches(0)
    next(iterator)
    loader.set_image_size(32)
    assert next(iterator).images.shape == (4, 64, 64, 3)
    iterator.close()
    small = collect(loader)
    expected = collect(native_loader(shard_set, image_size=32))
    assert same(small, expected)
    for ours, theirs in zip(small, expected, strict=True):
        assert np.array_equal(ours.plan.erase_boxes, theirs.plan.erase_boxes)
        assert np.array_equal(ours.plan.mix_boxes, theirs.plan.mix_boxes)
    assert any((batch.plan.mix_boxes[:, 2:] > 0).any() for batch in small)


# ---- damaged samples


def damaged_copy(source: Path, out: Path, split: str, samples: list[int]) -> Path:
    """The shard set with the markers and tables of these samples' JPEGs gone."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    _, reader = open_split(source, split)
    images = [reader.encoded(sample).tobytes() for sample in samples]
    for path in out.glob(f"{split}*.*"):
        content = path.read_bytes()
        for image in images:
            content = content.replace(image, bytes(200) + image[200:])
        path.write_bytes(content)
    return out


def test_a_damaged_sample_is_an_error_that_names_it(
    shards: Path, tmp_path: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    copy = damaged_copy(shards, tmp_path / "shards", "val", [5])
    loader = native_loader(copy, "val")
    iterator = loader.batches()
    next(iterator)
    with pytest.raises(ShardError, match=r"/val[^ ]*: sample 5: damaged JPEG \(.+\)$"):
        next(iterator)
    assert loader.masked == []
    assert same(collect(loader, start=2), collect(native_loader(shards, "val"), start=2))  # it can go on


def test_a_masked_sample_is_black_invalid_and_counted(
    shards: Path, tmp_path: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    bad = [3, 9]  # 9 is also the padding of the last batch
    copy = damaged_copy(shards, tmp_path / "shards", "val", bad)
    loader = native_loader(copy, "val", on_error="mask")
    for _ in range(2):
        whole = collect(native_loader(shards, "val"))
        for ours, theirs in zip(collect(loader), whole, strict=True):
            masked = torch.isin(theirs.sample_ids, torch.tensor(bad))
            assert torch.equal(ours.images, theirs.images * ~masked.view(-1, 1, 1, 1))
            assert torch.equal(ours.valid, theirs.valid & ~masked) and np.array_equal(ours.plan.valid, ours.valid)
            assert torch.equal(ours.labels, theirs.labels)
        assert loader.masked == bad


def test_a_masked_sample_adds_no_loss_and_is_mixed_into_none(
    shard_set: Path, tmp_path: Path, native_loader: Callable[..., NativeLoader]
) -> None:
    copy = damaged_copy(shard_set, tmp_path / "shards", "train", [11])
    config = config_for(shard_set, "native")
    stage = DeviceStage(config.augment, 3, torch.float32, train=True)
    loader = native_loader(copy, on_error="mask")
    seen = 0
    for ours, theirs in zip(collect(loader), collect(native_loader(shard_set)), strict=True):
        images, targets = stage(ours)
        masked = ours.sample_ids == 11
        partner = torch.from_numpy(ours.plan.mix_partners)[masked]
        alone = masked.clone()
        alone[partner] = True
        assert (theirs.plan.mix_kinds != MIX_NONE).all() and (ours.plan.mix_kinds[alone] == MIX_NONE).all()
        unmixed = replace(theirs.plan, mix_kinds=ours.plan.mix_kinds, mix_lambdas=ours.plan.mix_lambdas)
        expected_images, expected_targets = stage(replace(theirs, plan=unmixed))
        assert torch.equal(images[~masked], expected_images[~masked])
        assert torch.equal(targets[~masked], expected_targets[~masked])
        assert (targets[masked] == 0).all() and torch.allclose(
            targets[~masked].sum(1), torch.ones(int((~masked).sum()))
        )
        logits = torch.randn(len(targets), 3, requires_grad=True)
        soft_cross_entropy(logits, targets).backward()
        assert logits.grad is not None and torch.equal(logits.grad.abs().sum(1) == 0, masked)
        seen += int(masked.sum())
    assert seen == 1 and loader.masked == [11]


def training(data: Path, out: Path, *settings: str) -> list[str]:
    command = ["--config", "debug", "--pipeline", "native", "--data", str(data), "--out", str(out)]
    common = ["data.batch_size_per_gpu=4", "data.num_workers=2", "data.on_error=mask"]
    return command + [part for setting in (*common, *settings) for part in ("--set", setting)]


def test_training_says_how_many_were_masked(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged_copy(shard_set, tmp_path / "shards", "train", [0, 7])
    copy = damaged_copy(copy, tmp_path / "shards2", "val", [1])
    assert train.main(training(copy, tmp_path / "run", "train.epochs=2")) == 0
    said = capsys.readouterr().out
    for epoch in (1, 2):
        assert f"epoch {epoch}: 2 images of split 'train' could not be decoded and were masked" in said
        assert f"epoch {epoch}: 1 images of split 'val' could not be decoded and were masked" in said
    assert said.count("(9 images)") == 2
    assert_no_thread_is_left()


def test_a_split_of_damaged_images_only_has_no_score(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged_copy(shard_set, tmp_path / "shards", "val", list(range(10)))
    assert train.main(training(copy, tmp_path / "run")) == 2
    assert "val.beton: none of its images could be decoded; copy or convert it again\n" in capsys.readouterr().err


def test_only_the_native_pipeline_masks(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.on_error = 'mask': pipeline 'torchvision' cannot.*--pipeline native"):
        load(shard_set, "torchvision", on_error="mask")
    monkeypatch.setattr(native_decoder, "available", lambda: False)
    with pytest.raises(UserError, match=r"data\.on_error = 'mask'"):
        load(shard_set, "auto", on_error="mask")
    with pytest.raises(UserError, match=r"data\.on_error = 'ignore': must be raise or mask"):
        load(shard_set, "native", on_error="ignore")


# ---- what it leaves behind, and what it holds


def test_leaving_early_leaves_nothing_running(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    assert_no_thread_is_left()
    loader = native_loader(shard_set, image_size=256, prefetch_batches=4)
    iterator = loader.batches()
    first = next(iterator).images.clone()
    iterator.close()
    with pytest.raises(ZeroDivisionError):
        for _ in loader.batches():
            1 / 0  # noqa: B018
    for _ in loader.batches(0):
        break  # the iterator is collected
    assert torch.equal(next(loader.batches()).images, first)
    assert len(our_threads()) == 3  # two to decode, one to read ahead
    loader.close()
    assert_no_thread_is_left()
    assert torch.equal(next(loader.batches()).images, first)  # it starts anew


def test_closed_under_its_iterator(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    loader = native_loader(shard_set)
    iterator = loader.batches()
    next(iterator)
    loader.close()
    assert_no_thread_is_left()
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        next(iterator)


def test_two_iterators_at_once(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    loader = native_loader(shard_set)
    expected = [collect(loader, epoch=epoch) for epoch in (0, 1)]
    for batches, *theirs in zip(zip(loader.batches(0), loader.batches(1), strict=True), *expected, strict=True):
        assert same(list(batches), theirs)


def test_a_batch_stays_until_the_next_is_asked_for(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    for batch in native_loader(shard_set, prefetch_batches=1).batches():
        before = batch.images.clone()
        time.sleep(0.1)  # the threads have finished what they were given
        assert torch.equal(batch.images, before)


def test_the_buffers_are_few_and_reused(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    loader = native_loader(shard_set, prefetch_batches=2)
    addresses = {batch.images.data_ptr() for epoch in range(3) for batch in loader.batches(epoch)}
    assert len(addresses) == 4  # one is decoded, two are decoded ahead, and the loop still holds one as it asks
    iterator = loader.batches()
    next(iterator)
    iterator.close()
    assert {batch.images.data_ptr() for batch in loader.batches()} == addresses


def test_it_decodes_further_ahead_where_that_helps(shard_set: Path, native_loader: Callable[..., NativeLoader]) -> None:
    """A step that is slow at times and fast between finds batches to wait for that could have been decoded before."""
    slow = {"image_size": 1440, "num_workers": 1}  # decoding takes longer than asking
    loader, fixed = (native_loader(shard_set, **slow, prefetch_batches=n) for n in ("auto", 3))
    for epoch in range(40):
        for of_both in zip(*(each.batches(epoch) for each in (loader, fixed)), strict=True):
            assert same(*([batch] for batch in of_both))
        for number, _ in enumerate(loader.batches(epoch)):
            time.sleep(0.2 if number == 0 else 0)
        if loader._depth.batches > 3:
            break
    assert 3 < loader._depth.batches <= 8 and fixed._depth.batches == 3


@pytest.mark.parametrize(
    ("asked", "grown"),
    [
        ([(False, True)] * 9, 0),  # the threads are never done: no room helps
        ([(True, False)] * 9, 0),  # there is always one
        ([(True, False), (False, True)] * 2, 2),
        ([(True, True), (False, True), (False, True)], 1),  # rested once
        ([(True, True)] * 9, 5),
    ],
)
def test_what_makes_it_decode_further_ahead(asked: list[tuple[bool, bool]], grown: int, shard_set: Path) -> None:
    depth = _PrefetchDepth(load(shard_set, "native", prefetch_batches="auto").source)
    for idle, waited in asked:
        depth.update(idle=idle, waited=waited)
    assert depth.batches == 3 + grown
    depth.update(idle=True, waited=False)
    depth.start_epoch()
    depth.update(idle=False, waited=True)  # an epoch's first batch
    assert depth.batches == 3 + grown


def test_memory_does_not_grow(shard_set: Path) -> None:
    """Nor do threads. A batch takes 6.2 MB; 20 epochs are 120 of them."""
    script = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parents[1] / "support")!r}, {str(Path(__file__).parents[2])!r}]
from pipeline_batches import load
from sdpnet.pipelines.options import NativeOptions
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
loader = load({str(shard_set)!r}, "native", image_size=720, native=NativeOptions(read_ahead_batches=2), on_error="mask")
sizes = []
for epoch in range(25):
    for batch in loader.batches(epoch):
        pass
    if epoch % 3 == 0:
        for batch in loader.batches(epoch):
            break
    sizes.append(resident())
assert sizes[-1] - sizes[4] < 10, sizes
del batch
loader.close()
assert sizes[-1] - resident() > 15, "the buffers are still there"
"""
    given_back_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # to the system, by glibc, from 1 MB on
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=given_back_at_once)


def test_without_the_library(shard_set: Path, tar_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(native_decoder.LIBRARY, path=tmp_path / "crop_decoder.so")
    monkeypatch.setattr(native_decoder, "LIBRARY", missing)
    with pytest.raises(BackendMissingError) as caught:
        loader_for(config_for(shard_set, "native"), "train")
    message = str(caught.value)
    assert message.startswith("pipeline 'native' cannot be used here: ") and "\n" not in message
    assert "crop_decoder.so: cannot open shared object file" in message and rebuild() in message
    working = message.split("these would work: ")[1]
    assert "torchvision" in working and "native" not in working
    loader: Loader = load(tar_set, "auto", "val")
    assert not isinstance(loader, NativeLoader)
