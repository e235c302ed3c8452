"""Progressive resolution against numpy's interpolation, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from sdpnet.config.load import load_config
from sdpnet.config.options import ResolutionOptions
from sdpnet.config.resolution import image_size_of
from sdpnet.pipelines.errors import UserError


@pytest.mark.parametrize(("start", "begin", "end", "full", "multiple"), [(160, 5, 35, 224, 32), (96, 0, 7, 224, 16)])
def test_it_is_ffcvs_ramp(start: int, begin: int, end: int, full: int, multiple: int) -> None:
    options = ResolutionOptions(start_size=start, begin_epoch=begin, end_epoch=end, multiple=multiple)
    sizes = [image_size_of(epoch, options, full) for epoch in range(end + 5)]
    for epoch, size in enumerate(sizes):
        assert size == int(np.round(np.interp(epoch, [begin, end], [start, full]) / multiple)) * multiple
    assert sizes[0] == start and sizes[-1] == full and sizes == sorted(sizes)


def test_off_and_a_full_size_that_is_no_multiple() -> None:
    assert image_size_of(0, ResolutionOptions(), 224) == 224
    options = ResolutionOptions(start_size=48, end_epoch=10, multiple=48)
    assert [image_size_of(epoch, options, 80) for epoch in (0, 9, 10)] == [48, 80, 80]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resolution.start_size=40"], r"resolution\.start_size = 40: must be a multiple of the patch size 16"),
        (["resolution.start_size=128"], r"resolution\.start_size = 128: must be at most 64 px"),
        (["resolution.start_size=32", "resolution.multiple=8"], r"resolution\.multiple = 8: must be a multiple"),
        (
            ["resolution.start_size=48"],
            r"resolution\.start_size = 48: must be a multiple of resolution\.multiple \(32\)",
        ),
        (["resolution.end_epoch=0"], r"resolution\.end_epoch = 0: must be above resolution\.begin_epoch \(0\)"),
        (["resolution.start_size=-1"], r"resolution\.start_size = -1: must be 0 \(off\) or more"),
    ],
)
def test_wrong_settings_are_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("debug", settings)
