from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import ShardFile
from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE
from sdpnet.preprocess.conversion.writers import tar as tar_shards
from sdpnet.preprocess.conversion.writers.records import Records
from sdpnet.preprocess.conversion.writers.tar import SHARD_BYTES, TarWriter
from sdpnet.preprocess.encoding.encode import EncodedImage
from sdpnet.preprocess.workers.result import ImageState

SIZES = (1, 511, 512, 513, 5000, 40, 1024, 3, 2048, 600, 700, 800)
SMALL = 8192  # bytes a tar: several tars from SIZES


def blobs(*sizes: int) -> list[EncodedImage]:
    rng = np.random.default_rng(5)
    return [EncodedImage(rng.bytes(size), 10 + index, 20 + 3 * index) for index, size in enumerate(sizes)]


def write(
    directory: Path, images: list[EncodedImage], shard_bytes: int = SMALL, split: str = "a"
) -> tuple[ShardFile, ...]:
    """Writes the images with labels 0, 1, ..."""
    return write_samples(partial(TarWriter, shard_bytes=shard_bytes), directory, split, images)


def members(tars: Iterable[Path]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """What Python's tarfile finds in several tars, in order."""
    found = []
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found.append((member, content.read()))
    return found


def content(directory: Path, split: str = "a") -> dict[str, bytes]:
    """The files of a split, by what follows the split's name."""
    return {path.name.removeprefix(split): path.read_bytes() for path in sorted(directory.glob(f"{split}-*"))}


def test_tarfile_reads_what_is_written(tmp_path):
    images = blobs(*SIZES)
    files = write(tmp_path, images)
    assert len(files) > 3 and files[0].name == "a-000000.tar" and files[-1].name == f"a-{len(files) - 1:06}.tar"
    found = members(tmp_path / file.name for file in files)
    expected = []
    for index, image in enumerate(images):
        expected += [(f"{index:09}.jpg", image.data), (f"{index:09}.cls", str(index).encode())]
    assert [(member.name, data) for member, data in found] == expected
    for member, _ in found:
        owner = (member.uid, member.gid, member.uname, member.gname)
        assert (owner, member.mtime, member.mode, member.isreg()) == ((0, 0, "", ""), 0, 0o644, True)


def test_what_the_manifest_says_of_each_tar(tmp_path):
    images = blobs(*SIZES)
    files = write(tmp_path, images)
    names = set()
    for file in files:
        whole = (tmp_path / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert file.num_samples * 2 == len(members([tmp_path / file.name]))
        stem = file.name.removesuffix(".tar")
        assert set(file.sidecars) == {f"{stem}.idx", f"{stem}.samples"}
        for name, sha256 in file.sidecars.items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha256
        names |= {file.name, *file.sidecars}
    assert set(os.listdir(tmp_path)) == names
    assert sum(file.num_samples for file in files) == len(images)


def test_each_sample_is_found_through_the_table(tmp_path):
    images = blobs(*SIZES)
    label = 0
    for file in write(tmp_path, images):
        whole = (tmp_path / file.name).read_bytes()
        for sample in np.fromfile((tmp_path / file.name).with_suffix(".samples"), SAMPLE_DTYPE):
            image = images[label]
            assert whole[sample["offset"] : sample["offset"] + sample["size"]] == image.data
            assert sample["crc32"] == zlib.crc32(image.data) and sample["label"] == label
            assert (sample["height"], sample["width"]) == (image.height, image.width)
            label += 1
    assert label == len(images)


def test_a_tar_ends_only_when_the_next_sample_does_not_fit(tmp_path):
    files = write(tmp_path, blobs(*SIZES, 3 * SMALL, 1))
    parts = [members([tmp_path / file.name]) for file in files]
    for file, part in zip(files, parts, strict=True):
        whole = (tmp_path / file.name).read_bytes()
        assert whole.endswith(bytes(1024)) and len(whole) % 512 == 0
        last, _ = part[-1]
        assert len(whole) == last.offset_data + 512 + 1024
        assert len(whole) <= SMALL or len(part) == 2  # a sample that fits nowhere has a tar to itself
    assert any(file.bytes > SMALL for file in files)
    for file, following in zip(files, parts[1:], strict=False):
        needed = following[1][0].offset_data + 512  # to the end of the next sample's label
        assert file.bytes + needed > SMALL


def test_the_limit_itself_is_filled(tmp_path):
    images = blobs(512, 512)  # each takes 2,048 bytes, the end 1,024
    assert [file.bytes for file in write(tmp_path, images, 5120, "fits")] == [5120]
    assert [file.bytes for file in write(tmp_path, images, 5119, "not")] == [3072, 3072]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    one, two = write(tmp_path, blobs(*SIZES), split="one"), write(tmp_path, blobs(*SIZES), split="two")
    assert [file.sha256 for file in one] == [file.sha256 for file in two]
    assert content(tmp_path, "one") == content(tmp_path, "two")


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
def test_gnu_tar_reads_what_is_written(tmp_path):
    images = blobs(*SIZES)
    listed = []
    for file in write(tmp_path, images):
        listing = ["tar", "--list", "--verbose", "--numeric-owner", "--utc", "--file", tmp_path / file.name]
        done = subprocess.run(listing, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
        assert done.stderr == ""
        listed += [line.split() for line in done.stdout.splitlines()]
        extraction = ["tar", "--extract", "--directory", tmp_path, "--file", tmp_path / file.name]
        assert subprocess.run(extraction, capture_output=True, text=True, check=True).stderr == ""
    assert [(line[0], line[1], int(line[2]), line[-1]) for line in listed] == [
        ("-rw-r--r--", "0/0", size, f"{index:09}.{suffix}")
        for index, image in enumerate(images)
        for suffix, size in (("jpg", len(image.data)), ("cls", len(str(index))))
    ]
    for index, image in enumerate(images):
        assert (tmp_path / f"{index:09}.jpg").read_bytes() == image.data
        assert (tmp_path / f"{index:09}.cls").read_text() == str(index)


def test_the_index_is_what_dali_makes(tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed (it is an optional backend)")
    for file in write(tmp_path, blobs(*SIZES)):
        creator = wds2idx.IndexCreator(str(tmp_path / file.name), str(tmp_path / "theirs"), verbose=False)
        with creator:
            creator.create_index()
        assert (tmp_path / file.name).with_suffix(".idx").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bad_images_have_no_sample_and_labels_are_kept(tmp_path):
    images = blobs(600, 700, 800, 900)
    labels = (0, 999, 21840, 2**31 - 1)
    records = Records(tmp_path / "a.records", 0, 0)
    with TarWriter(tmp_path, "a", 6, SMALL) as writer:
        writer.resume([])
        for image, label in zip(images, labels, strict=True):
            records.append((0, 0, label, 0, 0, ImageState.BAD))
            writer.add(image.data, label)
            crc32 = zlib.crc32(image.data)
            records.append((len(image.data), crc32, label, image.height, image.width, ImageState.REENCODED))
        files = writer.finish(records)
    records.close()
    assert [file.num_samples for file in files] == [2, 2]
    found = members(tmp_path / file.name for file in files)
    assert [data for _, data in found[::2]] == [image.data for image in images]
    assert [int(data) for _, data in found[1::2]] == list(labels)
    tables = [np.fromfile((tmp_path / file.name).with_suffix(".samples"), SAMPLE_DTYPE) for file in files]
    assert np.concatenate(tables)["label"].tolist() == list(labels)


@pytest.mark.parametrize("kept", range(len(SIZES) + 1))
def test_a_later_writer_goes_on(tmp_path, kept):
    """Whatever lies behind the images that count is dropped: images, whole tars, and a `finish` cut short."""
    images = blobs(*SIZES)
    whole = write(tmp_path, images, split="whole")
    with TarWriter(tmp_path, "a", len(SIZES), SMALL) as writer:
        writer.resume([])
        for label, image in enumerate([*images[:kept], *blobs(7, 5000, 5000, 5000, 70)]):
            writer.add(image.data, label)
    (tmp_path / "a-000000.idx").write_text("v1.2 77\n")
    (tmp_path / "a-000009.samples").write_bytes(bytes(24))
    records = Records(tmp_path / "a.records", 0, 0)
    for label, image in enumerate(images):
        crc32 = zlib.crc32(image.data)
        records.append((len(image.data), crc32, label, image.height, image.width, ImageState.REENCODED))
    with TarWriter(tmp_path, "a", len(SIZES), SMALL) as writer:
        writer.resume(len(image.data) for image in images[:kept])
        for label, image in list(enumerate(images))[kept:]:
            writer.add(image.data, label)
        files = writer.finish(records)
    records.close()
    assert [file.sha256 for file in files] == [file.sha256 for file in whole]
    assert content(tmp_path) == content(tmp_path, "whole")


def test_files_that_do_not_hold_what_is_counted(tmp_path):
    """Not filled up with zeros: the images are gone."""
    images = blobs(*SIZES)
    files = write(tmp_path, images)
    sizes = [len(image.data) for image in images]
    for damaged in (files[0].name, files[-1].name):
        for length in (0, 700, (tmp_path / damaged).stat().st_size - 1025):
            copy = tmp_path / f"{damaged}{length}"
            copy.mkdir()
            for file in files:
                shutil.copy(tmp_path / file.name, copy)
            os.truncate(copy / damaged, length)
            with (
                TarWriter(copy, "a", len(SIZES), SMALL) as writer,
                pytest.raises(UserError, match=rf"{damaged}: {length:,} bytes, but the journal .* to start over$"),
            ):
                writer.resume(sizes)
    os.unlink(tmp_path / files[1].name)
    with TarWriter(tmp_path, "a", len(SIZES), SMALL) as writer, pytest.raises(UserError, match=files[1].name):
        writer.resume(sizes)


def test_ctrl_c_between_two_tars(tmp_path, monkeypatch):
    """What was added until then can still be brought to the disk, and a later writer goes on."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    images = blobs(5000, 5000)
    with TarWriter(tmp_path, "a", 2, SMALL) as writer:
        writer.resume([])
        writer.add(images[0].data, 0)
        with monkeypatch.context() as patch:
            patch.setattr(tar_shards.os, "open", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.add(images[1].data, 1)
        writer.sync()
    with TarWriter(tmp_path, "a", 2, SMALL) as writer:
        writer.resume([5000])
        writer.add(images[1].data, 1)
    write(tmp_path, images, split="whole")
    assert (tmp_path / "a-000000.tar").read_bytes() == (tmp_path / "whole-000000.tar").read_bytes()


def test_an_image_larger_than_a_member_may_be(tmp_path):
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with TarWriter(tmp_path, "a", 1, SHARD_BYTES) as writer:
        writer.resume([])
        with pytest.raises(UserError, match=r"^4,294,967,296 bytes once encoded; convert with a smaller --max-side"):
            writer.add(Huge(), 0)
