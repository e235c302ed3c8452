from __future__ import annotations

import os
import pickle
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples
from hypothesis import given
from hypothesis import strategies as st

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE, TarReader, validate_tar
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding.encode import EncodedImage

IMAGES = [bytes([65 + index]) * length for index, length in enumerate((100, 512, 250, 1, 513, 40, 3000, 77))]
RECORD = SAMPLE_DTYPE.itemsize


def write(directory: Path, shard_bytes: int) -> list[Path]:
    images = [EncodedImage(data, 10 + index, 20 + index) for index, data in enumerate(IMAGES)]
    files = write_samples(partial(TarWriter, shard_bytes=shard_bytes), directory, "a", images)
    return [directory / file.name for file in files]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The tar of eight samples, and its `.samples`."""
    (tar,) = write(tmp_path_factory.mktemp("good"), 1 << 20)
    return tar.read_bytes(), tar.with_suffix(".samples").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "bad.tar"


def put(scratch: Path, tar: bytes, samples: bytes) -> Path:
    scratch.write_bytes(tar)
    scratch.with_suffix(".samples").write_bytes(samples)
    return scratch


def refuses(path: Path, message: str, at: str = ".samples") -> None:
    with pytest.raises(ShardError, match=message) as caught:
        validate_tar(path)
    assert str(caught.value).startswith(f"{path.with_suffix(at)}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard_bytes", [1 << 20, 8192, 1])
def test_reads_what_was_written_over_any_number_of_tars(tmp_path, shard_bytes):
    tars = write(tmp_path, shard_bytes)
    assert len(tars) == {1 << 20: 1, 8192: 3, 1: len(IMAGES)}[shard_bytes]
    contents = []
    for path in tars:
        with tarfile.open(path) as tar:
            contents += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
    reader = TarReader(tars, tmp_path / "a-*.tar")
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        assert copy.num_samples == len(IMAGES)
        assert [copy.encoded(index).tobytes() for index in range(copy.num_samples)] == contents == IMAGES
        assert [copy.encoded(np.int64(index)).tobytes() for index in (5, 0, 7, 3, 7)] == [
            IMAGES[index] for index in (5, 0, 7, 3, 7)
        ]
        assert copy.labels.tolist() == list(range(len(IMAGES))) and copy.labels.dtype == np.int64
        assert copy.sizes.tolist() == [[10 + index, 20 + index] for index in range(len(IMAGES))]
        assert copy.sizes.dtype == np.int32 and copy.modes.tolist() == [0] * len(IMAGES)
        assert copy.nbytes.tolist() == [len(image) for image in IMAGES]
        assert not copy.encoded(0).flags.writeable
        for index in (-1, len(IMAGES), 2**40):
            with pytest.raises(IndexError):
                copy.encoded(index)


def test_a_pickled_reader_carries_no_image(tmp_path):
    reader = TarReader(write(tmp_path, 8192), tmp_path / "a-*.tar")
    before = len(pickle.dumps(reader))
    for index in range(reader.num_samples):
        reader.encoded(index)
    assert len(pickle.dumps(reader)) == before


def test_a_tar_without_samples_between_others(tmp_path):
    tars = write(tmp_path, 8192)
    empty = put(tmp_path / "empty.tar", bytes(1024), b"")
    reader = TarReader([empty, tars[0], empty, empty, *tars[1:], empty], tmp_path / "a-*.tar")
    assert [reader.encoded(index).tobytes() for index in range(reader.num_samples)] == IMAGES
    assert TarReader([empty], empty).num_samples == TarReader([], empty).num_samples == 0


def test_every_truncation_of_the_tar_is_refused(good, scratch):
    tar, samples = good
    for end in sorted({0, 1, 511, 513, 1023, len(tar) - 1, *range(0, len(tar), 512)}):
        put(scratch, tar[:end], samples)
        with pytest.raises(ShardError, match=r"more samples than|beyond the tar's end|but its 8 samples take"):
            validate_tar(scratch)
    for more in (1, 512, 10_240 - len(tar) % 10_240):
        put(scratch, tar + bytes(more), samples)
        refuses(scratch, f"{len(tar) + more:,} bytes, but its 8 samples take {len(tar):,}", ".tar")


def test_every_truncation_of_the_table_is_refused(good, scratch):
    tar, samples = good
    for end in range(len(samples)):
        put(scratch, tar, samples[:end])
        if end % RECORD:
            refuses(scratch, f"{end} bytes are not a whole number of 24-byte records")
        else:
            refuses(scratch, f"bytes, but its {end // RECORD} samples take", ".tar")
    put(scratch, tar, samples + samples[-RECORD:])
    refuses(scratch, "sample 8: its offset does not match")
    put(scratch, tar, samples * 2)
    refuses(scratch, f"lists more samples than the {len(tar):,} bytes of bad.tar can hold")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 0, "sample 3: its offset does not match"),
        ("offset", 2**64 - 1, "sample 3: its offset does not match"),
        ("size", 0, "sample 3: an image without bytes"),
        ("size", 513, "sample 4: its offset does not match"),
        ("size", 2**32 - 1, "sample 4: its offset does not match"),
        ("height", 0, "sample 3: an image without pixels"),
        ("width", 0, "sample 3: an image without pixels"),
    ],
)
def test_damaged_fields_are_refused(good, scratch, field, value, message):
    tar, samples = good
    table = np.frombuffer(samples, SAMPLE_DTYPE).copy()
    table[field][3] = value
    put(scratch, tar, table.tobytes())
    refuses(scratch, message)


def test_samples_in_another_order_are_refused(good, scratch):
    tar, samples = good
    put(scratch, tar, np.frombuffer(samples, SAMPLE_DTYPE)[::-1].tobytes())
    refuses(scratch, "sample 0: its offset does not match")


def test_not_a_file(good, tmp_path):
    tar, samples = good
    path = tmp_path / "a.tar"
    path.with_suffix(".samples").write_bytes(samples)
    refuses(path, "cannot be read", ".tar")
    path.mkdir()
    refuses(path, "cannot be read", ".tar")
    path.rmdir()
    path.write_bytes(tar)
    path.with_suffix(".samples").unlink()
    refuses(path, "cannot be read")
    path.with_suffix(".samples").mkdir()
    refuses(path, "cannot be read|not a whole number")
    put(tmp_path / "b.tar", b"", b"")
    refuses(tmp_path / "b.tar", "more samples than the 0 bytes")


def test_a_huge_table_beside_a_small_tar_is_not_read(good, scratch):
    tar, samples = good
    put(scratch, tar, samples)
    os.truncate(scratch.with_suffix(".samples"), 24 << 30)
    refuses(scratch, "lists more samples than")


@given(data=st.data())
def test_no_mutation_reads_out_of_bounds(good, scratch, data):
    """A table that is accepted describes images that lie one after the other inside the tar."""
    tar, samples = good
    mutated = bytearray(samples)
    for _ in range(data.draw(st.integers(0, 4))):
        mutated[data.draw(st.integers(0, len(samples) - 1))] = data.draw(st.integers(0, 255))
    table = np.frombuffer(bytes(mutated), SAMPLE_DTYPE).copy()
    if data.draw(st.booleans()):  # a change of sizes gets past the comparison when the places follow it
        table["size"] = data.draw(st.permutations(table["size"].tolist()))
        for _ in range(data.draw(st.integers(0, 2))):
            size = st.one_of(st.integers(0, len(tar)), st.integers(0, 2**32 - 1))
            table["size"][data.draw(st.integers(0, len(table) - 1))] = data.draw(size)
        taken = 1536 + -(-table["size"].astype(np.uint64) // np.uint64(512)) * np.uint64(512)
        table["offset"] = np.cumsum(taken) - taken + np.uint64(512)
    end = data.draw(st.one_of(st.just(len(samples)), st.integers(0, len(samples))))
    put(scratch, tar, table.tobytes()[:end])
    try:
        reader = TarReader([scratch], scratch)
    except ShardError:
        return
    mapped = np.memmap(scratch, np.uint8, mode="r")
    previous = 0
    for index in range(reader.num_samples):
        view = reader.encoded(index)
        assert len(view) == reader.nbytes[index] > 0
        start = int(reader._starts[index])
        assert previous + 512 <= start <= start + len(view) <= len(tar) - 1024
        assert np.array_equal(view, mapped[start : start + len(view)])
        previous = start + len(view)
