"""Training in several processes: exact resume from anywhere, other world sizes, one model as if it were one process."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from pipeline_batches import installed
from trainings import metrics, same_run
from trainings_of_ranks import GLOBAL_BATCH, STEPS, case, in_order, resumed, run

from sdpnet.train import main

PIPELINES = [p for p in ("torchvision", "native", "dali") if installed(p)]

# where a SIGTERM comes, in which process, at which call
STOPS = {
    "mid-accumulation": ["accumulation", 1, 7],  # the first of step 4's two batches
    "an epoch's last step": ["step", 0, 6],
    "during evaluation": ["evaluation", 1, 1],
    "during a save": ["save", 0, 1],
    "during warm-up": ["step", 1, 2],
}


@pytest.mark.parametrize(
    ("pipeline", "world_size"),
    [
        pytest.param(p, n, marks=pytest.mark.slow if (p, n) in (("torchvision", 1), ("dali", 2)) else ())
        for p in PIPELINES
        for n in (1, 2)
    ],
)
def test_stopped_anywhere_and_resumed_it_is_the_same_run(
    pipeline: str, world_size: int, shard_set: Path, tmp_path: Path
) -> None:
    whole = case(shard_set, tmp_path / "whole", world_size, pipeline=pipeline)
    stopped = [
        case(
            shard_set,
            tmp_path / name,
            world_size,
            pipeline=pipeline,
            stop=[stop[0], min(stop[1], world_size - 1), stop[2]],
        )
        for name, stop in STOPS.items()
    ]
    again = [resumed(of) for of in stopped]
    results = run([whole, *stopped, *again], world_size, tmp_path / "scratch")
    order = in_order(results[0], GLOBAL_BATCH // 2)
    assert [rank["status"] for rank in results[0]] == [0] * world_size
    epoch = [sample for step in order[:STEPS] for sample in step]
    assert len(set(epoch)) == len(epoch), "none twice in an epoch"
    for name, first, second in zip(STOPS, results[1:6], results[6:], strict=True):
        assert [rank["status"] for rank in first] == [128 + signal.SIGTERM] * world_size, name
        assert [rank["status"] for rank in second] == [0] * world_size, name
        assert in_order(first, GLOBAL_BATCH // 2) + in_order(second, GLOBAL_BATCH // 2) == order, name
        same_run(tmp_path / "whole", tmp_path / name)


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_other_world_sizes_keep_the_order(sizes: tuple[int, ...], shard_set: Path, tmp_path: Path) -> None:
    """Global batches of 8 in all: the same samples in the same steps after the number of processes has changed."""
    changes = list(itertools.permutations(sizes, 2))

    def at(world_size: int, out: str, stop: Any = None) -> dict[str, Any]:
        settings = ["train.accumulate=1", f"data.batch_size_per_gpu={8 // world_size}"]
        return case(shard_set, tmp_path / out, world_size, *settings, stop=stop)

    first: dict[tuple[int, int], list[list[int]]] = {}
    second: dict[tuple[int, int], list[list[int]]] = {}
    for world_size in sizes:
        mine = [change for change in changes if change[0] == world_size]
        cases = [at(world_size, f"{before}-{after}", ["step", world_size - 1, 2]) for before, after in mine]
        results = run([*cases, *([at(1, "whole")] if world_size == 1 else [])], world_size, tmp_path / "scratch")
        for change, result in zip(mine, results, strict=False):
            assert {rank["status"] for rank in result} == {128 + signal.SIGTERM}
            first[change] = in_order(result, 8)
        if world_size == 1:
            whole = in_order(results[-1], 8)
    for world_size in sizes:
        mine = [change for change in changes if change[1] == world_size]
        cases = [resumed(at(world_size, f"{before}-{after}")) for before, after in mine]
        for change, result in zip(mine, run(cases, world_size, tmp_path / "scratch"), strict=True):
            assert {rank["status"] for rank in result} == {0}
            second[change] = in_order(result, 8)
    assert len(whole) == 6 and all(first[change] + second[change] == whole for change in changes)


def test_two_processes_equal_one_with_the_same_batch(shard_set: Path, tmp_path: Path) -> None:
    """The same losses within float32's rounding when batch norm sees the whole batch, and exact counts."""
    settings = ["train.sync_batch_norm=true", "model.dropout=0", "data.batch_size_per_gpu={}", "train.accumulate=1"]
    settings += ["augment.mix.mixup_alpha=0.8", "augment.mix.cutmix_alpha=1"]

    def alike(name: str, world_size: int) -> dict[str, Any]:
        filled = [setting.format(GLOBAL_BATCH // world_size) for setting in settings]
        return case(shard_set, tmp_path / name, world_size, *filled)

    for name, world_size in (("one", 1), ("two", 2)):
        run([alike(name, world_size)], world_size, tmp_path / "scratch")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 14
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)


def test_another_global_batch_is_refused(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = case(shard_set, tmp_path / "run", 1)["arguments"]
    assert main([*first, "--set", "train.epochs=1", "--set", "optim.warmup_epochs=0"]) == 0
    assert main([*first, "--resume", "--set", "data.batch_size_per_gpu=4"]) == 2
    message = capsys.readouterr().err
    assert "was trained with global_batch_size 4, not 8" in message and message.count("\n") == 1
