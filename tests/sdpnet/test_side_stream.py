"""Work beside the step: nothing special on a CPU; on a GPU results arrive whole, and nobody waits before he must."""

from __future__ import annotations

import pytest
import torch

from sdpnet.execution.side_stream import SideStream

pytestmark = pytest.mark.gpu

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
    side, sums, size = SideStream(device), [], 1 << 20

    def batch(number: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        with side():
            return torch.full((size,), float(number), device=device), torch.cuda.current_stream(device).record_event()

    kept = [batch(0) for _ in range(3)]  # memory and kernels are there from now on
    torch.cuda.synchronize(device)
    del kept
    for number in range(20):
        torch.cuda._sleep(_SLEEP)  # the step before
        images, made = batch(number)
        made.synchronize()
        assert not torch.cuda.current_stream(device).query(), "it has waited for the step"
        side.join(images)
        sums.append(images.sum())
        del images  # another one of this size may lie there once the sum is there, no sooner
    assert torch.stack(sums).tolist() == [number * float(size) for number in range(20)]
