"""Our decoder of baseline JPEGs, `pipelines/native/baseline.h`, against Pillow's decode of the whole image."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from decoder_parts import CropLibrary, RegionLibrary, boxes, edge_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_files import decoded, joined, make_image, pillow_jpeg, planes_in_scans, replace_segment, segments
from PIL import Image

OURS = ["4:4:4", "4:2:2", "4:2:0", "4:4:0"]  # the samplings that it takes
GREY, YCBCR = 1, 3

Box = tuple[int, int, int, int]


def check_box(crop_library: CropLibrary, data: bytes, whole: np.ndarray, box: Box) -> None:
    top, left, height, width = box
    for avx2 in (True, False):
        found = crop_library.baseline(data, whole.shape[:2], box, avx2)
        assert found is not None
        assert np.array_equal(found, whole[top : top + height, left : left + width])


def mcus_across(width: int, sampling: str) -> int:
    return -(-width // (16 if sampling in ("4:2:2", "4:2:0") else 8))


@st.composite
def regular_files(draw) -> bytes:
    """Baseline JPEGs of all kinds that it takes, with restart markers anywhere."""
    pixels = make_image(draw(st.integers(0, 99)), draw(st.integers(1, 130)), draw(st.integers(1, 130)))
    options = {"quality": draw(st.sampled_from([5, 50, 90, 100])), "optimize": draw(st.booleans())}
    match draw(st.sampled_from(["", "rows", "blocks"])):
        case "rows":
            options["restart_marker_rows"] = draw(st.integers(1, 3))
        case "blocks":
            options["restart_marker_blocks"] = draw(st.integers(1, 30))
    if draw(st.booleans()):
        return pillow_jpeg(pixels, "L", **options)
    return pillow_jpeg(pixels, subsampling=draw(st.integers(0, 2)), **options)


@settings(max_examples=300, deadline=None)
@given(st.data(), regular_files())
def test_any_box(crop_library, data, file):
    whole = decoded(file)
    for _ in range(5):
        check_box(crop_library, file, whole, data.draw(boxes(*whole.shape[:2])))


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.sampled_from(OURS),
    st.sampled_from([GREY, YCBCR, YCBCR, YCBCR]),
    st.integers(0, 40),
    st.integers(1, 100),
    st.integers(1, 100),
)
def test_any_sampling_and_interval(crop_library, region: RegionLibrary, data, sampling, colours, interval, h, w):
    file = region.write(make_image(h, h, w), sampling, colours, restarts=interval)
    whole = decoded(file)
    for _ in range(5):
        check_box(crop_library, file, whole, data.draw(boxes(h, w)))


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("sampling", OURS)
def test_every_row_and_column(crop_library, region, sampling, rows):
    for height, width in ((75, 100), (64, 64), (33, 17), (9, 70), (70, 3), (1, 1), (2, 2), (5, 5)):
        interval = rows * mcus_across(width, sampling)
        data = region.write(make_image(height, height, width), sampling, restarts=interval)
        whole = decoded(data)
        for box in edge_boxes(height, width):
            check_box(crop_library, data, whole, box)


def test_noise_and_flat_images(crop_library):
    """Many coefficients in each block, the last one among them; and none."""
    noise = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    stripes = np.zeros((70, 90, 3), np.uint8)
    stripes[::2, ::2] = 255
    for pixels in (noise, stripes, np.zeros_like(noise), np.full_like(noise, 255)):
        for quality in (1, 50, 95, 100):
            for subsampling in (0, 1, 2):
                data = pillow_jpeg(pixels, quality=quality, subsampling=subsampling)
                check_box(crop_library, data, decoded(data), (3, 5, 60, 80))
                check_box(crop_library, data, decoded(data), (40, 70, 30, 20))


def test_images_of_very_different_size_one_after_another(crop_library):
    for height, width in ((300, 400), (1, 1), (20, 700), (700, 20), (300, 400)):
        data = pillow_jpeg(make_image(height, height, width), restart_marker_rows=1)
        check_box(crop_library, data, decoded(data), (0, 0, height, width))
        check_box(crop_library, data, decoded(data), (height // 2, width // 2, 1, 1))


def test_what_is_left_to_libjpeg(crop_library, region):
    pixels, box = make_image(3, 48, 64), (0, 0, 48, 64)
    data = pillow_jpeg(pixels, subsampling=0)
    header, rest = segments(data)
    frame, scan = dict(header)[0xC0], dict(header)[0xDA]
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe\0\x64\0\0\0\0\x00"
    others = {
        "progressive": pillow_jpeg(pixels, progressive=True),
        "RGB": pillow_jpeg(pixels, keep_rgb=True),
        "CMYK": pillow_jpeg(pixels, "CMYK"),
        "Adobe": data[:2] + adobe + data[2:],
        "three scans": planes_in_scans(pixels, [1, 2, 3]),
        "12 bits": replace_segment(data, 0xC0, 0xC0, b"\x0c" + frame[1:]),
        "extended": replace_segment(data, 0xC0, 0xC1),
        "arithmetic": replace_segment(data, 0xC0, 0xC9),
        "part of the coefficients": replace_segment(data, 0xDA, 0xDA, scan[:-3] + b"\x00\x3e\x00"),
        "no tables": data.replace(b"\xff\xdb", b"\xff\xfe"),
        "another size": pillow_jpeg(pixels[:47]),
        "60,000 x 60,000": replace_segment(data, 0xC0, 0xC0, frame[:1] + b"\xea\x60\xea\x60" + frame[5:]),
        "garbage before a marker": data.replace(b"\xff\xdb", b"\x00\x00\xff\xdb", 1),
        "empty": b"",
        "PNG": b"\x89PNG\r\n\x1a\n" + 100 * b"\0",
    }
    others |= {name: region.write(pixels, name) for name in ("4:1:1", "3x1", "all 2x1", "more chroma")}
    others |= {f"cut at {end}": data[:end] for end in range(len(data) - len(rest), len(data) - 1, 7)}
    for name, file in others.items():
        for avx2 in (True, False):
            assert crop_library.baseline(file, (48, 64), box, avx2) is None, name
    check_box(crop_library, data, decoded(data), box)


def test_damage_where_it_reads_is_left_to_libjpeg(crop_library):
    """Restart markers missing, doubled or out of order."""
    pixels = make_image(3, 96, 64)
    data = pillow_jpeg(pixels, restart_marker_rows=1, subsampling=2)
    whole = decoded(data)
    at = [data.index(bytes([0xFF, 0xD0 + i]), len(data) - len(segments(data)[1])) for i in range(5)]
    swapped = bytearray(data)
    swapped[at[1] + 1], swapped[at[2] + 1] = swapped[at[2] + 1], swapped[at[1] + 1]
    for file in (
        bytes(swapped),
        data[: at[1]] + data[at[1] + 2 :],
        data[: at[1]] + data[at[1] : at[1] + 2] + data[at[1] :],
        data[: at[1]] + data[at[2] :],
    ):
        for box in ((0, 0, 96, 64), (33, 0, 10, 64), (80, 10, 5, 5)):
            assert crop_library.baseline(file, (96, 64), box) is None
        check_box(crop_library, file, whole, (0, 0, 15, 64))  # before the damage
    zeros = data[: at[1]] + b"\x00\x00" + data[at[1] :]
    assert crop_library.baseline(zeros, (96, 64), (0, 0, 96, 64)) is None
    check_box(crop_library, zeros, whole, (33, 0, 10, 64))  # beyond the damage, whose row it does not read


def test_tables_of_another_image_are_not_used(crop_library):
    pixels, box = make_image(3, 48, 64), (0, 0, 48, 64)
    data = pillow_jpeg(pixels, quality=30)
    check_box(crop_library, data, decoded(data), box)
    for marker in (0xDB, 0xC4):
        tables = [b for m, b in segments(data)[0] if m == marker]
        without = data
        for body in tables:
            without = without.replace(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body, b"")
        assert len(without) < len(data)
        assert crop_library.baseline(without, (48, 64), box) is None


def test_comments_and_metadata_are_passed_over(crop_library):
    pixels = make_image(3, 48, 64)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, comment=b"\xff\xd8\xff\xda", icc_profile=300 * b"\xff\xc0")
    check_box(crop_library, buffer.getvalue(), decoded(buffer.getvalue()), (10, 20, 30, 40))


def impossible(rng: np.random.Generator, quantizer: int) -> bytes:
    """A file whose coefficients times its quantizers are far beyond what any image has."""
    pixels = rng.integers(0, 2, (40, 48, 3), np.uint8) * np.uint8(255)
    data = pillow_jpeg(pixels, quality=100, subsampling=int(rng.integers(3)))
    tables = b"".join(bytes([number]) + bytes([quantizer]) * 64 for number in range(2))
    found, rest = segments(data)
    return joined([(0xDB, tables)] + [segment for segment in found if segment[0] != 0xDB], rest)


@pytest.mark.parametrize("quantizer", [2, 17, 40, 100, 255])
def test_impossible_coefficients_have_one_result(crop_library, quantizer):
    """Where sums overflow, the plain code does what the vector instructions do."""
    rng = np.random.default_rng(quantizer)
    for _ in range(20):
        data = impossible(rng, quantizer)
        vectors, plain = (crop_library.baseline(data, (40, 48), (0, 0, 40, 48), avx2) for avx2 in (True, False))
        assert vectors is not None and np.array_equal(vectors, plain)
