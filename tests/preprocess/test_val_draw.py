from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.listing import Entry, SplitScan, gather
from sdpnet.preprocess.sources.val_draw import ValDraw, draw_val

COUNTS = {"a": 200, "b": 40, "c": 7, "d": 1}


def split_of(counts: dict[str, int], order: int = 0, without: str = "") -> SplitScan:
    names = [(name, f"{number}.jpg") for name, count in counts.items() for number in range(count)]
    names = [pair for pair in names if "/".join(pair) != without]
    np.random.default_rng(order).shuffle(names)
    return gather(Path("root"), [Entry(*pair) for pair in names]).by_folder(sorted(counts))


def names(split: SplitScan) -> list[str]:
    return [split.relative_path(index) for index in range(split.num_images)]


def by_class(split: SplitScan) -> list[int]:
    return np.bincount(split.labels, minlength=len(split.classes)).tolist()


def test_every_image_is_in_one_of_both_splits():
    whole = split_of(COUNTS)
    train, val = draw_val(whole, ValDraw(0.1))
    assert sorted(names(train) + names(val)) == sorted(names(whole))
    assert names(train) == [name for name in names(whole) if name not in set(names(val))]
    assert by_class(val)[:2] == [20, 4] and by_class(val)[2] in (0, 1) and by_class(val)[3] == 0
    for split in (train, val):
        assert [split.classes[label] for label in split.labels] == [name.split("/")[0] for name in names(split)]
    assert train.classes == val.classes == whole.classes


def test_the_draw_depends_on_seed_and_names_alone():
    drawn = [names(draw_val(split_of(COUNTS, order), ValDraw(0.1, 3))[1]) for order in (1, 2)]
    assert drawn[0] == drawn[1]
    others = [names(draw_val(split_of(COUNTS), ValDraw(0.1, seed))[1]) for seed in range(5)]
    assert len({tuple(other) for other in others}) == 5
    more = {"a": 200, "b": 40, "c": 7, "d": 1, "e": 30}  # another class changes nothing in these
    assert [name for name in names(draw_val(split_of(more), ValDraw(0.1, 3))[1]) if name[0] != "e"] == drawn[0]


def test_an_image_more_or_less_changes_the_draw_by_one_at_most():
    drawn = set(names(draw_val(split_of(COUNTS), ValDraw(0.1))[1]))
    for number in range(0, 200, 9):
        other = set(names(draw_val(split_of(COUNTS, without=f"a/{number}.jpg"), ValDraw(0.1))[1]))
        assert len(drawn - other) <= 1 and len(other - drawn) <= 1


def test_shares_are_right_on_average():
    counts = {f"{number:03}": 7 for number in range(300)}
    _, val = draw_val(split_of(counts), ValDraw(0.05))
    assert val.num_images == pytest.approx(0.05 * 7 * 300, rel=0.25)
    assert set(by_class(val)) == {0, 1}
    assert len({name.split("/")[1] for name in names(val)}) == 7  # not always the same file


def test_a_large_share_leaves_an_image_of_each_class():
    train, _ = draw_val(split_of(COUNTS), ValDraw(0.999))
    assert by_class(train) == [1, 1, 1, 1]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 5.0, float("nan"), float("inf")])
def test_a_share_out_of_range(share):
    with pytest.raises(UserError, match=r"--val-share .*: must be above 0 and below 1"):
        ValDraw(share)


def test_a_seed_out_of_range_and_a_draw_of_nothing():
    for seed in (-1, 1 << 64):
        with pytest.raises(UserError, match="--val-seed"):
            ValDraw(0.1, seed)
    with pytest.raises(UserError, match=r"--val-share 0\.5: draws none of 2 images; give a larger share"):
        draw_val(split_of({"a": 1, "b": 1}), ValDraw(0.5))
