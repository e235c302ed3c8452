"""Wrong arguments of `ImageLoader` end in one line that names the argument, its value and what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdpnet import ImageLoader
from sdpnet.loading import arguments
from sdpnet.loading.arguments import device_from, shard_from
from sdpnet.pipelines.errors import BackendMissingError, ShardError, UserError

MIXED = {"mix": {"mixup_alpha": 0.8}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"split": "vla"}, "no split 'vla'; it has train, val"),
    ({"split": 3}, "split = 3: must be the name of a split"),
    (
        {"split": "val", "train": None, "batch_size": 50, "drop_last": True},
        "drop_last = True: the split has 10 samples",
    ),
    ({"train": 1}, "train = 1: must be True or False"),
    ({"image_size": 3}, "image_size = 3: must be 8 to 4,096 pixels"),
    ({"image_size": "224"}, "image_size = '224': must be a whole number"),
    ({"image_size": 224.0}, "image_size = 224.0: must be a whole number"),
    ({"batch_size": 0}, "batch_size = 0: must be 1 to 1,048,576"),
    ({"batch_size": True}, "batch_size = True: must be a whole number"),
    ({"batch_size": 50}, "24 samples, fewer than one batch (batch_size 50 x 1 processes); lower the batch size"),
    ({"batch_size": 5, "augment": MIXED}, "batch_size = 5: MixUp and CutMix mix pairs: must be even"),
    ({"augment": "sdpnet_xxxl"}, "augment = 'sdpnet_xxxl': no config 'sdpnet_xxxl': did you mean 'sdpnet_xxl'?"),
    ({"augment": "nowhere.yaml"}, "augment = 'nowhere.yaml': no config"),
    ({"augment": None}, 'augment = None: must be "none"'),
    ({"augment": ["none"]}, "augment = ['none']: must be"),
    ({"augment": {"mixx": {}}}, "unknown config key 'augment.mixx': did you mean 'mix'?"),
    ({"augment": {"mix": 3}}, "augment.mix = 3: must be a section with the keys mixup_alpha"),
    ({"augment": {"label_smoothing": 1}}, "augment.label_smoothing = 1.0: must be in [0, 1)"),
    ({"crop": 3}, "crop = 3: must be CropOptions or a mapping"),
    ({"crop": {"scale": [0, 2]}}, "crop.scale = (0.0, 2.0): must be 0 < low <= high <= 1"),
    ({"crop": {"scales": 1}}, "crop.scales': did you mean 'scale'?"),
    ({"pipeline": "nativ"}, "pipeline = 'nativ': did you mean 'native'?"),
    ({"seed": 1.5}, "seed = 1.5: must be a whole number"),
    ({"device": "gpu"}, "device = 'gpu': must be None, \"cpu\""),
    ({"device": "mps"}, "device = 'mps': must be None, \"cpu\""),
    ({"device": 1.0}, "device = 1.0: must be None"),
    ({"device": "cuda:99"}, "device = 'cuda:99': "),
    ({"rank": 0}, "rank = 0, world_size = None: give both, or none of them"),
    ({"rank": 2, "world_size": 2}, "rank = 2: must be less than world_size (2)"),
    ({"rank": -1, "world_size": 2}, "rank = -1: must be a whole number from 0 on"),
    ({"drop_last": "no"}, "drop_last = 'no': must be True or False"),
    ({"padding": None}, "padding = None: must be True or False"),
    ({"padding": True, "drop_last": True}, "padding = True: fills up the batch that drop_last = True leaves out"),
    ({"dtype": torch.int64}, "dtype = torch.int64: must be one of torch.float32"),
    ({"dtype": "float32"}, "dtype = 'float32': must be one of torch.float32"),
    (
        {"dtype": torch.uint8, "augment": MIXED},
        "dtype = torch.uint8: images are handed out as decoded, but augment has mixing",
    ),
    ({"dtype": torch.uint8, "augment": {"erase": {"probability": 0.5}}}, "but augment has erasing"),
    ({"memory_format": "channels_last"}, "memory_format = 'channels_last': must be torch.channels_last or"),
    ({"targets": "hard"}, "targets = 'hard': must be soft or index"),
    ({"targets": "index", "augment": MIXED}, "targets = 'index': MixUp and CutMix give an image two classes"),
    ({"targets": "index", "augment": {"label_smoothing": 0.1}}, "targets = 'index': label smoothing (0.1)"),
    ({"return_ids": 1}, "return_ids = 1: must be True or False"),
    ({"num_workers": -1}, "num_workers = -1: must be 0"),
    ({"prefetch_batches": 0}, "prefetch_batches = 0: must be 1 to 4,096, or auto"),
    ({"prefetch_batches": "many"}, "prefetch_batches = 'many': must be 1 to 4,096, or auto"),
    ({"on_error": "skip"}, "on_error = 'skip': did you mean 'mask'?"),
    (
        {"on_error": "mask", "pipeline": "torchvision"},
        "on_error = 'mask': pipeline 'torchvision' cannot mask, only pipeline",
    ),
    ({"order": "sorted"}, "order = 'sorted': "),
    ({"order": "sequential"}, "order = 'sequential': must be random or blocks"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_arguments(options: dict[str, Any], message: str, shard_set: Path) -> None:
    common: dict[str, Any] = {"image_size": 32, "batch_size": 4, "device": "cpu", "pipeline": "synthetic"}
    with pytest.raises(UserError) as caught:
        ImageLoader(shard_set, **{**common, **options})
    text = str(caught.value)
    assert message in text and "\n" not in text and "data." not in text and "--" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "data = '': must be the path of a shard set"),
        (None, "data = None: must be the path of a shard set"),
        (b"shards", "data = b'shards': must be the path of a shard set"),
        ("/nowhere", "/nowhere: no manifest.json here, so it is not a shard set"),
    ],
)
def test_data_that_is_no_shard_set(data: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageLoader(data, device="cpu")
    assert message in str(caught.value)
    assert isinstance(caught.value, ShardError) == (data == "/nowhere")


def test_a_missing_pipeline_says_what_would_work(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sdpnet.pipelines.executors.dali", None)  # so that importing it fails
    with pytest.raises(
        BackendMissingError, match=r"pipeline 'dali' cannot be used here: .*; to fix it: .*; these would work: "
    ):
        ImageLoader(shard_set, pipeline="dali", device="cpu", batch_size=4)


def test_numbers_of_numpy_and_mappings_of_parts_are_taken(shard_set: Path) -> None:
    sizes: dict[str, Any] = {"image_size": np.int64(32), "batch_size": np.int32(4), "seed": np.uint8(3)}
    with ImageLoader(shard_set, **sizes, device="cpu", pipeline="synthetic", augment=MIXED) as made:
        assert made.stage.options.mix.mixup_alpha == 0.8 and made.source.plan.seed == 3
        assert type(made.state_dict()["order"]["seed"]) is int


def test_the_device_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sees no usable GPU|there are"):
        device_from("cuda:99")
    monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(arguments.torch.cuda, "current_device", lambda: 2)
    assert device_from(None) == device_from("cuda") == torch.device("cuda", 2)
    assert device_from(1) == device_from("cuda:1") == device_from(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert device_from("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"device = 4: there are 4 GPUs, numbered from 0"):
        device_from(4)


def test_the_processes_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert shard_from(None, None).world_size == 1 and shard_from(1, 4).local_world_size == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shard_from(1, 4).local_world_size == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "-2")
    assert shard_from(1, 4).local_world_size == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(arguments.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(arguments.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(arguments.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(arguments.torch.cuda, "device_count", lambda: 4)
    shard = shard_from(None, None)
    assert (shard.rank, shard.world_size, shard.local_world_size) == (5, 8, 4)
