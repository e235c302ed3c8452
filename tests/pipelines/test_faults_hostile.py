"""Hostile `.beton` files: each is refused with little memory and processor time, and FFCV never sees it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples
from hostile import NUM_SAMPLES, answers, claimed_images, hostile_number, make_set

from sdpnet.pipelines.shards.beton import ALLOCATION_DTYPE, HEADER_DTYPE, METADATA_DTYPE
from sdpnet.preprocess.conversion.writers.beton import METADATA_START, BetonWriter

PAGE_SIZE = 512


def beton_set(folder: Path, content: bytes, size: int | None = None) -> Path:
    """`size`: of a sparse file that begins with `content`."""
    folder.mkdir()
    with (folder / "train.beton").open("wb") as file:
        file.write(content)
        file.truncate(size or len(content))
    make_set(folder, "train.beton", struct.unpack_from("<Q", content, 8)[0] if len(content) >= 16 else 0)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    write_samples(partial(BetonWriter, page_size=PAGE_SIZE), folder, "train", claimed_images())
    return (folder / "train.beton").read_bytes()


def table_of(content: bytes) -> int:
    return struct.unpack_from("<Q", content, 16)[0]


def put(offset: int, format: str, *values: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(format, content, offset, *values)


def in_table(offset: int, format: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(format, content, table_of(content) + offset, value)


def move(sample: int, pointer: int, size: int | None = None) -> Callable[[bytearray], None]:
    """Gives a sample another place, in both tables; below 0: before the table."""

    def change(content: bytearray) -> None:
        entry = table_of(content) + 24 * sample
        place = pointer if pointer >= 0 else table_of(content) + pointer
        struct.pack_into("<Q", content, METADATA_START + 24 * sample + 5, place)
        struct.pack_into("<Q", content, entry + 8, place)
        if size is not None:
            struct.pack_into("<Q", content, entry + 16, size)

    return change


def grown(content: bytearray) -> None:
    """As many samples as a multiplication by 24 that overflows 64 bits makes few of."""
    struct.pack_into("<Q", content, 8, (2**64 + 24 * NUM_SAMPLES) // 24 + 1)


HOSTILE = {
    "2^60 samples": put(8, "<Q", 2**60),
    "2^64 - 1 samples": put(8, "<Q", 2**64 - 1),
    "a count that overflows": grown,
    "one sample more": put(8, "<Q", NUM_SAMPLES + 1),
    "no samples but a table": put(8, "<Q", 0),
    "page 0": put(4, "<I", 0),
    "page 3": put(4, "<I", 3),
    "page 2^32 - 1": put(4, "<I", 2**32 - 1),
    "page 1": put(4, "<I", 1),
    "no fields": put(2, "<H", 0),
    "65535 fields": put(2, "<H", 65_535),
    "unknown field type": put(24, "<B", 255),
    "two labels": put(24, "<B", 1),
    "a field without a name": put(24 + 1041 + 1, "<16B", *[255] * 16),
    "table past the end": put(16, "<Q", 2**62),
    "table at 2^64 - 1": put(16, "<Q", 2**64 - 1),
    "table in the metadata": put(16, "<Q", METADATA_START + 24),
    "table in the header": put(16, "<Q", 8),
    "65535 x 65535 pixels": put(METADATA_START + 1, "<HH", 65_535, 65_535),
    "65535 x 65535 raw pixels": put(METADATA_START, "<BHH", 1, 65_535, 65_535),
    "no pixels": put(METADATA_START + 1, "<HH", 0, 20),
    "unknown mode": put(METADATA_START, "<B", 7),
    "a pointer past the end": move(2, 2**63),
    "a pointer at the end": move(5, -1, 2),
    "a pointer that wraps around": move(0, 2**64 - 8, 16),
    "an image in the header": move(0, 0),
    "an image in the metadata": move(0, METADATA_START),
    "overlapping images": move(1, -PAGE_SIZE, 100),
    "a size of 2^64 - 1": in_table(16, "<Q", 2**64 - 1),
    "a size of 0": in_table(16, "<Q", 0),
    "a sample twice": in_table(0, "<Q", 1),
    "NaNs for pointers": move(3, 0x7FF8_0000_0000_0001),
    "a label of NaN": put(METADATA_START + 16, "<d", float("nan")),
    "all ones": lambda content: content.__setitem__(slice(24, None), b"\xff" * (len(content) - 24)),
    "all ones from the header on": lambda content: content.__setitem__(slice(2, None), b"\xff" * (len(content) - 2)),
    "a header and zeros": lambda content: content.__setitem__(slice(24, None), bytes(len(content) - 24)),
}


def changed(content: bytes, *changes: Callable[[bytearray], None]) -> bytes:
    copy = bytearray(content)
    for change in changes:
        change(copy)
    return bytes(copy)


@pytest.fixture(scope="module")
def hostile(good, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Each hostile file's set, and what opening it said."""
    root = tmp_path_factory.mktemp("hostile")
    sets = {name: beton_set(root / str(i), changed(good, change)) for i, (name, change) in enumerate(HOSTILE.items())}
    return dict(zip(sets, zip(sets.values(), answers(sets.values()), strict=True), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_beton_is_refused(hostile, name):
    assert hostile[name][1].startswith("refused: ")


@pytest.mark.parametrize("name", ["2^60 samples", "65535 x 65535 pixels", "a pointer past the end", "page 0"])
def test_ffcv_does_not_see_it(hostile, name):
    pytest.importorskip("ffcv")
    import torch

    from sdpnet.config.load import load_config
    from sdpnet.pipelines.errors import ShardError
    from sdpnet.pipelines.loader import make_loader
    from sdpnet.pipelines.options import ShardOptions

    folder, answer = hostile[name]
    config = load_config("debug", [f"data.path={folder}", "data.pipeline=ffcv"])
    with pytest.raises(ShardError) as caught:
        make_loader(config.data, config.augment, "train", ShardOptions(), torch.device("cpu"), seed=config.seed)
    assert f"refused: {caught.value}" == answer


@pytest.mark.parametrize("num_samples", [2**30, 2**36])
def test_a_sparse_beton_that_has_room_for_all_it_claims(tmp_path, good, num_samples):
    size = 2**42
    table = size - num_samples * ALLOCATION_DTYPE.itemsize
    header = np.array([(2, 2, 1 << 23, num_samples, table)], HEADER_DTYPE).tobytes()
    fields = good[HEADER_DTYPE.itemsize : METADATA_START]
    metadata = np.zeros(100_000, METADATA_DTYPE)
    metadata["width"] = metadata["height"] = 1
    sets = [beton_set(tmp_path / str(len(rest)), header + fields + rest, size) for rest in (b"", metadata.tobytes())]
    assert [answer.startswith("refused: ") for answer in answers(sets)] == [True, True]


def sound(content: bytes) -> bool:
    """Whether a `.beton` file is one, by a reader that looks at one value after the other."""
    version, num_fields, page, count, table = struct.unpack_from("<HHIQQ", content)
    end = 24 + 2 * 1041 + 24 * count
    if (version, num_fields) != (2, 2) or page not in {1 << bit for bit in range(32)}:
        return False
    if not end <= table or table + 24 * count != len(content):
        return False
    names = [content[at : at + 17] for at in (24, 24 + 1041)]
    if names != [b"\2image" + bytes(11), b"\1label" + bytes(11)]:
        return False
    entries = sorted(struct.unpack_from("<QQQ", content, table + 24 * i) for i in range(count))
    free = end
    if [entry[0] for entry in entries] != list(range(count)):
        return False
    for sample, pointer, size in sorted(entries, key=lambda entry: entry[1]):
        mode, width, height, also, _, label = struct.unpack_from("<BHHQ3sq", content, 24 + 2 * 1041 + 24 * sample)
        pixels = width * height
        if also != pointer or not 0 <= label < 100 or not size or pointer < free or pointer + size > table:
            return False
        if pointer // page != (pointer + size - 1) // page or not pixels or mode > 1:
            return False
        if (mode == 1 and size != 3 * pixels) or (mode == 0 and pixels > 512 * size):
            return False
        free = pointer + size
    return True


def generated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three values of the header or of the tables are others."""
    fields = [
        (0, "<H", 16),
        (2, "<H", 16),
        (4, "<I", 32),
        (8, "<Q", 64),
        (16, "<Q", 64),
        (24, "<B", 8),
        (1065, "<B", 8),
    ]
    for sample in range(NUM_SAMPLES):
        at = METADATA_START + 24 * sample
        fields += [(at, "<B", 8), (at + 1, "<H", 16), (at + 3, "<H", 16), (at + 5, "<Q", 64), (at + 16, "<Q", 64)]
        fields += [(table_of(content) + 24 * sample + place, "<Q", 64) for place in (0, 8, 16)]
    copy = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, format, bits = fields[rng.integers(len(fields))]
        if rng.integers(4) == 0:
            sample = int(rng.integers(NUM_SAMPLES))
            place = hostile_number(rng, 64, table_of(content) - int(rng.integers(600)))
            if table_of(copy) == table_of(content):
                move(sample, place, hostile_number(rng, 64, 100) if rng.integers(2) else None)(copy)
        else:
            struct.pack_into(format, copy, at, hostile_number(rng, bits, struct.unpack_from(format, content, at)[0]))
    return bytes(copy)


@pytest.mark.parametrize("seed", range(5))
def test_generated_betons_are_refused_unless_they_are_sound(good, tmp_path, seed):
    rng = np.random.default_rng(seed)
    contents = [generated(good, rng) for _ in range(400)]
    said = answers([beton_set(tmp_path / str(index), content) for index, content in enumerate(contents)])
    assert [answer.startswith("opened") for answer in said] == [sound(content) for content in contents]
    assert sum(answer.startswith("refused") for answer in said) > 300


def test_a_sound_beton_is_opened(good, tmp_path):
    assert sound(good) and answers([beton_set(tmp_path / "set", good)]) == ["opened, 1410 bytes"]
