from __future__ import annotations

import hashlib
import io
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples
from ffcv_writer import write_with_ffcv
from PIL import Image

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.shards.beton import MODE_JPEG, MODE_RAW, BetonReader, validate_beton
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.preprocess.conversion.writers.beton import PAGE_SIZE, BetonWriter
from sdpnet.preprocess.conversion.writers.records import Records
from sdpnet.preprocess.encoding.encode import EncodedImage, EncodeSettings, encode_image
from sdpnet.preprocess.workers.result import ImageState

ROOT = Path(__file__).resolve().parents[2]
# FFCV 1.0.2 and what it imports warn about their own code.
ffcv_test = pytest.mark.filterwarnings("ignore")
NEED_FFCV = "FFCV is not installed (it is an optional backend)"


def blobs(*sizes: int) -> list[EncodedImage]:
    return [EncodedImage(bytes([index % 256]) * size, 10 + index % 10, 20) for index, size in enumerate(sizes)]


def write(path: Path, images: list[EncodedImage], page_size: int = PAGE_SIZE) -> str:
    """Writes the images with labels 0, 1, ...; returns the checksum that the writer gives."""
    (shard,) = write_samples(partial(BetonWriter, page_size=page_size), path.parent, path.stem, images)
    assert (shard.name, shard.num_samples, shard.bytes) == (path.name, len(images), path.stat().st_size)
    content, first = path.read_bytes(), shard.hashed_from
    assert not images or first == BetonReader(path)._starts.min()
    assert hashlib.sha256(content[first:] + content[:first]).hexdigest() == shard.sha256 == sha256_of(path, first)
    return shard.sha256


def pictures(count: int, height: int, width: int) -> list[EncodedImage]:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
        images.append(encode_image(buffer.getvalue(), EncodeSettings()))
    return images


def test_round_trip_and_checksum(tmp_path):
    images = blobs(500, 1, 2000, 70)
    checksum = write(tmp_path / "a.beton", images)
    reader = BetonReader(tmp_path / "a.beton")
    assert [reader.encoded(index).tobytes() for index in range(4)] == [image.data for image in images]
    assert reader.labels.tolist() == [0, 1, 2, 3]
    assert reader.sizes.tolist() == [[10, 20], [11, 20], [12, 20], [13, 20]]
    assert set(reader.modes) == {MODE_JPEG}
    content = (tmp_path / "a.beton").read_bytes()
    assert checksum == write(tmp_path / "b.beton", images)
    assert (tmp_path / "b.beton").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.crc32", "b.beton", "b.crc32"]


@pytest.mark.parametrize("sizes", [(512,), (511, 1), (512, 512), (300, 212, 1), (1,) * 600, (300,) * 9])
def test_pages(tmp_path, sizes):
    images = blobs(*[min(size, 512) for size in sizes])[:250]
    write(tmp_path / "a.beton", images, page_size=512)
    metadata, nbytes = validate_beton(tmp_path / "a.beton")
    pages = metadata["data_ptr"] // 512
    assert (pages == (metadata["data_ptr"] + nbytes - 1) // 512).all()
    assert metadata["data_ptr"][0] % 512 == 0
    assert ((tmp_path / "a.beton").stat().st_size - 24 * len(images)) % 512 == 0
    assert (np.diff(metadata["data_ptr"].astype(np.int64)) > 0).all()
    # A page is left only when the next image does not fit.
    for index in np.flatnonzero(np.diff(pages)):
        assert metadata["data_ptr"][index] % 512 + nbytes[index] + nbytes[index + 1] > 512


def test_an_image_larger_than_a_page(tmp_path):
    with BetonWriter(tmp_path, "a", 1, 512) as writer:
        writer.resume([])
        writer.add(bytes(512), 0)
        with pytest.raises(UserError, match=r"^513 bytes once encoded.* 512; convert with a smaller --max-side"):
            writer.add(bytes(513), 0)


def test_announcements_must_be_possible(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        BetonWriter(tmp_path, "a", 0)
    with pytest.raises(ValueError, match="power of two"):
        BetonWriter(tmp_path, "a", 1, 1000)


@pytest.mark.parametrize("kept", range(6))
def test_a_later_writer_goes_on(tmp_path, kept):
    """Whatever lies behind the images that count is dropped."""
    images = blobs(300, 200, 400, 512, 40, 90)
    whole = write_samples(partial(BetonWriter, page_size=512), tmp_path, "whole", images)
    with BetonWriter(tmp_path, "a", 6, 512) as writer:
        writer.resume([])
        for image in [*images[:kept], *blobs(7, 500, 500)]:
            writer.add(image.data, 1)
    records = Records(tmp_path / "a.records", 0, 0)
    for label, image in enumerate(images):
        crc32 = zlib.crc32(image.data)
        records.append((len(image.data), crc32, label, image.height, image.width, ImageState.REENCODED))
    with BetonWriter(tmp_path, "a", 6, 512) as writer:
        writer.resume(len(image.data) for image in images[:kept])
        for label, image in list(enumerate(images))[kept:]:
            writer.add(image.data, label)
        with pytest.raises(ShardError, match="never completed"):
            validate_beton(tmp_path / "a.beton")
        (shard,) = writer.finish(records)
    records.close()
    assert shard.sha256 == whole[0].sha256
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert (tmp_path / "a.crc32").read_bytes() == (tmp_path / "whole.crc32").read_bytes()


def test_a_file_that_does_not_hold_what_is_counted(tmp_path):
    """Not filled up with zeros: the images are gone."""
    for length in (0, 512, 2560 + 299):  # the data begins at byte 2,560
        (tmp_path / "a.beton").write_bytes(bytes(length))
        with (
            BetonWriter(tmp_path, "a", 6, 512) as writer,
            pytest.raises(UserError, match=rf"a\.beton: {length:,} bytes, but the journal .* to start over$"),
        ):
            writer.resume([300])


@ffcv_test
def test_stock_ffcv_reads_what_is_written(tmp_path):
    pytest.importorskip("ffcv", reason=NEED_FFCV)
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader

    images = pictures(40, 96, 130)
    path = tmp_path / "train.beton"
    write(path, images, page_size=1 << 14)  # several pages
    ours = BetonReader(path)

    reader = Reader(str(path))
    assert reader.field_names == ["image", "label"]
    assert reader.num_samples == 40
    manager = OSCacheManager(reader)
    context = manager.schedule_epoch([])
    with context:
        read = manager.compile_reader()
        for index, image in enumerate(images):
            assert read(reader.metadata["f0"]["data_ptr"][index], context.state).tobytes() == image.data
            assert ours.encoded(index).tobytes() == image.data

    for os_cache in (True, False):
        loader = Loader(
            str(path),
            batch_size=16,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=os_cache,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )
        batches = [(pixels.copy(), labels.copy()) for pixels, labels in loader]
        assert np.concatenate([labels for _, labels in batches])[:, 0].tolist() == list(range(40))
        decoded = np.concatenate([pixels for pixels, _ in batches]).astype(np.int64)
        for index, image in enumerate(images):
            difference = np.abs(decoded[index] - np.asarray(Image.open(io.BytesIO(image.data))))
            assert difference.mean() < 1.5  # FFCV decodes with TJFLAG_FASTDCT
            assert difference.max() <= 8


def array(index: int) -> tuple[np.ndarray, int]:
    """A sample for FFCV's writer, of a size of its own, and its label."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((40 + index, 90 - index))), index % 7


@pytest.fixture(scope="module")
def stock_files(tmp_path_factory):
    """The same 30 samples by write mode."""
    pytest.importorskip("ffcv", reason=NEED_FFCV)
    files = {mode: tmp_path_factory.mktemp("ffcv") / f"{mode}.beton" for mode in ("jpg", "raw")}
    write_with_ffcv({path: mode for mode, path in files.items()}, [array(index) for index in range(30)])
    return files


@ffcv_test
@pytest.mark.parametrize(("write_mode", "mode"), [("jpg", MODE_JPEG), ("raw", MODE_RAW)])
def test_reads_what_stock_ffcv_writes(stock_files, write_mode, mode):
    reader = BetonReader(stock_files[write_mode])
    assert reader.num_samples == 30
    assert set(reader.modes) == {mode}
    for index in range(30):
        pixels, label = array(index)
        assert reader.labels[index] == label
        assert tuple(reader.sizes[index]) == pixels.shape[:2]
        if mode == MODE_RAW:
            assert np.array_equal(reader.encoded(index).reshape(pixels.shape), pixels)
        else:
            decoded = np.asarray(Image.open(io.BytesIO(reader.encoded(index).tobytes())), np.int64)
            assert np.abs(decoded - pixels).mean() < 3
