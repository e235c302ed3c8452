from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sdpnet.reporting.progress_line import ProgressLine

DETAILS = ["1,234 images/s", "loss 6.9078", "lr 1.00e-03", "waiting for data 12%"]


def line(width: int, *, epoch: int = 12, steps: tuple[int, int] = (1234, 5004), encoding: str = "utf-8") -> str:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    progress = ProgressLine(console)
    progress.begin(epoch, *steps)
    progress.show(DETAILS)
    with console.capture() as capture:
        console.print(progress.get_renderable())
    (only,) = capture.get().splitlines()
    assert len(only) <= width
    only.encode(encoding)
    return only


@pytest.mark.parametrize(
    ("width", "shown", "has_bar"),
    [
        (40, [], False),
        (50, ["1,234 images/s"], False),
        (60, ["1,234 images/s", "loss 6.9078"], False),
        (80, ["1,234 images/s", "loss 6.9078"], True),
        (120, DETAILS, True),
        (200, DETAILS, True),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_counter_epoch_and_remaining_time_stay(width: int, shown: list[str], has_bar: bool, encoding: str) -> None:
    text = line(width, encoding=encoding)
    assert "epoch 12 " in text and "1234/5004" in text and "-:--:--" in text
    assert all(detail in text for detail in shown)
    assert bool(re.search("[━-]{2}", text.replace("-:--:--", ""))) == has_bar


def test_a_narrow_terminal_keeps_the_counter() -> None:
    assert line(30) == "epoch 12 1234/5004 -:--:--"
    assert line(20) == "epoch 12 1234/5004" and line(10) == "1234/5004" and line(4) == "1234"


def test_long_numbers_fit_40_columns() -> None:
    text = line(40, epoch=300, steps=(99_999, 100_000))
    assert text.startswith("epoch 300 ") and " 99999/100000 -:--:--" in text


def test_a_new_epoch_begins_its_own_count() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    progress = ProgressLine(console)
    progress.step()  # before an epoch there is nothing to count
    progress.begin(1, 0, 6)
    progress.begin(2, 3, 6)
    progress.step()
    with console.capture() as capture:
        console.print(progress.get_renderable())
    assert "epoch 2 " in capture.get() and "4/6" in capture.get() and "epoch 1" not in capture.get()
