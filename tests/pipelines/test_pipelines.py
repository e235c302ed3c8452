"""Every pipeline against the reference: same samples, labels, boxes and flips; pixels within the stated tolerance."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion import write_manifest
from ffcv_writer import write_with_ffcv
from PIL import Image
from pipeline_batches import collect, config_for, installed, load, loader_for, pipeline

from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.options import AugmentOptions, DaliOptions, ShardOptions
from sdpnet.pipelines.plan import EraseOptions, MixOptions
from sdpnet.pipelines.planning.policies import RandAugmentOptions
from sdpnet.pipelines.shards.layout import open_split

TOLERANCE = {
    "native": 1.0,
    "torchvision": 0.0,
    "dali": 0.5,
    "ffcv": 4.0,
}  # mean absolute difference to the reference, levels of 255


@pytest.fixture(scope="module")
def reference(shard_set: Path) -> dict[str, list[Batch]]:
    return {split: collect(load(shard_set, "torchvision", split)) for split in ("train", "val")}


def test_reference_equals_pillow(shard_set: Path, reference: dict[str, list[Batch]]) -> None:
    """The oracle's own oracle: Pillow's decoder and its antialiased bilinear resize of the cropped image."""
    for split, batches in reference.items():
        _, reader = open_split(shard_set, split)
        for batch in batches:
            for image, sample, box, flip in zip(
                batch.images, batch.plan.sample_ids, batch.plan.crop_boxes.tolist(), batch.plan.flips, strict=True
            ):
                stored = Image.open(io.BytesIO(reader.encoded(sample).tobytes()))
                top, left, height, width = box
                crop = stored.crop((left, top, left + width, top + height))
                expected = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR), np.int64)
                if flip:
                    expected = expected[:, ::-1]
                assert np.abs(image.numpy() - expected).mean() < 0.5


@pytest.mark.parametrize("name", [pipeline("native"), pipeline("dali"), pipeline("ffcv")])
def test_agrees_with_the_reference(name: str, shard_set: Path, reference: dict[str, list[Batch]]) -> None:
    for split, expected in reference.items():
        loader = load(shard_set, name, split)
        got = collect(loader)
        assert len(got) == len(expected) == len(loader)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.labels, theirs.labels) and ours.labels.dtype == torch.int64
            assert torch.equal(ours.sample_ids, theirs.sample_ids) and torch.equal(ours.valid, theirs.valid)
            assert ours.images.dtype == torch.uint8 and ours.images.shape == theirs.images.shape
            difference = (ours.images.int() - theirs.images.int()).abs().float().mean((1, 2, 3))
            # Single samples stray further than the mean: FFCV's area resize on 64 px crops of noise most of all.
            assert difference.mean() <= TOLERANCE[name], difference
            assert difference.max() <= 4 * TOLERANCE[name], difference
        # An epoch can be entered anywhere, left anywhere and followed by any other, and ends where it should.
        iterator = loader.batches(0)
        for _ in range(len(loader)):
            next(iterator)
        iterator.close()  # all taken, the end not asked for: as the training loop does
        again = collect(loader)
        assert all(torch.equal(a.images, b.images) for a, b in zip(again, got, strict=True))
        tail = collect(loader, start=len(loader) - 1)
        assert len(tail) == 1 and torch.equal(tail[0].images, got[-1].images)
        assert collect(loader, start=len(loader)) == []


@pytest.mark.parametrize("name", [*map(pipeline, ("native", "dali", "ffcv")), "torchvision", "synthetic"])
def test_a_loader_follows_another_plan(name: str, shard_set: Path) -> None:
    """Of the same samples and batch size; its image size may be another one."""
    loader = load(shard_set, name)
    first = collect(loader)
    plan = loader_for(replace(config_for(shard_set, "synthetic"), seed=5), "train").source.plan
    for size in (64, 32):
        loader.set_plan(plan.resized(size))
        batches = collect(loader)
        other = load(shard_set, name, image_size=size)
        other.set_plan(plan.resized(size))
        for ours, theirs, before in zip(batches, collect(other), first, strict=True):
            assert ours.images.shape[1:3] == (size, size) and torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert not torch.equal(ours.sample_ids, before.sample_ids)
    smaller = copy.copy(plan)
    smaller.batch_size //= 2
    with pytest.raises(AssertionError):
        loader.set_plan(smaller)
    loader.close()


@pytest.mark.parametrize(
    ("name", "workers"), [pipeline("native", 1), ("torchvision", 1), ("torchvision", 3), pipeline("dali", 1)]
)
def test_batches_are_the_same_for_any_number_of_workers(name: str, workers: int, shard_set: Path) -> None:
    for one, two in zip(
        collect(load(shard_set, name, num_workers=workers)), collect(load(shard_set, name)), strict=True
    ):
        assert torch.equal(one.images, two.images) and torch.equal(one.sample_ids, two.sample_ids)


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_ranks_together_read_what_one_process_reads(name: str, shard_set: Path) -> None:
    whole = collect(load(shard_set, name))
    parts = [collect(load(shard_set, name, shard=ShardOptions(rank, 2), batch_size_per_gpu=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.labels, torch.cat([first.labels, second.labels]))


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali"), pipeline("ffcv"), "synthetic"])
def test_another_image_size(name: str, shard_set: Path) -> None:
    loader = load(shard_set, name)
    collect(loader)
    loader.set_image_size(32)
    for ours, fresh in zip(collect(loader), collect(load(shard_set, name, image_size=32)), strict=True):
        assert ours.images.shape[1:] == (32, 32, 3) and torch.equal(ours.images, fresh.images)
        assert np.array_equal(ours.plan.erase_boxes, fresh.plan.erase_boxes)
    loader.close()


FULL = AugmentOptions(
    randaugment=RandAugmentOptions(policy="randaugment"),
    erase=EraseOptions(probability=0.5, mode="pixel"),
    mix=MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0),
    label_smoothing=0.1,
)


def augmented(shards: Path, name: str, start: int = 0, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and targets of an epoch's batches from `start` on, as the model gets them."""
    loader = load(shards, name, augment=FULL, **options)
    stage = DeviceStage(FULL, loader.manifest.num_classes, torch.float32, train=True)
    done = [stage(batch) for batch in loader.batches(1, start)]
    loader.close()
    return [(images.clone(), targets.clone()) for images, targets in done]


def equal(one: list[tuple[torch.Tensor, torch.Tensor]], two: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_a_seeds_augmented_batches_are_the_same_everywhere(name: str, shard_set: Path) -> None:
    """For any number of workers, from any batch on, in any number of processes, and on every pipeline."""
    whole = augmented(shard_set, name)
    assert equal(augmented(shard_set, name, num_workers=1), whole)
    assert equal(augmented(shard_set, name, start=2), whole[2:])
    ranks = [augmented(shard_set, name, shard=ShardOptions(rank, 2), batch_size_per_gpu=2) for rank in range(2)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert equal(together, whole)  # type: ignore[arg-type]
    for (images, targets), (reference, expected) in zip(whole, augmented(shard_set, "torchvision"), strict=True):
        assert torch.equal(targets, expected)
        # Thresholds (solarize, equalize) can turn a level's difference between decoders into a large one.
        assert ((images - reference).abs() < 0.1).float().mean() > 0.9


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali"), pipeline("ffcv"), "synthetic"])
def test_evaluation_yields_each_sample_once_and_an_early_exit_leaves_nothing(
    name: str, batch_size: int, shard_set: Path
) -> None:
    loader = load(shard_set, name, "val", batch_size_per_gpu=batch_size, prefetch_batches=1)
    ids = torch.cat([batch.sample_ids[batch.valid] for batch in loader.batches()])
    assert ids.tolist() == list(range(10))
    iterator = loader.batches()
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if type(t).__name__.endswith("EpochIterator")]
    assert not multiprocessing.active_children()
    again = torch.cat([batch.sample_ids[batch.valid] for batch in loader.batches()])
    assert again.tolist() == list(range(10))
    loader.close()


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali"), pipeline("ffcv")])
def test_a_damaged_jpeg_is_an_error_never_another_images_pixels(name: str, shard_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shard_set, copy)
    _, reader = open_split(copy, "val")
    with (copy / "val.beton").open("r+b") as file:
        file.seek(file.read().index(reader.encoded(4).tobytes()))
        file.write(b"\0" * 200)  # its markers and tables are gone
    with pytest.raises(ShardError, match=r"val\.beton"):
        list(load(copy, name, "val").batches())


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_tars_give_the_same_batches(name: str, shard_set: Path, tar_set: Path) -> None:
    for split in ("train", "val"):
        for ours, theirs in zip(
            collect(load(tar_set, name, split)), collect(load(shard_set, name, split)), strict=True
        ):
            for field in ("images", "labels", "sample_ids", "valid"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_a_damaged_jpeg_in_a_tar(name: str, tar_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(tar_set, copy)
    _, reader = open_split(copy, "val")
    image = reader.encoded(4).tobytes()
    for path in copy.glob("val-*.tar"):
        path.write_bytes(path.read_bytes().replace(image, bytes(200) + image[200:]))
    with pytest.raises(ShardError, match=r"val-\*\.tar: .*\b4\b"):
        list(load(copy, name, "val").batches())


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
def test_ffcv_refuses_tars(tar_set: Path) -> None:
    with pytest.raises(UserError, match=r"train-\*\.tar: FFCV reads \.beton files only; use another --pipeline$"):
        load(tar_set, "ffcv")


def test_auto_reads_tars_without_ffcv(tar_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_decoder, "available", lambda: False)
    loader = load(tar_set, "auto", "val")
    assert type(loader).__name__ == "TorchvisionLoader"
    assert torch.cat([batch.sample_ids[batch.valid] for batch in loader.batches()]).tolist() == list(range(10))


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
def test_ffcv_leaves_torchs_threads_alone(shard_set: Path) -> None:
    """FFCV sets them to 1 when it is imported, and to its own number when it is used."""
    script = f"""
import sys, torch
torch.set_num_threads(3)
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import ShardOptions
from sdpnet.config.load import load_config
config = load_config("debug", ["data.path={shard_set}", "data.pipeline=ffcv", "data.num_workers=1"])
for _ in make_loader(config.data, config.augment, "val", ShardOptions(), torch.device("cpu"), seed=0).batches():
    assert torch.get_num_threads() == 3
assert torch.get_num_threads() == 3 and "ffcv" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
def test_ffcvs_scratch_is_as_large_as_the_largest_image() -> None:
    from sdpnet.pipelines.executors import ffcv as ffcv_pipeline
    from sdpnet.pipelines.shards.beton import MODE_JPEG, MODE_RAW

    decoder = ffcv_pipeline._PlannedDecoder(64, np.zeros((4, 6), np.int32))
    decoder.metadata = np.array(
        [(MODE_JPEG, 12_000, 800), (MODE_JPEG, 800, 12_000), (MODE_JPEG, 3_000, 3_201), (MODE_RAW, 60_000, 60_000)],
        [("mode", "u1"), ("height", "<u2"), ("width", "<u2")],
    )
    _, (_, scratch) = decoder.declare_state_and_memory(ffcv_pipeline.State(True, torch.device("cpu"), (1,), np.uint8))
    assert scratch.shape == (3 * 3_000 * 3_201,)


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
def test_ffcvs_errors_end_in_one_line(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from sdpnet.pipelines.executors import ffcv as ffcv_pipeline

    def refuse(*values: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 110 bytes.\nStack: a\nb")

    def fail(*values: object) -> None:
        raise ValueError("no such thing\nat line 3")

    loader = load(shard_set, "ffcv")
    heights, widths = loader.source.reader.sizes.T.astype(int)
    largest = (heights * widths).argmax()
    with monkeypatch.context() as patch:
        patch.setattr(loader._loader.graph, "allocate_memory", refuse)
        with pytest.raises(UserError, match=rf"\({widths[largest]} x {heights[largest]} pixels\).*native") as caught:
            list(loader.batches())
        assert "\n" not in str(caught.value) and "train.beton: FFCV needs 0.0 GB" in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(ffcv_pipeline._EpochIterator, "run_pipeline", fail)
        with pytest.raises(UserError, match=r"train\.beton: FFCV failed \(no such thing\); use --pipeline native"):
            list(loader.batches())
    assert len(list(loader.batches())) == len(loader)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not installed("dali"), reason="no DALI")
def test_dalis_graph_for_a_gpu_that_is_not_here(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI takes all that its decoder is told there; only what a card does with it cannot be seen."""
    from nvidia.dali import fn

    define, told = fn.decoders.image_slice, {}

    def telling(*args: Any, **options: Any) -> Any:
        told.update(options)
        return define(*args, **options)

    monkeypatch.setattr(fn.decoders, "image_slice", telling)
    loader = load(shard_set, "dali", dali=DaliOptions(hw_decoder_load=0.8))
    loader.source = replace(loader.source, device=torch.device("cuda", 0))
    loader._define()
    assert told["device"] == "mixed" and told["hw_decoder_load"] == 0.8
    largest = loader.source.reader.sizes.max(axis=0).tolist()
    assert [told["preallocate_height_hint"], told["preallocate_width_hint"]] == largest
    sizes = np.array([[500, 375], [9000, 40000]], np.int32)  # of a set with one that would take gigabytes
    monkeypatch.setattr(loader.source.reader, "sizes", sizes)
    loader._define()
    assert told["preallocate_height_hint"] == told["preallocate_width_hint"] == 0
    with pytest.raises(KeyError, match="not defined"):  # so it would have said
        telling(loader._define(), hw_decoder_lode=0.8)


@pytest.mark.skipif(not installed("dali"), reason="no DALI")
def test_dali_reads_in_place_and_the_caller_frees(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's threads free nothing that Python owns: they would wait for the interpreter's lock, image by image."""
    freed: list[bool] = []
    caller = threading.get_ident()

    class Watched(np.ndarray):
        def __del__(self) -> None:
            freed.append(threading.get_ident() == caller)

    loader = load(shard_set, "dali", batch_size_per_gpu=2)
    encoded = loader.source.reader.encoded
    monkeypatch.setattr(loader.source.reader, "encoded", lambda sample: encoded(sample).view(Watched))
    batches = [batch.images.clone() for epoch in range(2) for batch in loader.batches(epoch)]
    loader.close()
    gc.collect()
    assert len(freed) == sum(map(len, batches)) and all(freed)


def test_raw_pixels_are_refused_by_dali_only(shard_set: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(6)]
    copy = tmp_path / "shards"
    shutil.copytree(shard_set, copy)
    write_with_ffcv({copy / "val.beton": "raw"}, [(image, i % 3) for i, image in enumerate(images)])
    _rewrite_manifest(copy, 6)
    batches = collect(load(copy, "torchvision", "val"))
    assert [int(i) for batch in batches for i in batch.labels[batch.valid]] == [0, 1, 2, 0, 1, 2]
    whole = load(copy, "torchvision", "val", centre_fraction=1.0)
    crop = torch.from_numpy(images[0][:, 5:25]).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(crop[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
    got = next(iter(whole.batches())).images[0].permute(2, 0, 1)
    assert (got.float() - expected).abs().max() <= 1
    if installed("dali"):
        with pytest.raises(
            UserError, match=r"raw pixels.* use --pipeline native \(the default\), torchvision or ffcv$"
        ):
            load(copy, "dali", "val")


def _rewrite_manifest(directory: Path, num_samples: int) -> None:
    import json

    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["splits"]["val"]["num_samples"] = num_samples
    manifest["splits"]["val"]["files"][0].update(
        num_samples=num_samples, bytes=(directory / "val.beton").stat().st_size
    )
    write_manifest(directory, manifest)
