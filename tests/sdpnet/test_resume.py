from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_faults import state_of
from equality import equal

from sdpnet.checkpoints.file import write_checkpoint
from sdpnet.checkpoints.resume import load_newest, require_same_order, require_same_step
from sdpnet.distributed.processes import Processes
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

PATH = Path("run/checkpoints/step_00000008.pt")
ORDER = {"seed": 3, "global_batch_size": 1024, "num_samples": 50_000}
WORLD = {"world_size": 8, "batch_size_per_gpu": 128, "accumulate": 1}


def test_the_newest_that_can_be_read_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    lines: list[str] = []
    assert load_newest(tmp_path / "absent", lines.append) is None
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path / f"step_0000000{step}.pt", state_of(step))
    newest = load_newest(tmp_path, lines.append)
    assert newest is not None and newest[0].name == "step_00000004.pt" and lines == []
    content = bytearray((tmp_path / "step_00000004.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "step_00000004.pt").write_bytes(content)
    (tmp_path / "step_00000003.pt").unlink()
    (tmp_path / "step_00000003.pt").mkdir()
    newest = load_newest(tmp_path, lines.append)
    assert newest is not None and newest[0].name == "step_00000002.pt" and equal(newest[1], state_of(2))
    assert [line.split(":")[0].split("/")[-1] for line in lines] == ["step_00000004.pt", "step_00000003.pt"]
    for step in (1, 2):
        (tmp_path / f"step_0000000{step}.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 4 checkpoints can be read"):
        load_newest(tmp_path, lines.append)


def test_another_number_of_processes_is_allowed_and_said() -> None:
    state = {"order": ORDER, "world": WORLD}
    assert require_same_order(PATH, state, ORDER, WORLD) is None
    now = {"world_size": 4, "batch_size_per_gpu": 128, "accumulate": 2}
    line = require_same_order(PATH, state, ORDER, now)
    assert line == "the same global batch of 1024: was 8 processes x 128, now 4 processes x 128 x 2 accumulated"
    line = require_same_order(PATH, state, ORDER, {**WORLD, "world_size": 1, "batch_size_per_gpu": 1024})
    assert line is not None and line.endswith("now 1 process x 1024")
    assert require_same_order(PATH, {"order": ORDER}, ORDER, now) is None  # version 1 did not say


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 5}, "was trained with seed 3, not 5: it cannot be continued exactly$"),
        ({"num_samples": 7}, "with num_samples 50000, not 7: .* exactly; pass the --data .* train.start_from=RUN$"),
        (
            {"global_batch_size": 512},
            "with global_batch_size 1024, not 512: .*; 4 processes need .* train.accumulate = 256$",
        ),
        (
            {"seed": 1, "num_samples": 7},
            "with seed 3, not 1, with num_samples 50000, not 7: .* exactly; pass the --data",
        ),
    ],
)
def test_another_order_is_refused_by_what_changed(changes: dict[str, int], match: str) -> None:
    world: dict[str, Any] = {**WORLD, "world_size": 4}
    with pytest.raises(UserError, match=match):
        require_same_order(PATH, {"order": ORDER, "world": WORLD}, {**ORDER, **changes}, world)


def test_a_batch_that_cannot_be_split_over_the_processes_gets_no_advice() -> None:
    now = {**ORDER, "global_batch_size": 384}
    with pytest.raises(UserError, match=r"not 384: it cannot be continued exactly$"):
        require_same_order(PATH, {"order": ORDER}, now, {**WORLD, "world_size": 3})


def test_checkpoints_that_are_older_than_the_orders_name() -> None:
    blocks = {**ORDER, "data.order": "blocks"}
    assert require_same_order(PATH, {"order": ORDER, "world": WORLD}, blocks, WORLD) is None
    with pytest.raises(UserError, match=r"with data.order random, not blocks"):
        require_same_order(PATH, {"order": {**ORDER, "data.order": "random"}}, blocks, WORLD)


def test_processes_at_different_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Processes(ShardOptions(), torch.device("cpu"))
    require_same_step(7, Path("run"), alone)
    monkeypatch.setattr("sdpnet.checkpoints.resume.max_over_processes", lambda step, processes: 8)
    with pytest.raises(UserError, match="run: not the same checkpoints for all processes"):
        require_same_step(7, Path("run"), alone)
