from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion import convert_folder, write_manifest, write_samples

from sdpnet.pipelines.shards.beton import (
    ALLOCATION_DTYPE,
    FIELD_DTYPE,
    HEADER_DTYPE,
    METADATA_DTYPE,
    BetonReader,
)
from sdpnet.pipelines.shards.manifest import Manifest, ShardFile, Split, read_manifest
from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE
from sdpnet.preprocess import verify as command
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding.encode import EncodedImage, EncodeSettings, encode_image
from sdpnet.preprocess.verify import Problem, verify

FORMATS = ("beton", "tar")
WRITERS: dict[str, Any] = {
    "beton": partial(BetonWriter, page_size=4096),
    "tar": partial(TarWriter, shard_bytes=8192),
}


@pytest.fixture(params=FORMATS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the shard set, in each format."""
    copy = tmp_path / "shards"
    shutil.copytree(request.getfixturevalue({"beton": "shard_set", "tar": "tar_set"}[request.param]), copy)
    return copy


@pytest.fixture(params=FORMATS)
def blob_set(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two splits with images of the same sizes; small, and the format does not look into the images."""
    rng = np.random.default_rng(0)
    sizes = (100, 700, 3000, 1, 512, 2000, 900)
    splits = {name: [EncodedImage(rng.bytes(size), 10, 20) for size in sizes] for name in ("train", "val")}
    return make_set(tmp_path / "blobs", request.param, splits)


def make_set(directory: Path, format: str, splits: dict[str, list[EncodedImage]]) -> Path:
    """A shard set of any bytes, whose labels are 0, 1, ..."""
    directory.mkdir()
    found = {}
    for name, images in splits.items():
        files = write_samples(WRITERS[format], directory, name, images)
        found[name] = Split(len(images), format, files)
    classes = tuple("abcdefghij")
    manifest = Manifest(source="blobs", classes=classes, encode={}, splits=found, created_by="a test")
    (directory / "manifest.json").write_text(manifest.to_json())
    return directory


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    write_manifest(directory, manifest)


def image_places(directory: Path, split: str) -> list[tuple[Path, int, int]]:
    """The file of each sample of a split and its image's first byte and end there."""
    places = []
    for file in read_manifest(directory).splits[split].files:
        path = directory / file.name
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [member for member in tar if member.name.endswith(".jpg")]
            places += [(path, member.offset_data, member.offset_data + member.size) for member in members]
        else:
            reader, content = BetonReader(path), path.read_bytes()
            for sample in range(reader.num_samples):
                start = content.index(reader.encoded(sample).tobytes())
                places.append((path, start, start + int(reader.nbytes[sample])))
    return places


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def where(problems: list[Problem]) -> list[tuple[str, int | None]]:
    return [(problem.file, problem.sample) for problem in problems]


def shard_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != "manifest.json")


def test_a_sound_set_has_no_problems(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(verify(shards, decode=True, num_workers=2)) == []
    for flags in ([], ["--quick"], ["--decode"]):
        assert command.main([str(shards), *flags]) == 0
        output = capsys.readouterr()
        assert output.err == "" and output.out.count("\n") == 2
        assert output.out.startswith("34 samples in train, val") and "nothing is wrong (structure" in output.out


def test_a_flipped_bit_in_an_image_names_the_sample(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = image_places(shards, "val")
    flip(places[6][0], places[6][1] + 300, 5)
    flip(places[2][0], places[2][2] - 1)
    expected = [(places[sample][0].name, sample) for sample in (2, 6)]
    assert where(list(verify(shards))) == expected
    assert list(verify(shards, quick=True)) == []
    assert command.main([str(shards)]) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[0].startswith(f"{expected[0][0]}: sample 2: its image has changed")
    assert output.err.count("\n") == 2 and "2 problems" in output.out


def test_any_flipped_bit_is_found(blob_set: Path) -> None:
    """In 25 places of each file; of those in an image the sample is named."""
    rng = np.random.default_rng(0)
    places = image_places(blob_set, "train") + image_places(blob_set, "val")
    named = 0
    for path in shard_files(blob_set):
        content = path.read_bytes()
        spread = rng.integers(0, len(content), 15)
        ends = [0, len(content) - 1, *(rng.integers(0, min(len(content), 2400), 8))]
        for position in map(int, [*spread, *ends]):
            flip(path, position, int(rng.integers(8)))
            problems = list(verify(blob_set))
            hit = [i % 7 for i, place in enumerate(places) if place[0] == path and place[1] <= position < place[2]]
            if hit:
                assert where(problems) == [(path.name, hit[0])]
                named += 1
            else:
                assert path.name in {problem.file for problem in problems}, (path, position)
            path.write_bytes(content)
    assert named > 10
    assert list(verify(blob_set)) == []


def test_any_truncated_or_missing_file_is_found(blob_set: Path) -> None:
    for path in shard_files(blob_set):
        content = path.read_bytes()
        for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
            path.write_bytes(content[:length])
            problems = list(verify(blob_set))
            assert path.name in {problem.file for problem in problems}, (path, length)
        path.unlink()
        for quick in (False, True):
            problems = list(verify(blob_set, quick=quick))
            assert where(problems) == [(path.name, None)], (path, quick)
            assert "not there" in problems[0].what or "No such file" in problems[0].what
        path.mkdir()
        assert where(list(verify(blob_set))) == [(path.name, None)]
        path.rmdir()
        path.write_bytes(content + b"\0")
        assert path.name in {problem.file for problem in verify(blob_set)}, path
        path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_swapped_files_are_found(blob_set: Path) -> None:
    """Of the same size and with the same labels, so that only their contents tell."""
    pairs = [(path, path.with_name(path.name.replace("train", "val"))) for path in sorted(blob_set.glob("train*"))]
    pairs = [(train, val) for train, val in pairs if train.suffix != ".idx"]  # which are the same
    for train, val in pairs:
        assert train.stat().st_size == val.stat().st_size
        swap(train, val)
        assert {problem.file for problem in verify(blob_set)} == {train.name, val.name}
        swap(train, val)
    for train, val in pairs:
        swap(train, val)
    assert {problem.file for problem in verify(blob_set)} == {path.name for pair in pairs for path in pair}
    assert list(verify(blob_set, quick=True)) == []  # the structure is that of the other split


def test_each_file_is_judged_by_itself(shards: Path) -> None:
    places = image_places(shards, "val")
    first = shards / read_manifest(shards).splits["train"].files[0].name
    os.truncate(first, first.stat().st_size - 1024)
    flip(places[1][0], places[1][1] + 100)
    table = places[1][0].with_suffix(".crc32" if places[1][0].suffix == ".beton" else ".samples")
    table.unlink()
    problems = list(verify(shards))
    assert where(problems) == [(first.name, None), (table.name, None), (places[1][0].name, None)]
    assert "truncated" in problems[0].what and "SHA-256" in problems[2].what


def test_labels_and_counts_that_the_manifest_does_not_allow(shards: Path) -> None:
    change_manifest(shards, lambda raw: raw.update(classes=["ant", "bee"]))
    for quick in (False, True):
        problems = list(verify(shards, quick=quick))
        assert problems and all("label 2, but there are 2 classes" in problem.what for problem in problems)
        assert {problem.file[:3] for problem in problems} == {"tra", "val"}

    def one_more(raw: dict[str, Any]) -> None:
        raw["classes"] = ["ant", "bee", "cow"]
        raw["splits"]["val"]["num_samples"] += 1
        raw["splits"]["val"]["files"][0]["num_samples"] += 1

    change_manifest(shards, one_more)
    (problem,) = verify(shards, quick=True)
    assert problem.file == read_manifest(shards).splits["val"].files[0].name
    assert "samples, but the manifest says" in problem.what
    change_manifest(shards, lambda raw: raw["splits"]["val"].update(num_samples=10))
    assert command.main([str(shards)]) == 2  # the manifest contradicts itself


@pytest.mark.parametrize(
    ("name", "in_header", "content"), [("000000003.cls", False, b"2"), ("000000003.jpg", True, b"000000003.cls")]
)
def test_labels_in_a_tar(tar_set: Path, tmp_path: Path, name: str, in_header: bool, content: bytes) -> None:
    """Another label, and a second label in the place of an image: a reader of tars would see them, ours would not."""
    copy = tmp_path / "shards"
    shutil.copytree(tar_set, copy)
    for path in copy.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            found = {member.name: member.offset if in_header else member.offset_data for member in tar}
        if name in found:
            break
    with path.open("r+b") as file:
        file.seek(found[name])
        file.write(content)
    (problem,) = verify(copy)
    assert (problem.file, problem.sample) == (path.name, None) and "outside of the images" in problem.what
    assert list(verify(copy, quick=True)) == []


def test_a_manifest_without_the_sidecars(blob_set: Path) -> None:
    expected = {path.name for path in shard_files(blob_set) if path.suffix not in (".tar", ".beton")}

    def forget(raw: dict[str, Any]) -> None:
        for split in raw["splits"].values():
            for file in split["files"]:
                file["sidecars"] = {}

    change_manifest(blob_set, forget)
    for quick in (False, True):
        problems = list(verify(blob_set, quick=quick))
        assert {problem.file for problem in problems} == expected and len(problems) == len(expected)
        assert all("no checksum of it" in problem.what for problem in problems)


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
        assert where(list(verify(tmp_path / "out", quick=True))) == [("quarantine.jsonl", None)]
    listed.unlink()
    assert ["cannot be read" in problem.what for problem in verify(tmp_path / "out")] == [True]
    change_manifest(tmp_path / "out", lambda raw: raw.update(quarantine_sha256=None))
    assert where(list(verify(tmp_path / "out"))) == [("quarantine.jsonl", None)]


def test_a_list_of_bad_images_that_the_manifest_does_not_know(blob_set: Path) -> None:
    (blob_set / "quarantine.jsonl").touch()
    assert where(list(verify(blob_set))) == [("quarantine.jsonl", None)]


def test_what_lies_beside_the_set_is_a_note(blob_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (blob_set / ".unfinished").mkdir()
    (blob_set / "train-000099.tar").touch()
    (blob_set / "README").touch()
    assert command.main([str(blob_set), "--quick"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert [line.split(": ")[:2] for line in output.out.splitlines()[:-2]] == [
        ["note", ".unfinished"],
        ["note", "train-000099.tar"],
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_decode_finds_what_was_damaged_before_it_was_written(format: str, tmp_path: Path) -> None:
    """Checksums vouch for the bytes, not for the image: a set whose manifest was made over damaged images."""
    good = [encode_image(b"P5 64 48 255\n" + bytes([number]) * 64 * 48, EncodeSettings()) for number in range(20)]
    images = list(good)
    images[3] = EncodedImage(good[3].data[:-200], 48, 64)
    images[8] = EncodedImage(b"no image", 48, 64)
    images[15] = EncodedImage(good[15].data, 64, 48)
    shards = make_set(tmp_path / "shards", format, {"train": good[:10], "val": images[:10], "test": images[10:]})
    assert list(verify(shards)) == []
    problems = list(verify(shards, decode=True, num_workers=3))
    assert [(problem.file[:3], problem.sample) for problem in problems] == [("tes", 5), ("val", 3), ("val", 8)]
    assert "48 x 64 pixels, but the shard says 64 x 48" in problems[0].what
    assert "truncated" in problems[1].what.lower() and "not a JPEG file" in problems[2].what


def sparse_beton(path: Path, labels: np.ndarray) -> ShardFile:
    """A valid `.beton` whose images of 1,024 bytes are holes in the file."""
    count = len(labels)
    metadata_start = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize
    data_start = -(-(metadata_start + count * METADATA_DTYPE.itemsize) // 4096) * 4096
    table_start = data_start + 1024 * count
    header, fields = np.zeros(1, HEADER_DTYPE), np.zeros(2, FIELD_DTYPE)
    header[0] = (2, 2, 4096, count, table_start)
    fields["type_id"] = 2, 1
    for field, name in zip(fields, (b"image", b"label"), strict=True):
        field["name"][:5] = np.frombuffer(name, np.uint8)
    metadata, table = np.zeros(count, METADATA_DTYPE), np.zeros(count, ALLOCATION_DTYPE)
    metadata["width"] = metadata["height"] = 500
    metadata["label"] = labels
    metadata["data_ptr"] = table["ptr"] = data_start + 1024 * np.arange(count)
    table["sample_id"], table["size"] = np.arange(count), 1024
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + metadata.tobytes())
        file.seek(table_start)
        file.write(table.tobytes())
    path.with_suffix(".crc32").write_bytes(bytes(4 * count))
    return ShardFile(path.name, count, path.stat().st_size, "", {path.with_suffix(".crc32").name: ""})


def sparse_tar(path: Path, labels: np.ndarray) -> ShardFile:
    """A tar that is all hole, and the `.samples` of images of 1,024 bytes."""
    samples = np.zeros(len(labels), SAMPLE_DTYPE)
    samples["offset"] = 512 + 2560 * np.arange(len(labels))
    samples["size"], samples["label"] = 1024, labels
    samples["width"] = samples["height"] = 500
    path.touch()
    os.truncate(path, 2560 * len(labels) + 1024)
    samples.tofile(path.with_suffix(".samples"))
    path.with_suffix(".idx").touch()
    sidecars = {path.with_suffix(suffix).name: "" for suffix in (".idx", ".samples")}
    return ShardFile(path.name, len(labels), path.stat().st_size, "", sidecars)


@pytest.mark.parametrize(("format", "make"), [("beton", sparse_beton), ("tar", sparse_tar)])
def test_the_structure_of_a_million_samples(format: str, make: Callable[..., ShardFile], tmp_path: Path) -> None:
    labels = np.arange(1_000_000) % 1000
    file = make(tmp_path / f"train.{format}", labels)
    splits = {"train": Split(len(labels), format, (file,))}
    classes = tuple(map(str, range(1000)))
    manifest = Manifest(source="", classes=classes, encode={}, splits=splits, created_by="a test")
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert list(verify(tmp_path, quick=True)) == []
    labels[-1] = 1000
    make(tmp_path / f"train.{format}", labels)
    (problem,) = verify(tmp_path, quick=True)
    assert problem.what == "sample 999999: label 1000, but there are 1000 classes"


def test_exit_status_2(tmp_path: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    for flags in (["--quick", "--decode"], ["--workers", "0"], ["--fast"]):
        with pytest.raises(SystemExit) as caught:
            command.main([str(shard_set), *flags])
        assert caught.value.code == 2
