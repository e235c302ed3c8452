"""`pipelines/native/libjpeg_region.h` against Pillow's decode of the whole image."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from decoder_parts import SAMPLINGS, Refusal, Region, RegionLibrary, boxes, edge_boxes, files
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jpeg_files import decoded, make_image, pillow_jpeg, planes_in_scans, replace_segment, segments
from PIL import Image, JpegImagePlugin

DAMAGED, UNSUPPORTED, TOO_LARGE = 1, 2, 3


def reduced(data: bytes, reduction: int) -> np.ndarray:
    """Pillow's decode at 1/reduction of the size: uint8 (height, width, 3)."""
    image = Image.open(io.BytesIO(data))
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    width, height = image.size
    image._size = (-(-width // reduction), -(-height // reduction))  # what draft() does where it likes
    image.tile = [image.tile[0]._replace(extents=(0, 0, *image._size))]
    image.decoderconfig = (reduction, 0)
    return np.asarray(image.convert("RGB"))


def check_box(region: RegionLibrary, data: bytes, whole: np.ndarray, box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    found = region.decode(data, whole.shape[:2], box)
    assert isinstance(found, Region), found
    assert found.box == (0, 0, height, width)
    assert np.array_equal(found.pixels, whole[top : top + height, left : left + width])


def check_reduced_box(
    region: RegionLibrary,
    data: bytes,
    size: tuple[int, int],
    whole: np.ndarray,
    reduction: int,
    box: tuple[int, int, int, int],
) -> None:
    """`whole`: the reduced image."""
    top, left, height, width = box
    found = region.decode(data, size, box, (height // (2 * reduction), width // (2 * reduction)))
    assert isinstance(found, Region), found
    first_row, first_column = top // reduction, left // reduction
    last_row, last_column = -(-(top + height) // reduction), -(-(left + width) // reduction)
    assert np.array_equal(found.pixels, whole[first_row:last_row, first_column:last_column])
    expected = (top / reduction - first_row, left / reduction - first_column, height / reduction, width / reduction)
    assert found.box == expected


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_row_and_column_of_a_box(region, sampling, progressive):
    for height, width in ((75, 100), (64, 64), (33, 17), (9, 70), (70, 3), (1, 1), (2, 2), (5, 5)):
        data = region.write(make_image(height, height, width), sampling, progressive=progressive, restarts=3)
        whole = decoded(data)
        for box in edge_boxes(height, width):
            check_box(region, data, whole, box)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_boxes_at_the_right_edge(region, sampling):
    """Of images that end with any column of a block: few columns are left of the components of least resolution."""
    for width in range(1, 70):
        data = region.write(make_image(width, 3, width), sampling)
        whole = decoded(data)
        for left in range(max(0, width - 7), width):
            check_box(region, data, whole, (1, left, 2, width - left))


@settings(max_examples=200, deadline=None)
@given(st.data(), files())
def test_any_box(region, data, file):
    encoded = region.write(*file)
    whole = decoded(encoded)
    for _ in range(5):
        check_box(region, encoded, whole, data.draw(boxes(*whole.shape[:2])))


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_row_and_column_of_a_reduced_box(region, sampling, reduction):
    data = region.write(make_image(1, 75, 100), sampling)
    whole, side = reduced(data, reduction), 3 * reduction + 1
    for first in range(75 - side + 1):
        check_reduced_box(region, data, (75, 100), whole, reduction, (first, 0, side, 100))
        check_reduced_box(region, data, (75, 100), whole, reduction, (0, first, 75, side))
        check_reduced_box(region, data, (75, 100), whole, reduction, (0, first, 75, 100 - first))


@settings(max_examples=200, deadline=None)
@given(st.data(), files(), st.sampled_from([2, 4, 8]))
def test_any_reduced_box(region, data, file, reduction):
    encoded, size = region.write(*file), file[0].shape[:2]
    assume(min(size) >= 2 * reduction)
    whole = reduced(encoded, reduction)
    for _ in range(5):
        check_reduced_box(region, encoded, size, whole, reduction, data.draw(boxes(*size, smallest=2 * reduction)))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_box_resizes_to_nearly_the_same(region, reduction):
    """And not at all below four times the output's size."""
    out = 128 // reduction
    size, box = (290, 310), (17, 33, 2 * reduction * out + 9, 2 * reduction * out + 4)
    data = pillow_jpeg(make_image(reduction, *size), quality=90)
    results = []
    for asked in ((out, out), (box[2], box[3])):
        found = region.decode(data, size, box, asked)
        top, left, height, width = found.box
        bounds = (left, top, left + width, top + height)
        image = Image.fromarray(found.pixels).resize((out, out), Image.Resampling.BILINEAR, box=bounds)
        results.append(np.asarray(image, np.float64))
    assert 0 < np.abs(results[0] - results[1]).mean() < 1
    for asked in ((box[2] // 4 + 1, 1), (1, box[3] // 4 + 1)):
        assert region.decode(data, size, box, asked).box == (0, 0, box[2], box[3])


@pytest.mark.parametrize("kept", range(1, 10))
def test_progressive_without_its_last_scans_is_smoothed_as_a_whole(region, kept):
    """With 4:2:0, libjpeg-turbo 2 smooths otherwise than Pillow's 3: there the whole box stands for Pillow."""
    for sampling in ("4:4:4", "4:2:0"):
        data = region.write(make_image(kept, 90, 75), sampling, progressive=True)
        ends = [match.end() for match in re.finditer(rb"\xff\xda.*?(?=\xff[\xc4\xda\xd9])", data, re.DOTALL)]
        assert len(ends) == 10
        cut = data[: ends[kept - 1]] + b"\xff\xd9"
        whole = decoded(cut) if sampling == "4:4:4" else region.decode(cut, (90, 75), (0, 0, 90, 75)).pixels
        assert not np.array_equal(whole, decoded(data))
        for box in ((0, 0, 90, 75), (40, 30, 20, 20), (17, 0, 30, 75), (81, 70, 9, 5)):
            check_box(region, cut, whole, box)


def test_a_scan_for_each_component(region):
    data = planes_in_scans(make_image(1, 60, 50), [1, 2, 3])
    for box in ((0, 0, 60, 50), (40, 30, 20, 20), (17, 0, 30, 50)):
        check_box(region, data, decoded(data), box)
    box = (0, 0, 60, 50)
    assert region.decode(planes_in_scans(make_image(1, 60, 50), [1, 3]), (60, 50), box) == Refusal(
        DAMAGED, "a scan is missing"
    )
    assert region.decode(planes_in_scans(make_image(1, 60, 50), [1, 2] + 600 * [3]), (60, 50), box) == Refusal(
        TOO_LARGE, "more than 500 scans"
    )


def test_what_it_refuses(region):
    pixels, box = make_image(3, 48, 64), (0, 0, 48, 64)
    data = pillow_jpeg(pixels)
    frame = dict(segments(data)[0])[0xC0]
    large = replace_segment(data, 0xC0, 0xC0, frame[:1] + b"\xea\x60\xea\x60" + frame[5:])
    for file, status, message in (
        (pillow_jpeg(pixels, "CMYK"), UNSUPPORTED, "CMYK"),
        (
            replace_segment(data, 0xC0, 0xC0, b"\x0c" + frame[1:]),
            UNSUPPORTED,
            "Unsupported JPEG data precision 12|not 8 bits a sample",
        ),
        (replace_segment(data, 0xC0, 0xC9), UNSUPPORTED, "arithmetic coding"),
        (replace_segment(data, 0xC0, 0xC3), UNSUPPORTED, "Unsupported .*"),
        (large, TOO_LARGE, "3600000000 pixels, the limit is 178956970"),
        (b"", DAMAGED, "Empty input file"),
        (b"\x89PNG\r\n\x1a\n", DAMAGED, "Not a JPEG file: starts with 0x89 0x50"),
        (data[:300], DAMAGED, "truncated: Premature end of JPEG file"),
        (pillow_jpeg(pixels[:47]), DAMAGED, "47 x 64 pixels, but the shard says 48 x 64"),
    ):
        refusal = region.decode(file, (48, 64), box)
        assert isinstance(refusal, Refusal) and refusal.status == status and re.fullmatch(message, refusal.message)
    check_box(region, data, decoded(data), box)


def test_tables_of_another_image_are_not_used(region):
    pixels, box = make_image(3, 48, 64), (0, 0, 48, 64)
    data = pillow_jpeg(pixels, quality=30)
    tables = b"".join(b"\xff\xdb" + (len(b) + 2).to_bytes(2, "big") + b for m, b in segments(data)[0] if m == 0xDB)
    assert tables in data
    check_box(region, data, decoded(data), box)
    refusal = region.decode(data.replace(tables, b""), (48, 64), box)
    assert refusal == Refusal(DAMAGED, "Quantization table 0x00 was not defined")


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
def test_damage_is_seen_down_to_the_last_row_of_the_box(region, sampling):
    """Restart markers out of order, in MCU row 3 of 6."""
    pixels = make_image(3, 96, 64)
    data = region.write(pixels, sampling, restarts=4)
    mcu = 16 if sampling == "4:2:0" else 8
    row = data.index(bytes([0xFF, 0xD0 + (3 * (64 // mcu) // 4 - 1) % 8]), data.index(b"\xff\xda"))
    bad = data[:row] + b"\xff\xd6" + data[row + 2 :]
    assert bad != data
    for top, height in ((0, 96), (3 * mcu + 1, 2), (95, 1), (0, 3 * mcu + 1)):
        refusal = region.decode(bad, (96, 64), (top, 5, height, 9))
        assert isinstance(refusal, Refusal) and refusal.status == DAMAGED and "found marker 0xd6" in refusal.message
    check_box(region, bad, decoded(data), (0, 5, 3 * mcu - 2, 9))


def test_harmless_oddities_are_no_damage(region):
    data = pillow_jpeg(make_image(3, 48, 64))
    whole = decoded(data)
    for odd in (
        data + b"rest of the disk block",
        data.replace(b"\xff\xdb", b"\x00\x00\xff\xdb", 1),
        data.replace(b"JFIF\x00\x01", b"JFIF\x00\x03"),
    ):
        assert odd != data
        check_box(region, odd, whole, (10, 20, 30, 40))


def test_colours_of_pillow(region):
    pixels = make_image(3, 48, 64)
    for data in (pillow_jpeg(pixels, "L"), pillow_jpeg(pixels, keep_rgb=True), pillow_jpeg(pixels, progressive=True)):
        check_box(region, data, decoded(data), (10, 20, 30, 40))
