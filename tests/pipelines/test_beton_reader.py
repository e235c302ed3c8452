from __future__ import annotations

import pickle
import struct
from functools import partial
from pathlib import Path

import pytest
from conversion import write_samples
from hypothesis import given
from hypothesis import strategies as st

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.beton import (
    ALLOCATION_DTYPE,
    FIELD_DTYPE,
    METADATA_DTYPE,
    MODE_RAW,
    BetonReader,
    validate_beton,
)
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.encoding.encode import EncodedImage

IMAGES = [bytes([65 + index]) * length for index, length in enumerate((100, 300, 250, 1, 512, 40))]
PAGE_SIZE = 512
METADATA = 24 + 2 * FIELD_DTYPE.itemsize
METADATA_END = METADATA + len(IMAGES) * METADATA_DTYPE.itemsize


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small valid file of six samples, in pages of 512 bytes. The layout does not look into the images."""
    folder = tmp_path_factory.mktemp("layout")
    images = [EncodedImage(data, 10 + index, 20 + index) for index, data in enumerate(IMAGES)]
    write_samples(partial(BetonWriter, page_size=PAGE_SIZE), folder, "good", images)
    return (folder / "good.beton").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout") / "bad.beton"


def table_start(data: bytes) -> int:
    return struct.unpack("<Q", data[16:24])[0]


def put(data: bytes, offset: int, format: str, value: int) -> bytes:
    packed = struct.pack(format, value)
    return data[:offset] + packed + data[offset + len(packed) :]


def put_pointer(data: bytes, sample: int, pointer: int, size: int | None = None) -> bytes:
    """Moves a sample's image in both tables."""
    entry = table_start(data) + sample * ALLOCATION_DTYPE.itemsize
    data = put(data, METADATA + sample * METADATA_DTYPE.itemsize + 5, "<Q", pointer)
    data = put(data, entry + 8, "<Q", pointer)
    return data if size is None else put(data, entry + 16, "<Q", size)


def pointer_of(data: bytes, sample: int) -> int:
    return struct.unpack_from("<Q", data, table_start(data) + sample * ALLOCATION_DTYPE.itemsize + 8)[0]


def refuses(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        validate_beton(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_what_was_written(good, scratch):
    scratch.write_bytes(good)
    reader = BetonReader(scratch)
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        assert [copy.encoded(index).tobytes() for index in range(copy.num_samples)] == IMAGES
        assert copy.labels.tolist() == list(range(6))
        assert copy.sizes.tolist() == [[10 + index, 20 + index] for index in range(6)]
        assert not copy.encoded(0).flags.writeable


def test_every_truncation_is_refused(good, scratch):
    start = table_start(good)
    ends = {0, 1, 2, 4, 8, 16, 23, 24, 24 + FIELD_DTYPE.itemsize, METADATA, METADATA_END - 1, METADATA_END}
    ends |= set(range(PAGE_SIZE * (METADATA_END // PAGE_SIZE), start + 1, PAGE_SIZE))
    ends |= {start - 1, start + 1, start + 24, len(good) - 24, len(good) - 1}
    for end in sorted(ends):
        refuses(scratch, good[:end], "shorter|not fit|allocation table|never completed")


def test_extra_bytes_are_refused(good, scratch):
    refuses(scratch, good + bytes(24), "allocation table has 168 bytes, not 6 entries")


@pytest.mark.parametrize(
    ("offset", "format", "value", "message"),
    [
        (0, "<H", 1, "version field says 1"),
        (0, "<H", 0, "never completed"),
        (2, "<H", 1, "1 fields"),
        (2, "<H", 65_535, "65535 fields"),
        (4, "<I", 0, "page size 0"),
        (4, "<I", 513, "page size 513"),
        (4, "<I", 256, "sample 1: its image crosses a page's end"),
        (8, "<Q", 2**60, "do not fit"),
        (8, "<Q", 2**64 - 1, "do not fit"),
        (8, "<Q", 5, "not 5 entries"),
        (8, "<Q", 7, "not 7 entries"),
        (16, "<Q", 0, "never completed"),
        (16, "<Q", 2**63, "do not fit"),
        (24, "<B", 1, "not image \\(RGBImageField\\)"),
        (24 + FIELD_DTYPE.itemsize, "<B", 3, "not image \\(RGBImageField\\)"),
        (METADATA, "<B", 2, "sample 0: unknown image mode"),
        (METADATA, "<B", 1, "sample 0: a raw image of another size"),
        (METADATA + 24 + 1, "<H", 0, "sample 1: an image without pixels"),
        (METADATA + 24 + 3, "<H", 0, "sample 1: an image without pixels"),
        (METADATA + 5, "<Q", 4096, "sample 0: metadata and allocation table point to different places"),
    ],
)
def test_damaged_fields_are_refused(good, scratch, offset, format, value, message):
    refuses(scratch, put(good, offset, format, value), message)


def test_damaged_allocations_are_refused(good, scratch):
    start = table_start(good)
    first = pointer_of(good, 0)
    refuses(scratch, put(good, start, "<Q", 1), "sample 0: not exactly one entry")
    refuses(scratch, put(good, start, "<Q", 2**64 - 1), "not exactly one entry")
    refuses(scratch, put(good, start + 16, "<Q", 0), "sample 0: impossible size")
    refuses(scratch, put(good, start + 16, "<Q", 2**64 - 1), "sample 0: impossible size")
    refuses(scratch, put_pointer(good, 0, 0), "sample 0: its image lies outside")
    refuses(scratch, put_pointer(good, 0, METADATA_END - 1), "sample 0: its image lies outside")
    refuses(scratch, put_pointer(good, 5, start), "sample 5: its image lies outside")
    refuses(scratch, put_pointer(good, 5, 2**64 - 8), "sample 5: its image lies outside")
    refuses(scratch, put_pointer(good, 5, start - 40, 41), "sample 5: its image lies outside")
    refuses(scratch, put_pointer(good, 1, first + 99), "sample 0: its image overlaps the next one")
    refuses(scratch, put_pointer(good, 1, first), "overlaps")


def test_not_a_file(tmp_path):
    with pytest.raises(ShardError, match=r"gone\.beton: cannot be read"):
        validate_beton(tmp_path / "gone.beton")
    with pytest.raises(ShardError, match="cannot be read"):
        validate_beton(tmp_path)


def structure_offsets(data: bytes) -> st.SearchStrategy[int]:
    """Offsets of bytes that say something: not the fields' arguments, images or padding."""
    start = table_start(data)
    fields = [24, 24 + FIELD_DTYPE.itemsize]
    return st.one_of(
        st.integers(0, 23),
        st.sampled_from(fields),
        st.integers(METADATA, METADATA_END - 1),
        st.integers(start, len(data) - 1),
    )


@given(data=st.data())
def test_no_mutation_reads_out_of_bounds(good, scratch, data):
    mutated = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(structure_offsets(good))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # the same change of a pointer in both tables gets past their comparison
        sample = data.draw(st.integers(0, 5))
        pointer = data.draw(st.one_of(st.integers(0, len(good) + 600), st.integers(0, 2**64 - 1)))
        size = data.draw(st.one_of(st.none(), st.integers(0, 1200), st.integers(0, 2**64 - 1)))
        mutated = (
            bytearray(put_pointer(bytes(mutated), sample, pointer, size)[: len(good)])
            if (table_start(bytes(mutated)) == table_start(good))
            else mutated
        )
    scratch.write_bytes(mutated)
    try:
        reader = BetonReader(scratch)
    except ShardError:
        return
    for index in range(reader.num_samples):
        view = reader.encoded(index)
        assert len(view) == reader.nbytes[index] > 0
        start = int(reader._starts[index])
        assert METADATA_END <= start <= start + len(view) <= table_start(good)
        if reader.modes[index] == MODE_RAW:
            assert len(view) == 3 * reader.sizes[index].prod()
