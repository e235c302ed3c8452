"""Work beside the step: nothing special on a CPU; on a GPU results arrive whole, and nobody waits before he must."""

from __future__ import annotations

import pytest
import torch

from sdpnet.side_stream import SideStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
_SLEEP = 50_000_000  # cycles: 25 ms and more


def test_on_a_cpu_it_is_done_in_turn() -> None:
    side = SideStream(torch.device("cpu"))
    with side():
        made = torch.arange(3)
    side.join(made)
    assert made.tolist() == [0, 1, 2]


@needs_gpu
def test_what_was_made_before_is_complete_there() -> None:
    device = torch.device("cuda")
    torch.cuda._sleep(_SLEEP)
    given = torch.ones(1000, device=device)
    side = SideStream(device)
    with side():
        doubled = given * 2
    side.join(doubled)
    assert doubled.sum().item() == 2000


@needs_gpu
def test_it_runs_beside_the_step_and_its_memory_stays() -> None:
    device = torch.device("cuda")
    side, sums = SideStream(device), []
    for number in range(20):
        torch.cuda._sleep(_SLEEP)  # the step before
        with side():
            batch = torch.full((1 << 20,), float(number), device=device)
            made = torch.cuda.Event()
            made.record()
        made.synchronize()
        assert number or not torch.cuda.current_stream(device).query(), "it has not waited for the step"
        side.join(batch)
        sums.append(batch.sum())
        del batch  # another one of this size may lie there once the sum is there, no sooner
    assert torch.stack(sums).tolist() == [number * float(1 << 20) for number in range(20)]
