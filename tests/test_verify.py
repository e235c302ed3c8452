from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conversion import convert_folder, write_manifest

from pipelines.layout import open_split
from preprocess import verify as command
from preprocess.verify import verify


@pytest.fixture
def shards(shard_set: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "shards"
    shutil.copytree(shard_set, copy)
    return copy


def where(shards: Path, split: str, sample: int) -> int:
    """The file offset of a sample's image."""
    _, reader = open_split(shards, split)
    return (shards / f"{split}.beton").read_bytes().index(reader.encoded(sample).tobytes())


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_sound_set_has_no_problems(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(verify(shards, decode=True, num_workers=2)) == []
    for flags in ([], ["--quick"], ["--decode"]):
        assert command.main([str(shards), *flags]) == 0
        assert "34 samples in train, val" in capsys.readouterr().out


def test_a_flipped_bit_in_an_image_names_the_sample(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(shards / "val.beton", where(shards, "val", 6) + 300, 5)
    flip(shards / "val.beton", where(shards, "val", 2) + 400)
    assert [(p.file, p.sample) for p in verify(shards)] == [("val.beton", 2), ("val.beton", 6)]
    assert list(verify(shards, quick=True)) == []
    assert command.main([str(shards)]) == 1
    output = capsys.readouterr()
    assert (
        output.err.splitlines()[0].startswith("val.beton: sample 2: its image has changed")
        and "2 problems" in output.out
    )


def test_any_flipped_bit_of_a_file_is_found(shards: Path) -> None:
    """200 places: in the tables, in images, in padding, and one in the samples' checksums."""
    path = shards / "val.beton"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    images = where(shards, "val", 0) + rng.integers(0, 60_000, 80)
    tables = np.concatenate([rng.integers(0, 2106 + 240, 60), len(content) - 1 - rng.integers(0, 240, 60)])
    for position in [*images.tolist(), *tables.tolist()]:
        flip(path, position, int(rng.integers(8)))
        problems = list(verify(shards))
        assert problems and {p.file for p in problems} == {"val.beton"}, position
        path.write_bytes(content)
    flip(shards / "val.crc32", 5)
    assert [(p.file, p.sample) for p in verify(shards)] == [("val.crc32", None)]


def test_the_list_of_bad_images_is_checked_too(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "in")
    for name in ("a", "b"):
        (tmp_path / "in" / "val" / "bee" / f"{name}.jpg").write_text("no image")
    convert_folder(tmp_path / "in", tmp_path / "out", on_bad="skip")
    listed = tmp_path / "out" / "quarantine.jsonl"
    content = listed.read_bytes()
    assert list(verify(tmp_path / "out")) == []
    for damaged in (content[:-1], content[: len(content) // 2], b"", content.replace(b"a.jpg", b"b.jpg")):
        listed.write_bytes(damaged)
        assert [(p.file, p.sample) for p in verify(tmp_path / "out")] == [("quarantine.jsonl", None)]
    listed.unlink()
    assert ["cannot be read" in p.what for p in verify(tmp_path / "out")] == [True]


def test_each_file_is_judged_by_itself(shards: Path) -> None:
    with (shards / "train.beton").open("r+b") as file:
        file.truncate(9_000_000)
    flip(shards / "val.beton", where(shards, "val", 1) + 100)
    (shards / "val.crc32").unlink()
    problems = [(p.file, p.sample, p.what) for p in verify(shards)]
    assert [p[:2] for p in problems] == [("train.beton", None), ("val.crc32", None), ("val.beton", None)]
    assert "truncated" in problems[0][2] and "cannot be read" in problems[1][2] and "SHA-256" in problems[2][2]


def test_decode_finds_what_was_damaged_before_it_was_written(shards: Path) -> None:
    """Checksums vouch for the bytes, not for the image: a set whose manifest was made over damaged images."""
    import hashlib
    import zlib

    position = where(shards, "val", 3)
    _, reader = open_split(shards, "val")
    with (shards / "val.beton").open("r+b") as file:
        file.seek(position)
        file.write(bytes(len(reader.encoded(3)) // 2))
    content = (shards / "val.beton").read_bytes()
    _, reader = open_split(shards, "val")
    crc = np.array([zlib.crc32(reader.encoded(i).tobytes()) for i in range(10)], "<u4").tobytes()
    (shards / "val.crc32").write_bytes(crc)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["val"]["files"][0].update(
        sha256=hashlib.sha256(content).hexdigest(), sidecars={"val.crc32": hashlib.sha256(crc).hexdigest()}
    )
    write_manifest(shards, manifest)
    assert list(verify(shards)) == []
    assert [(p.file, p.sample) for p in verify(shards, decode=True, num_workers=3)] == [("val.beton", 3)]


def test_no_shard_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "manifest.json").exists()
