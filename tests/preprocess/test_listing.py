from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.files.file_kinds import Skipped
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.listing import Entry, Gathered, gather

CLASSES = ("a", "b", "c")


OTHER = Skipped("other files", "x")


def gathered(*entries: Entry | Skipped, archive: bool = False) -> Gathered:
    return gather(Path("root"), entries, is_archive=archive)


def test_a_location_reads_its_piece_of_a_file(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(range(100)))
    assert Location("x", str(path)).read() == bytes(range(100))
    piece = Location("x", str(path), 10, 5)
    assert piece.read() == bytes(range(10, 15))
    assert Location("x", str(path), 100, 0).read() == b""
    assert pickle.loads(pickle.dumps(piece)) == piece
    assert len(pickle.dumps(piece)) < 300


def test_a_location_names_what_it_cannot_read(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"^image 7: only 4 of its 5 bytes are left; copy .*x.tar again$"):
        Location("image 7", str(path), 96, 5).read()
    with pytest.raises(UserError, match=r"^image 7: cannot be read \(No such file or directory"):
        Location("image 7", str(tmp_path / "y")).read()


def test_order_is_by_class_and_then_by_name():
    rng = np.random.default_rng(0)
    entries = [Entry(CLASSES[rng.integers(3)], f"{number}.jpg", number, 2 * number) for number in range(200)]
    rng.shuffle(entries)
    found = gathered(OTHER, *entries, OTHER, archive=True)
    expected = sorted(tuple(entry) for entry in entries)
    for split in (found.by_folder(CLASSES), found.by_folder(("0", *CLASSES))):
        assert [split.relative_path(index) for index in range(200)] == [f"{e[0]}/{e[1]}" for e in expected]
        assert [split.classes[label] for label in split.labels] == [entry[0] for entry in expected]
        locations = [split.locate(index) for index in range(200)]
        assert [(place.offset, place.size) for place in locations] == [entry[2:] for entry in expected]
        assert {place.path for place in locations} == {"root"}
        assert locations[0].name == f"root: {split.relative_path(0)}"
        assert split.left_out == (LeftOut("other files", 2, "x"),)


def test_labels_in_place_of_folders():
    found = gathered(*(Entry("", name) for name in ("4.jpg", "2.jpg", "3.jpg", "1.jpg")))
    assert found.folders == ("",)
    assert found.file_names() == ["4.jpg", "2.jpg", "3.jpg", "1.jpg"]
    split = found.by_labels(CLASSES, np.array([0, 2, 0, 2], np.int32))
    assert [split.relative_path(index) for index in range(4)] == ["3.jpg", "4.jpg", "1.jpg", "2.jpg"]
    assert split.labels.tolist() == [0, 0, 2, 2]
    assert split.labels.dtype == np.int32
    assert split.locate(0) == Location(str(Path("root/3.jpg")), str(Path("root/3.jpg")))


def test_nothing_at_all():
    found = gathered(OTHER)
    assert found.folders == () and found.left_out == (LeftOut("other files", 1, "x"),)
    split = found.by_folder(())
    assert split.num_images == 0
    with pytest.raises(IndexError):
        split.locate(0)
    assert len(split.fingerprint()) == 64


def test_a_name_that_is_there_twice():
    found = gathered(Entry("b", "1.jpg"), Entry("a", "1.jpg"), Entry("a", "1.jpg"), archive=True)
    with pytest.raises(UserError, match=r"^root: 'a/1\.jpg' is in it twice"):
        found.by_folder(CLASSES)


def test_some_images_of_a_split():
    entries = [Entry(CLASSES[number % 3], f"{number}.jpg", number, 2 * number) for number in range(30)]
    split = gathered(*entries, archive=True).by_folder(CLASSES)
    indices = np.array([0, 7, 8, 29])
    some = split.select(indices)
    assert [some.relative_path(place) for place in range(4)] == [split.relative_path(i) for i in indices.tolist()]
    assert [some.locate(place) for place in range(4)] == [split.locate(index) for index in indices.tolist()]
    assert some.labels.tolist() == split.labels[indices].tolist() and some.left_out == ()
    assert split.select(np.arange(30)).fingerprint() == split.fingerprint() != some.fingerprint()


def test_a_fingerprint_is_of_the_list_of_images():
    entries = [Entry("a", "12.jpg", 512, 9), Entry("b", "3.jpg", 2048, 9)]

    def of(entries: list[Entry], classes: tuple[str, ...] = CLASSES, archive: bool = True, root: str = "root") -> str:
        return gather(Path(root), entries, is_archive=archive).by_folder(classes).fingerprint()

    assert of(entries) == of(entries[::-1]) == of(entries, root="elsewhere")
    others = [
        of(entries, archive=False),
        of(entries, ("a", "b")),
        of(entries, ("a", "b", "d")),
        of(entries[:1]),
        of([entries[0], Entry("c", "3.jpg", 2048, 9)]),
        of([Entry("a", "1.jpg", 512, 9), Entry("b", "32.jpg", 2048, 9)]),
        of([entries[0], Entry("b", "3.jpg", 2049, 9)]),
        of([entries[0], Entry("b", "3.jpg", 2048, 8)]),
    ]
    assert len({of(entries), *others}) == 1 + len(others)


def test_special_files_are_named_and_not_waited_for(tmp_path):
    """They may take the place of an image after it was listed."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name, what in (("pipe", "a named pipe"), ("zeros", "a device"), ("folder", "a folder")):
        with pytest.raises(UserError, match=rf"^x: {what}, not a file; remove it$"):
            Location("x", str(tmp_path / f"{name}.jpg")).read()


def test_files_without_measure_are_not_read(tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    os.truncate(path, 6 << 30)
    with pytest.raises(UserError, match=r"^x: 6,442,450,944 bytes, a sparse file of which [0-9,]+ bytes are on the"):
        Location("x", str(path)).read()
    with pytest.raises(UserError, match=r"^x: 5,000,000,000 bytes.*, more than the 1,100,000,000 of --max-file-mb"):
        Location("x", str(path), 100, 5_000_000_000).read()
    with pytest.raises(UserError, match=r"^x: 3,000,000 bytes, more than the 2,000,000 of --max-file-mb"):
        path.write_bytes(bytes(3_000_000))
        Location("x", str(path)).read(2_000_000)
    path.write_bytes(b"")
    os.truncate(path, 1 << 30)  # within the limit, but no image, as its beginning says
    with pytest.raises(UserError, match=r"^x: nothing but zero bytes"):
        Location("x", str(path)).read()
