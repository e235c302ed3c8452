"""The choice follows the measured times, which are made up here, and their cache is never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution import depthwise_choice
from sdpnet.execution.depthwise_choice import CANDIDATES, block_seconds, choose_depthwise
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

ALONE = Processes(ShardOptions(), torch.device("cpu"))


class Stopwatch:
    """Stands for `block_seconds` on a GPU: the times are given, the calls counted."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = dict(zip(CANDIDATES, seconds, strict=True))
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, *arguments: object, compiled: bool) -> dict[str, list[float]]:
        self.calls.append((*arguments, compiled))
        return {name: [9.0, value, 0.0] for name, value in self.seconds.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(depthwise_choice, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return tmp_path / "cache" / "sdpnet" / "depthwise.json"


def chosen(
    options: TrainOptions, dtype: torch.dtype = torch.float16, batch_size: int = 8, processes: Processes = ALONE
) -> bool:
    model = SdPNet(create_model_options("sdpnet_tiny", num_classes=3))
    names = list(model.state_dict())
    choose_depthwise(options, model, batch_size, 32, dtype, processes)
    assert list(model.state_dict()) == names
    (both_blocks,) = {block.triton for block in model.conv_blocks}
    return both_blocks


@pytest.mark.parametrize(
    ("seconds", "memory_format", "triton"),
    [
        ((4.0, 1.0, 2.0, 5.0), "channels_last", True),
        ((4.0, 1.0, 2.0, 5.0), "contiguous", False),
        ((4.0, 1.0, 2.0, 5.0), "probe", False),
        ((4.0, 3.0, 2.0, 5.0), "probe", True),
        ((2.0, 9.0, 2.0, 9.0), "channels_last", False),
    ],
)
def test_the_faster_one_in_the_allowed_formats(
    seconds: tuple[float, ...], memory_format: str, triton: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise_choice, "block_seconds", Stopwatch(*seconds))
    assert chosen(TrainOptions(memory_format=memory_format)) is triton  # type: ignore[arg-type]


def test_measured_once_for_each_shape_and_dtype(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(4.0, 4.0, 2.0, 5.0)
    monkeypatch.setattr(depthwise_choice, "block_seconds", stopwatch)
    for _ in range(2):
        assert chosen(TrainOptions())
        assert chosen(TrainOptions(), torch.bfloat16)
        assert chosen(TrainOptions(), batch_size=1000)
        assert chosen(TrainOptions(compile=True))
    shape = (8, 128, 4, 4)
    assert stopwatch.calls == [
        (shape, 7, torch.float16, ALONE.device, False),
        (shape, 7, torch.bfloat16, ALONE.device, False),
        ((256, 128, 4, 4), 7, torch.float16, ALONE.device, False),
        (shape, 7, torch.float16, ALONE.device, True),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}'])
def test_a_damaged_cache_is_written_anew(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(4.0, 4.0, 2.0, 5.0)
    monkeypatch.setattr(depthwise_choice, "block_seconds", stopwatch)
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert chosen(TrainOptions()) and chosen(TrainOptions())
    assert len(stopwatch.calls) == 1


def test_without_a_cache_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.parent.write_text("a file where the directory should be")
    monkeypatch.setattr(depthwise_choice, "block_seconds", Stopwatch(4.0, 4.0, 2.0, 5.0))
    assert chosen(TrainOptions())


def test_other_processes_follow_the_main_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(1.0, 1.0, 2.0, 2.0)
    monkeypatch.setattr(depthwise_choice, "block_seconds", stopwatch)
    monkeypatch.setattr(depthwise_choice, "from_main", lambda value, processes: 1)
    assert chosen(TrainOptions(), processes=Processes(ShardOptions(1, 2), ALONE.device))
    assert not stopwatch.calls


def test_explicit_choices_measure_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(1.0, 1.0, 2.0, 2.0)
    monkeypatch.setattr(depthwise_choice, "block_seconds", stopwatch)
    assert chosen(TrainOptions(depthwise="triton"))
    assert not chosen(TrainOptions(depthwise="torch"))
    assert not stopwatch.calls


def test_on_a_cpu() -> None:
    assert not chosen(TrainOptions())
    with pytest.raises(UserError, match=r"^train.depthwise = 'triton': needs Triton and an NVIDIA GPU .*; use auto or"):
        chosen(TrainOptions(depthwise="triton"))


@pytest.mark.parametrize("backward", [True, False])
def test_times_of_torchs_own(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate that a CPU has, as many times as it is told; torch's generator stands where it stood."""
    monkeypatch.setattr(
        depthwise_choice, "CANDIDATES", {name: what for name, what in CANDIDATES.items() if not what[0]}
    )
    before = torch.get_rng_state()
    seconds = block_seconds((2, 4, 5, 3), 3, torch.bfloat16, ALONE.device, rounds=3, backward=backward)
    assert {name: len(values) for name, values in seconds.items()} == {"torch channels_last": 3, "torch contiguous": 3}
    assert torch.equal(torch.get_rng_state(), before)
