"""Odd files to adopt: each is refused in one line and leaves nothing, or becomes a set that `verify` passes."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conversion import write_samples
from hostile import claimed_images
from special_files import SPECIAL_FILES

from sdpnet.pipelines.shards.beton import METADATA_DTYPE
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.adopt import main
from sdpnet.preprocess.conversion.writers.beton import METADATA_START, BetonWriter
from sdpnet.preprocess.verify import verify


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two files of six samples each, with the labels 0 to 5, of images in name only."""
    for name in ("a", "b"):
        images = claimed_images()[: 6 if name == "a" else 5]
        write_samples(BetonWriter, tmp_path, name, images)
        (tmp_path / f"{name}.crc32").unlink()
    return {name: tmp_path / f"{name}.beton" for name in ("a", "b")}


def set_label(path: Path, sample: int, label: int) -> None:
    with path.open("r+b") as file:
        file.seek(METADATA_START + sample * METADATA_DTYPE.itemsize + METADATA_DTYPE.fields["label"][1])
        file.write(struct.pack("<q", label))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The one line that refuses these arguments; the folder is as it was."""
    before = sorted(os.listdir(folder))
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said.err and "shard set now" not in said.out
    assert sorted(os.listdir(folder)) == before
    return line


@pytest.mark.parametrize("label", [1_000_000, 10**8, 2**31, 2**62])
def test_a_label_without_measure(files, tmp_path, capsys, label):
    set_label(files["a"], 3, label)
    line = refused(capsys, tmp_path, "--train", files["a"])
    assert f"sample 3: label {label}, so that there would be {label + 1:,} classes" in line


def test_large_labels_that_are_classes(files, tmp_path):
    set_label(files["a"], 3, 999_999)
    assert main(["--train", str(files["a"])]) == 0
    assert list(verify(tmp_path)) == [] and read_manifest(tmp_path).num_classes == 1_000_000


def test_a_negative_label(files, tmp_path, capsys):
    set_label(files["a"], 3, -1)
    assert "labels from -1 to 5, but there are 6 classes" in refused(capsys, tmp_path, "--train", files["a"])


@pytest.mark.parametrize("make", [None, os.link, os.symlink])
def test_one_file_for_both_splits(files, tmp_path, capsys, make):
    other = files["a"]
    if make is not None:
        other = tmp_path / "c.beton"
        make(files["a"], other)
    assert "the same file for two splits" in refused(capsys, tmp_path, "--train", files["a"], "--val", other)


def test_a_copy_for_both_splits(files, tmp_path, capsys):
    (tmp_path / "c.beton").write_bytes(files["a"].read_bytes())
    line = refused(capsys, tmp_path, "--train", files["a"], "--val", tmp_path / "c.beton")
    assert "a.beton and c.beton have the same contents" in line


@pytest.mark.parametrize("name", ["a.ffcv", "a.BETON", "a", ".beton", "a.beton.old"])
def test_other_suffixes(files, tmp_path, capsys, name):
    """Two files of one stem would share their checksums; `verify` and training know a file by its suffix."""
    os.rename(files["b"], tmp_path / name)
    line = refused(capsys, tmp_path, "--train", files["a"], "--val", tmp_path / name)
    assert f"{tmp_path / name}: its name must end in .beton" in line


def test_a_link_lies_where_it_is(files, tmp_path):
    """Not where it leads to: the manifest names it."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "c.beton").symlink_to(files["a"])
    assert main(["--train", str(tmp_path / "links" / "c.beton")]) == 0
    assert list(verify(tmp_path / "links")) == [] and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.crc32", b"somebody's", "exists already and does not belong to a.beton"),
        ("quarantine.jsonl", b"", "would belong to the shard set"),
    ],
)
def test_what_lies_in_the_way(files, tmp_path, capsys, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert reason in refused(capsys, tmp_path, "--train", files["a"])
    assert (tmp_path / name).read_bytes() == content


def test_it_goes_on_after_a_kill(files, tmp_path):
    """The checksums are there already, and the same."""
    assert main(["--train", str(files["a"]), "--val", str(files["b"])]) == 0
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    (tmp_path / "manifest.json").unlink()
    assert main(["--train", str(files["a"]), "--val", str(files["b"])]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert list(verify(tmp_path)) == []


NAMES = ["ant", "bee", "cow", "dog", "eel", "fox"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("ant\nbée\n".encode("latin-1"), "not UTF-8 (line 2: the byte 0xe9); save it as UTF-8"),
        ("\n".join(NAMES).encode("utf-16"), "not UTF-8 (it is UTF-16); save it as UTF-8"),
        (b"ant\n\ncow\n", "line 2: no class name"),
        (b"ant\nb\0ee\n", "line 2: no class name"),
        (b"", "is empty"),
        (b"ant\nbee", "labels from 0 to 5, but there are 2 classes"),
    ],
)
def test_names_that_are_refused(files, tmp_path, capsys, content, reason):
    (tmp_path / "names").write_bytes(content)
    assert reason in refused(capsys, tmp_path, "--train", files["a"], "--classes", tmp_path / "names")


@pytest.mark.parametrize("kind", ["folder", "named pipe", "link to /dev/zero", "sparse terabyte"])
def test_names_that_are_no_file(files, tmp_path, capsys, kind):
    path = tmp_path / "names"
    SPECIAL_FILES[kind](path)
    assert f"--classes {path}: " in refused(capsys, tmp_path, "--train", files["a"], "--classes", path)


def test_names_that_are_not_there(files, tmp_path, capsys):
    path = tmp_path / "names"
    assert f"--classes {path}: " in refused(capsys, tmp_path, "--train", files["a"], "--classes", path)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_from_any_editor(files, tmp_path, ending, encoding):
    (tmp_path / "names").write_bytes((ending.join([*NAMES[:5], "füchse"]) + ending).encode(encoding))
    assert main(["--train", str(files["a"]), "--classes", str(tmp_path / "names")]) == 0
    assert read_manifest(tmp_path).classes == (*NAMES[:5], "füchse")


def test_without_samples(tmp_path, capsys):
    """FFCV writes such files too."""
    path = tmp_path / "a.beton"
    write_samples(BetonWriter, tmp_path, "a", claimed_images()[:1])
    (tmp_path / "a.crc32").unlink()
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[8:16] = 0  # the header's number of samples
    path.write_bytes(content[: len(content) - 24].tobytes())
    assert "has no samples" in refused(capsys, tmp_path, "--train", path)
