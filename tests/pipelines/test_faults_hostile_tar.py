"""Hostile tables beside tars: each is refused with little memory and processor time, unless it is sound."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples
from hostile import NUM_SAMPLES, answers, claimed_images, hostile_number, make_set

from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE
from sdpnet.preprocess.conversion.writers.tar import TarWriter


@pytest.fixture(scope="module")
def tar(tmp_path_factory) -> tuple[bytes, np.ndarray]:
    """A tar, and its `.samples`."""
    folder = tmp_path_factory.mktemp("tar")
    write_samples(TarWriter, folder, "train", claimed_images())
    return (folder / "train-000000.tar").read_bytes(), np.fromfile(folder / "train-000000.samples", SAMPLE_DTYPE)


def tar_set(folder: Path, content: bytes, samples: bytes, num_samples: int | None = None) -> Path:
    folder.mkdir()
    (folder / "train.tar").write_bytes(content)
    (folder / "train.samples").write_bytes(samples)
    make_set(folder, "train.tar", len(samples) // SAMPLE_DTYPE.itemsize if num_samples is None else num_samples)
    return folder


def sound_samples(samples: bytes, tar_size: int) -> bool:
    end = 0
    for offset, size, height, width, label, _ in struct.iter_unpack("<QIHHiI", samples):
        if not size or not 0 < height * width <= 512 * size or offset != end + 512 or not 0 <= label < 100:
            return False
        end += 3 * 512 + -(-size // 512) * 512
    return end + 1024 == tar_size


@pytest.mark.parametrize("seed", range(3))
def test_generated_samples_are_refused_unless_they_are_sound(tar, tmp_path, seed):
    rng = np.random.default_rng(seed)
    content, good = tar
    tables = []
    for _ in range(150):
        samples = good.copy()
        for _ in range(rng.integers(1, 3)):
            name, row = str(rng.choice(SAMPLE_DTYPE.names)), rng.integers(NUM_SAMPLES)
            bits = 8 * SAMPLE_DTYPE[name].itemsize - (name == "label")
            samples[name][row] = hostile_number(rng, bits, int(samples[name][row]))
        kept = rng.integers(NUM_SAMPLES + 1) if rng.integers(5) == 0 else NUM_SAMPLES
        tables.append(samples[:kept].tobytes() + bytes(int(rng.integers(24)) if rng.integers(10) == 0 else 0))
    said = answers([tar_set(tmp_path / str(index), content, table) for index, table in enumerate(tables)])
    whole = [len(table) % SAMPLE_DTYPE.itemsize == 0 and sound_samples(table, len(content)) for table in tables]
    assert [answer.startswith("opened") for answer in said] == whole
    assert sum(answer.startswith("refused") for answer in said) > 75


def test_sparse_samples_that_have_room_for_all_they_claim(tar, tmp_path):
    num_samples = 2**30
    folder = tar_set(tmp_path / "set", *(tar[0], tar[1].tobytes()))
    assert answers([folder]) == ["opened, 1410 bytes"]
    os.truncate(folder / "train.tar", 2**42)
    os.truncate(folder / "train.samples", num_samples * SAMPLE_DTYPE.itemsize)
    make_set(folder, "train.tar", num_samples)
    assert answers([folder])[0].startswith("refused: ")
