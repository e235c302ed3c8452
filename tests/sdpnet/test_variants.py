"""The fastest variant that agrees with PyTorch's is kept. Passes and a GPU's times are made up here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice
from sdpnet.execution.variants.choice import Measured, Pass, Variants, choose, race
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

CPU = torch.device("cpu")
ALONE = Processes(ShardOptions(), CPU)
ON_GPU = Processes(ShardOptions(), torch.device("cuda", 0))


def fixed(*values: float, seconds: float = 0.0, dtype: torch.dtype = torch.float32) -> Pass:
    def one_pass() -> Sequence[torch.Tensor]:
        time.sleep(seconds)
        return [torch.tensor(values, dtype=dtype)]

    return one_pass


def failing() -> Sequence[torch.Tensor]:
    raise RuntimeError("a kernel failed\nwith many lines")


def impossible() -> Pass:
    raise UserError("needs a width that is a multiple of 16")


def variants(**make: Pass) -> Variants:
    return Variants("train.part", "float32, (2, 3)", {name: (lambda one=one: one) for name, one in make.items()})


def test_all_are_timed_by_turns() -> None:
    measured = race(variants(torch=fixed(1, 2, seconds=0.004), ours=fixed(1, 2)), CPU, rounds=3)
    assert [len(row.seconds) for row in measured.values()] == [3, 3]
    assert min(measured["torch"].seconds) >= 0.004 > max(measured["ours"].seconds)
    assert all(row.difference == 0 and not row.reason for row in measured.values())


@pytest.mark.parametrize(
    ("values", "dtype", "reason"),
    [
        ((1.0, 2.0001), torch.float32, ""),
        ((1.0, 2.02), torch.float32, "its results differ from PyTorch's by 0.9%"),
        ((1.0, 2.02), torch.bfloat16, ""),
        ((1.0, 2.2), torch.bfloat16, "its results differ from PyTorch's by 9.1%"),
        ((1.0, float("nan")), torch.bfloat16, "its results differ from PyTorch's by nan%"),
        ((1.0, 2.0, 3.0), torch.float32, "a result has the shape (3,) instead of (2,)"),
    ],
)
def test_results_must_agree(values: tuple[float, ...], dtype: torch.dtype, reason: str) -> None:
    plain = fixed(1.0, 2.0, dtype=dtype)
    assert race(variants(torch=plain, ours=fixed(*values, dtype=dtype)), CPU, rounds=1)["ours"].reason == reason


def test_a_variant_that_fails_is_left_out() -> None:
    make = {**variants(torch=fixed(1), broken=failing).make, "impossible": impossible}
    measured = race(Variants("train.part", "", make), CPU, rounds=1)
    assert measured["torch"].seconds and not measured["broken"].seconds + measured["impossible"].seconds
    assert measured["broken"].reason == "a kernel failed"
    assert measured["impossible"].reason == "needs a width that is a multiple of 16"


def test_generators_keep_their_state() -> None:
    def drawing() -> Sequence[torch.Tensor]:
        return [torch.rand(1) * 0]

    before = torch.random.get_rng_state()
    race(variants(torch=drawing, ours=drawing), CPU, rounds=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_name_is_obeyed_and_a_cpu_takes_pytorch() -> None:
    both = Variants("train.part", "", {"torch": lambda: fixed(1), "ours": impossible})
    assert choose(both, "auto", ALONE) == ("torch", [])
    assert choose(both, "torch", ALONE) == ("torch", [])
    with pytest.raises(UserError, match=r"^train\.part = 'ours': needs a width that is a multiple of 16$"):
        choose(both, "ours", ALONE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return tmp_path / "cache" / "sdpnet" / "variants.json"


def raced(monkeypatch: pytest.MonkeyPatch, **rows: Measured) -> list[Variants]:
    """Stands for a race on a GPU; returns the list of what was raced."""
    calls: list[Variants] = []
    monkeypatch.setattr(choice, "race", lambda variants, device: calls.append(variants) or rows)
    return calls


def test_the_fastest_one_is_kept_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "torch": Measured([0.009, 0.002, 0.002]),
        "ours": Measured([0.001, 0.001, 0.009]),
        "wrong": Measured([0.0001], 1.0, "its results differ from PyTorch's by 100.0%"),
    }
    calls = raced(monkeypatch, **rows)
    some = variants(**dict.fromkeys(rows, fixed(1)))
    expected = (
        "part: ours; torch 2.00 ms, ours 1.00 ms, wrong is not possible (its results differ from PyTorch's by 100.0%)"
    )
    for _ in range(2):
        assert choose(some, "auto", ON_GPU) == ("ours", [expected])
    assert len(calls) == 1
    another = Variants(some.key, "float32, (4, 3)", some.make)
    choose(another, "auto", ON_GPU)
    assert len(calls) == 2 and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a GPU": 1}', "\x00"])
def test_a_broken_cache_is_in_nobodys_way(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    calls = raced(monkeypatch, torch=Measured([0.002]), ours=Measured([0.001]))
    some = variants(torch=fixed(1), ours=fixed(1))
    assert [choose(some, "auto", ON_GPU)[0] for _ in range(2)] == ["ours"] * 2
    assert len(calls) == 1


def test_without_a_cache_each_start_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where a directory should be")
    calls = raced(monkeypatch, torch=Measured([0.002]), ours=Measured([], 0.0, "a kernel failed"))
    some = variants(torch=fixed(1), ours=fixed(1))
    assert [choose(some, "auto", ON_GPU)[0] for _ in range(2)] == ["torch"] * 2
    assert len(calls) == 2


def test_where_none_is_possible_it_is_pytorch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced(monkeypatch, torch=Measured([], 0.0, "out of GPU memory"), ours=Measured([], 0.0, "a kernel failed"))
    assert choose(variants(torch=fixed(1), ours=fixed(1)), "auto", ON_GPU)[0] == "torch"
