"""Damage to a finished shard set: every truncation and every flipped bit is reported, with the file's name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import contents

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.layout import open_file
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.verify import verify

FORMATS = ("beton", "tar")
Region = tuple[str, int, int]  # of a file: first byte, first byte after it


def reported(directory: Path) -> set[str]:
    """The files of which a problem is reported."""
    try:
        return {problem.file for problem in verify(directory)}
    except ShardError as error:
        assert str(directory / "manifest.json") in str(error) and "\n" not in str(error)
        return {"manifest.json"}


def images_of(directory: Path) -> list[Region]:
    """Where the bytes of each image lie."""
    manifest = read_manifest(directory)
    found = []
    for split in manifest.splits.values():
        for file in split.files:
            reader = open_file(directory, manifest, file)
            content = (directory / file.name).read_bytes()
            end = 0
            for sample in range(reader.num_samples):
                image = reader.encoded(sample).tobytes()
                start = content.index(image, end)
                end = start + len(image)
                found.append((file.name, start, end))
    return found


def structure_of(directory: Path) -> list[Region]:
    """The pieces that say something, of every file but the manifest: all between and around the images."""
    manifest, images = read_manifest(directory), images_of(directory)
    found: list[Region] = []
    for split in manifest.splits.values():
        for file in split.files:
            size = file.bytes
            edges = sorted({0, size, *(edge for name, *pair in images if name == file.name for edge in pair)})
            if file.name.endswith(".beton"):
                table = size - 24 * file.num_samples
                edges += [2, 4, 8, 16, 24, 25, 41, 24 + 1041, 25 + 1041, 41 + 1041]
                edges += [24 + 2 * 1041 + 24 * i + field for i in range(file.num_samples) for field in (0, 1, 3, 5, 16)]
                edges += [table + 24 * i + field for i in range(file.num_samples) for field in (0, 8, 16)]
                edges += range(0, size, 2048)
            else:
                edges += range(0, size, 512)
            edges = sorted(set(edges))
            inside = [(file.name, first, last) for first, last in pairwise(edges)]
            found += [piece for piece in inside if not any(same(piece, image) for image in images)]
            for name in file.sidecars:
                content = (directory / name).read_bytes()
                if name.endswith(".idx"):
                    ends = [i + 1 for i, byte in enumerate(content) if byte in b" \n"]
                    found += [(name, first, last) for first, last in pairwise([0, *ends])]
                else:
                    found += [(name, first, first + 4) for first in range(0, len(content), 4)]
    found.append(("quarantine.jsonl", 0, (directory / "quarantine.jsonl").stat().st_size))
    return found


def same(piece: Region, image: Region) -> bool:
    """Whether a piece lies in an image."""
    return piece[0] == image[0] and image[1] <= piece[1] < image[2]


@pytest.fixture
def damaged(tiny_sets, tmp_path, request) -> Iterator[Path]:
    """A copy to damage; in the end it must be whole again."""
    copy = tmp_path / "set"
    shutil.copytree(tiny_sets[request.param], copy)
    yield copy
    assert contents(copy) == contents(tiny_sets[request.param]) and reported(copy) == set()


def flipped(directory: Path, regions: list[Region], seed: int, times: int) -> Iterator[tuple[Region, set[str]]]:
    """Flips a bit at random places of random regions, one at a time, and says what is reported."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        region = regions[rng.integers(len(regions))]
        path = directory / region[0]
        content = path.read_bytes()
        position = int(rng.integers(region[1], region[2]))
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << rng.integers(8)]) + content[position + 1 :]
        )
        yield (region[0], position, position + 1), reported(directory)
        path.write_bytes(content)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("damaged", FORMATS, indirect=True)
def test_a_flipped_bit_of_the_structure(damaged, seed):
    """Headers, tables, padding and the files beside the shards."""
    for place, found in flipped(damaged, structure_of(damaged), seed, 100):
        require_named(place[0], found, place)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("damaged", FORMATS, indirect=True)
def test_a_flipped_bit_of_an_image(damaged, seed):
    images = images_of(damaged)
    for place, found in flipped(damaged, images, 100 + seed, 100):
        assert found == {place[0]}, place


@pytest.mark.parametrize("damaged", FORMATS, indirect=True)
def test_a_flipped_bit_of_an_image_names_the_sample(damaged):
    images = images_of(damaged)
    for image in images:
        path = damaged / image[0]
        content = path.read_bytes()
        path.write_bytes(content[: image[2] - 1] + bytes([content[image[2] - 1] ^ 1]) + content[image[2] :])
        split = image[0].partition("-")[0]
        sample = [other for other in images if other[0].startswith(split)].index(image)
        assert [(problem.file, problem.sample) for problem in verify(damaged)] == [(image[0], sample)]
        path.write_bytes(content)


@pytest.mark.parametrize("damaged", FORMATS, indirect=True)
def test_truncation_at_every_boundary(damaged):
    edges = {(name, edge) for name, *pair in structure_of(damaged) + images_of(damaged) for edge in pair}
    size = (damaged / "manifest.json").stat().st_size
    edges |= {("manifest.json", edge) for edge in (0, 1, size // 2, size - 2, size - 1)}
    assert {name for name, _ in edges} == set(contents(damaged))
    truncated(damaged, edges)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damaged", FORMATS, indirect=True)
def test_truncation_at_random_places(damaged, seed):
    rng = np.random.default_rng(seed)
    sizes = {name: len(content) for name, content in contents(damaged).items()}
    names = [str(name) for name in rng.choice(list(sizes), 50)]
    truncated(damaged, {(name, int(rng.integers(sizes[name]))) for name in names})


def require_named(name: str, found: set[str], place: object) -> None:
    """That file is reported; with the table of a tar, which cannot be read without it, the tar may be too."""
    assert name in found and found <= {name, name.replace(".samples", ".tar")}, place


def truncated(directory: Path, places: set[tuple[str, int]]) -> None:
    for name, end in sorted(places):
        content = (directory / name).read_bytes()
        if end < len(content):
            os.truncate(directory / name, end)
            found = reported(directory)
            (directory / name).write_bytes(content)
            require_named(name, found, (name, end))
