"""Hostile index files: each is refused with little memory and processor time, unless it is sound."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from hostile import answers, hostile_number, make_set

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.file import MappedFile
from sdpnet.pipelines.shards.index_file import (
    ANY_TIME,
    CONTAINER_DTYPE,
    FOLDER_DTYPE,
    HEADER_DTYPE,
    SAMPLE_DTYPE,
    Index,
)
from sdpnet.preprocess.adoption.containers import Containers
from sdpnet.preprocess.adoption.write import write_index

HEADER = struct.Struct("<8sIIQQQQ")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the images and of all sets."""
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def good(root: Path) -> bytes:
    """An index of six images: two in a tar, four in files of their own in two folders; with checksums."""
    files = [
        root / "images" / folder / name for folder, name in zip("aabb", ("1.jpg", "22.jpg", "1.jpg", "x"), strict=True)
    ]
    files.append(root / "images" / "all.tar")
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (60 + 70 * number))
    containers = Containers(root / "set")
    for path in files:
        containers.add(str(path))
    status = [path.stat() for path in files]
    sizes, times = (np.array([getattr(s, field) for s in status]) for field in ("st_size", "st_mtime_ns"))
    tables = containers.tables(sizes, times, np.ones(len(files), bool))
    samples = np.zeros(6, SAMPLE_DTYPE)
    samples["container"] = [0, 4, 1, 2, 3, 4]
    samples["size"] = [*sizes[[0]], 100, *sizes[[1, 2, 3]], 200]
    samples["offset"] = [0, 0, 0, 0, 0, 140]
    samples["height"], samples["width"], samples["label"] = 10, 20, np.arange(6)
    (root / "set").mkdir()
    write_index(root / "set" / "train.index", *tables, samples, np.arange(6, dtype=np.uint32))
    return (root / "set" / "train.index").read_bytes()


def index_set(root: Path, number: int, content: bytes, size: int | None = None) -> Path:
    folder = root / f"set{number}"
    folder.mkdir()
    with (folder / "train.index").open("wb") as file:
        file.write(content)
        file.truncate(size or len(content))
    make_set(folder, "train.index", struct.unpack_from("<Q", content, 16)[0] if len(content) >= 24 else 0)
    return folder


def is_sound(content: bytes, root: Path) -> bool:
    """Another reading of the format, one record at a time."""
    if len(content) < HEADER.size:
        return False
    magic, version, flags, num_samples, num_containers, num_folders, names_size = HEADER.unpack_from(content)
    if magic != b"sdpindex" or version != 1 or flags > 1:
        return False
    counts = (8 * num_folders, 32 * num_containers, 24 * num_samples, 4 * num_samples * flags, names_size)
    if HEADER.size + sum(counts) != len(content):
        return False
    places = np.cumsum([HEADER.size, *counts]).tolist()
    folders = [struct.unpack_from("<Q", content, places[0] + 8 * i)[0] for i in range(num_folders)]
    containers = [struct.unpack_from("<qqQII", content, places[1] + 32 * i) for i in range(num_containers)]
    samples = [struct.unpack_from("<QIIHHI", content, places[2] + 24 * i) for i in range(num_samples)]
    names = content[places[4] :]
    starts = [*folders, *(container[2] for container in containers)]
    texts = names.split(b"\0")
    if names and texts.pop() != b"":
        return False
    if len(texts) != len(starts) or starts != [sum(len(t) + 1 for t in texts[:i]) for i in range(len(texts))]:
        return False
    if any(len(text) >= 4096 for text in texts[:num_folders]):
        return False
    for (size, mtime_ns, _, folder, zero), name in zip(containers, texts[num_folders:], strict=True):
        if not 1 <= len(name) <= 255 or b"/" in name or name in (b".", b"..") or folder >= num_folders or zero:
            return False
        try:
            found = os.stat(os.path.normpath(os.path.join(os.fsencode(root), b"set", texts[folder], name)))
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_size != size or mtime_ns not in (ANY_TIME, found.st_mtime_ns):
            return False
    for offset, size, container, height, width, label in samples:
        if container >= num_containers or not size or offset + size > containers[container][0] or label >= 100:
            return False
        if not 0 < height * width <= 512 * size:
            return False
    return {sample[2] for sample in samples} == set(range(num_containers))


def mutated(good: bytes, rng: np.random.Generator) -> bytes:
    """The index with a number in a table, bytes of names, or its end changed."""
    content = bytearray(good)
    num_samples, num_containers, num_folders, _ = struct.unpack_from("<QQQQ", good, 16)
    tables = [(HEADER_DTYPE, 0, 1)]
    for dtype, count in ((FOLDER_DTYPE, num_folders), (CONTAINER_DTYPE, num_containers), (SAMPLE_DTYPE, num_samples)):
        before = tables[-1]
        tables.append((dtype, before[1] + before[0].itemsize * before[2], count))
    names = tables[-1][1] + SAMPLE_DTYPE.itemsize * num_samples + 4 * num_samples
    for _ in range(int(rng.integers(1, 3))):
        kind = int(rng.integers(8))
        if kind == 0:
            place = names + int(rng.integers(max(1, len(content) - names)))
            if place < len(content):
                content[place] = int(rng.choice([0, ord("/"), ord("."), ord("x"), 255]))
        elif kind == 1 and rng.integers(3) == 0:
            return bytes(content[: int(rng.integers(len(content)))])
        elif kind == 2 and rng.integers(3) == 0:
            return bytes(content) + rng.bytes(int(rng.choice([1, 8, 24, 32])))
        else:
            dtype, start, count = tables[int(rng.integers(len(tables)))]
            start += dtype.itemsize * int(rng.integers(count))
            if dtype.names:
                name = str(rng.choice([n for n in dtype.names if n != "magic"]))
                dtype, offset = dtype.fields[name][:2]
                start += offset
            value = int.from_bytes(content[start : start + dtype.itemsize], "little")
            number = hostile_number(rng, 8 * dtype.itemsize, value)
            content[start : start + dtype.itemsize] = number.to_bytes(dtype.itemsize, "little")
    return bytes(content)


def test_the_oracle_passes_the_good_one(good: bytes, root: Path) -> None:
    assert is_sound(good, root)
    assert answers([index_set(root, 0, good)], anywhere=True) == ["opened, 960 bytes"]


@pytest.mark.parametrize("seed", range(4))
def test_generated_indexes_are_refused_unless_they_are_sound(good: bytes, root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contents = [mutated(good, rng) for _ in range(300)]
    folders = [index_set(root, 1000 * (seed + 1) + i, content) for i, content in enumerate(contents)]
    said = answers(folders, anywhere=True)
    assert [answer.startswith("opened") for answer in said] == [is_sound(content, root) for content in contents]
    assert sum(answer.startswith("refused") for answer in said) > 200


@pytest.mark.parametrize("table", ["folders", "containers", "samples", "names"])
def test_a_sparse_index_that_has_room_for_all_it_claims(good: bytes, root: Path, table: str) -> None:
    """With 2^30 records of zeros."""
    header = bytearray(good[: HEADER.size])
    number, size = {"samples": (16, 28), "containers": (24, 32), "folders": (32, 8), "names": (40, 1)}[table]
    old = struct.unpack_from("<Q", header, number)[0]
    struct.pack_into("<Q", header, number, 1 << 30)
    folder = index_set(root, 10 + number, bytes(header), len(good) + ((1 << 30) - old) * size)
    assert answers([folder])[0].startswith(f"refused: {folder}")


def test_an_index_that_is_cut_while_it_is_opened(good: bytes, root: Path) -> None:
    folder = index_set(root, 1, good)
    file = MappedFile(folder / "train.index")
    os.truncate(folder / "train.index", 50)
    with pytest.raises(ShardError, match=r"train\.index: "):
        Index(file)


def test_another_version_says_so(good: bytes, root: Path) -> None:
    content = bytearray(good)
    struct.pack_into("<I", content, 8, 2)
    folder = index_set(root, 2, bytes(content))
    assert "an index of version 2, but this sdpnet reads version 1" in answers([folder])[0]
