"""Archives are written by tarfile; where each image lies is checked against what tarfile extracts."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.archive import archive_entries
from sdpnet.preprocess.sources.scan import Scan, SplitScan, scan

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
BLOCK = tarfile.BLOCKSIZE


def tar_of(
    files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT, directories: Iterable[str] = ()
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name in directories:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tar_with(change: Callable[[tarfile.TarInfo], None], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Three images, the middle one changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for number in range(3):
            entry = tarfile.TarInfo(f"a/{number}.jpg")
            entry.size = 600
            if number == 1:
                change(entry)
            archive.addfile(entry, io.BytesIO(bytes(max(0, entry.size))))
    return buffer.getvalue()


def content_of(name: str) -> bytes:
    """As many bytes as is awkward: none, less than a block, a block, more."""
    number = sum(name.encode())
    return name.encode() * (number % 5 * 16) if number % 7 else bytes(BLOCK)


def read_all(split: SplitScan) -> list[tuple[str, int, bytes]]:
    return [
        (split.relative_path(index), int(split.labels[index]), split.locate(index).read())
        for index in range(split.num_images)
    ]


def same(first: Scan, second: Scan) -> bool:
    assert list(first.splits) == list(second.splits)
    assert first.classes == second.classes
    return all(read_all(first.splits[name]) == read_all(second.splits[name]) for name in first.splits)


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def fails(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(archive_entries(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


LONG = "n" * 90
NESTED = [
    "test_tube/glass/1.jpg",
    "b/2.jpg",
    "b/more/1.jpg",
    "b/more-2/0.jpg",
    "b/more/x/3.jpg",
    "a/deep/1.jpg",
    "c/1.gif",
]
NAMES = ["b/2.jpg", "b/10.JPEG", "a/z.png", "C/größe 漢.jpg", f"a/{LONG}.jpg", f"{LONG}/{LONG}.jpg", "a/0.jpg"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "images/train/"])
def test_an_archive_of_class_folders_is_as_the_folder(tmp_path, format, prefix):
    files = {name: content_of(name) for name in NAMES}
    folder = write_folder(tmp_path / "train", files)
    archive = tmp_path / "train.tar"
    archive.write_bytes(tar_of(((prefix + name, content) for name, content in files.items()), format))
    assert same(scan(None, train=folder), scan(None, train=archive))
    assert same(scan(folder), scan(archive))


@pytest.mark.parametrize("prefix", ["", "./", "images/train/"])
def test_folders_below_class_folders(tmp_path, prefix):
    files = {name: content_of(name) for name in NESTED}
    folder = write_folder(tmp_path / "train", files)
    archive = tmp_path / "train.tar"
    archive.write_bytes(tar_of((prefix + name, content) for name, content in files.items()))
    assert same(scan(folder), scan(archive))
    names = [scan(archive).splits["train"].relative_path(index) for index in range(len(NESTED))]
    assert names == [
        "a/deep/1.jpg",
        "b/2.jpg",
        "b/more/1.jpg",
        "b/more-2/0.jpg",
        "b/more/x/3.jpg",
        "c/1.gif",
        "test_tube/glass/1.jpg",
    ]


def test_the_first_bytes_decide_in_an_archive_too(tmp_path):
    gif = b"GIF89a" + bytes(20)
    archive = tmp_path / "t.tar"
    archive.write_bytes(tar_of([("a/1", gif), ("a/2.jpg?w=100", gif), ("a/3", b"text"), ("b/1.bin", gif)]))
    train = scan(archive).splits["train"]
    assert [train.relative_path(index) for index in range(3)] == ["a/1", "a/2.jpg?w=100", "b/1.bin"]
    assert [(entry.kind, entry.example) for entry in train.left_out] == [
        ("files without a suffix that are no images", "a/3")
    ]
    inner = tar_of([("1", gif), ("2", b"text")])
    archive.write_bytes(tar_of([("a.tar", inner)]))
    assert [name for name, _, _ in read_all(scan(archive).splits["train"])] == ["a/1"]


def test_notes_beside_images_in_class_folders_are_ordinary(tmp_path):
    archive = tmp_path / "train.tar"
    archive.write_bytes(tar_of([("a/1.jpg", b"x"), ("a/1.txt", b"y"), ("b/1.jpg", b"x"), ("b/1.txt", b"y")]))
    assert scan(archive).classes == ("a", "b")


def class_tars(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT, prefix: str = "") -> bytes:
    classes = {name.split("/")[0]: None for name in files}
    inner = {
        name: tar_of(((prefix + key.split("/")[1], files[key]) for key in files if key.startswith(f"{name}/")), format)
        for name in classes
    }
    return tar_of(((f"{name}.tar", content) for name, content in inner.items()), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "n01440764/"])
def test_class_tars_in_a_tar_are_as_the_folder(tmp_path, format, prefix):
    files = {name: content_of(name) for name in NAMES if len(name) < 150}
    folder = write_folder(tmp_path / "train", files)
    archive = tmp_path / "ILSVRC2012_img_train.tar"
    archive.write_bytes(class_tars(files, format, prefix))
    assert same(scan(folder), scan(archive))


def test_a_source_with_the_official_archives(tmp_path):
    names = [f"{name}/{name}_{number}.JPEG" for name in ("n02", "n01") for number in (3, 21)]
    files = {name: content_of(name) for name in names}
    val = {f"ILSVRC2012_val_{number:08}.JPEG": content_of(str(number)) for number in (2, 1, 3)}
    labels = "ILSVRC2012_val_00000001 n02\nILSVRC2012_val_00000002 n01\nILSVRC2012_val_00000003 n02\n"
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(class_tars(files))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val.items()))
    (tmp_path / "val.txt").write_text(labels)
    found = scan(tmp_path)
    assert [name for name, _, _ in read_all(found.splits["train"])] == sorted(files)
    by_class = [(f"ILSVRC2012_val_{number:08}.JPEG", label) for number, label in ((2, 0), (1, 1), (3, 1))]
    assert read_all(found.splits["val"]) == [(name, label, val[name]) for name, label in by_class]
    unpacked = tmp_path / "unpacked"
    write_folder(unpacked / "train", files)
    write_folder(unpacked / "val", val)
    (unpacked / "val.txt").write_text(labels)
    assert same(scan(unpacked), found)
    in_a_folder = tmp_path / "v.tar"
    in_a_folder.write_bytes(tar_of((f"./val/{name}", content) for name, content in val.items()))
    assert same(scan(tmp_path, val=in_a_folder), found)


def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"a/\xff\xfe.jpg")
    folder = write_folder(tmp_path / "t", {name: b"x", "a/\U0001f600.jpg": b"y", "a/\uffee.jpg": b"z"})
    for format in FORMATS:
        archive = tmp_path / "t.tar"
        with tarfile.open(archive, "w", format=format) as file:
            file.add(folder, arcname=".")
        assert same(scan(folder), scan(archive))


def test_other_entries_are_counted(tmp_path):
    archive = tmp_path / "t.tar"
    others = [("a/notes.txt", b"x"), ("a/.hidden.jpg", b"x"), (".git/x.jpg", b"x"), ("a/._1.jpg", b"x"), ("list", b"")]
    archive.write_bytes(tar_of([("a/1.jpg", b"1"), *others], directories=["./", "a", "a/more", ".git"]))
    train = scan(archive).splits["train"]
    assert read_all(train) == [("a/1.jpg", 0, b"1")]
    assert {(entry.kind, entry.count, entry.example) for entry in train.left_out} == {
        (".txt files", 1, "a/notes.txt"),
        ("hidden files", 1, "a/.hidden.jpg"),
        ("files in hidden folders", 1, ".git/x.jpg"),
        ("files of macOS metadata", 1, "a/._1.jpg"),
        ("empty files", 1, "list"),
    }
    archive.write_bytes(tar_of([("a.tar", tar_of([("1.jpg", b"1"), ("notes.txt", b"")])), ("._a.tar", b"x")]))
    left_out = {(entry.kind, entry.example) for entry in scan(archive).splits["train"].left_out}
    assert left_out == {("empty files", "a/notes.txt"), ("files of macOS metadata", "._a.tar")}


def test_entries_without_a_name(tmp_path):
    archive = tmp_path / "t.tar"
    inner = tar_of([(".", b"GIF89a"), ("1.jpg", b"1")])
    for content in (tar_of([(".", b"GIF89a"), ("a/1.jpg", b"1")]), tar_of([("a.tar", inner)])):
        archive.write_bytes(content)
        train = scan(archive).splits["train"]
        assert read_all(train) == [("a/1.jpg", 0, b"1")]
        assert [(entry.kind, entry.count) for entry in train.left_out] == [("entries without a name", 1)]


def test_a_location_names_archive_and_image(tmp_path):
    archive = tmp_path / "t.tar"
    archive.write_bytes(tar_of([("x/a/1.jpg", b"1")]))
    assert scan(archive).splits["train"].locate(0).name == f"{archive}: a/1.jpg"


@pytest.mark.parametrize(
    "name",
    ["../1.jpg", "a/../../1.jpg", "a/..", "/etc/1.jpg", "C:/1.jpg", "c:1.jpg", "a\\1.jpg", "\\\\h\\1.jpg", "a/1\n.jpg"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_names_that_lead_out(tmp_path, name, format):
    content = tar_with(lambda entry: setattr(entry, "name", name), format)
    assert f"{name!r} is not a plain relative name; make the archive again" in fails(tmp_path / "t.tar", content)
    inner = tar_of([("0.tar", tar_of([("1.jpg", b"")])), ("1.tar", content)])
    assert f"{name!r} is not a plain relative name" in fails(tmp_path / "t.tar", inner)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link; make the archive again with tar --dereference"),
        (tarfile.LNKTYPE, "a hard link; make the archive again with tar --hard-dereference"),
        (tarfile.CHRTYPE, "a device; make the archive again without it"),
        (tarfile.BLKTYPE, "a device; make the archive again without it"),
        (tarfile.FIFOTYPE, "a named pipe; make the archive again without it"),
        (b"V", "an entry of the unknown type b'V'; make the archive again without it"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_entries_that_are_no_files(tmp_path, kind, what, format):
    def change(entry: tarfile.TarInfo) -> None:
        entry.type, entry.size, entry.linkname = kind, 0, "a/0.jpg"

    assert fails(tmp_path / "t.tar", tar_with(change, format)) == f": 'a/1.jpg' is {what}"
    inner = tar_of([("c.tar", tar_with(change, format))])
    assert fails(tmp_path / "t.tar", inner) == f": c.tar: 'a/1.jpg' is {what}"


def sparse_gnu() -> bytes:
    """GNU tar's old format: type S, the map in the header."""
    content = bytearray(tar_of([("a/1.jpg", bytes(BLOCK))], tarfile.GNU_FORMAT))
    content[156:157] = b"S"
    content[386:410] = b"00000000000\0" + b"00000001000\0"
    content[483:495] = b"00000001000\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:BLOCK])
    return bytes(content)


def sparse_pax(headers: dict[str, str]) -> bytes:
    return tar_with(lambda entry: setattr(entry, "pax_headers", headers))


@pytest.mark.parametrize(
    "content",
    [
        sparse_gnu(),
        sparse_pax({"GNU.sparse.map": "0,600", "GNU.sparse.size": "600"}),
        sparse_pax({"GNU.sparse.size": "600", "GNU.sparse.numblocks": "0"}),
        sparse_pax({"GNU.sparse.major": "7", "GNU.sparse.minor": "0"}),
    ],
)
def test_sparse_files(tmp_path, content):
    message = fails(tmp_path / "t.tar", content)
    assert message == ": 'a/1.jpg' is a sparse file; make the archive again without tar's --sparse"


def test_images_that_are_there_twice(tmp_path):
    archive = tmp_path / "t.tar"
    for files in (
        [("a/1.jpg", b"1"), ("b/1.jpg", b"1"), ("a/1.jpg", b"2")],
        [("a/1.jpg", b"1"), ("./a//1.jpg", b"2")],
        [("a.tar", tar_of([("1.jpg", b"1"), ("2.jpg", b""), ("x/1.jpg", b"2")]))],
    ):
        archive.write_bytes(tar_of(files))
        with pytest.raises(UserError, match=r"t\.tar: 'a/1\.jpg' is in it twice; make the archive again"):
            scan(archive)
    one = tar_of([("1.jpg", b"1")])
    assert fails(archive, tar_of([("a.tar", one), ("x/a.tar", one)])).startswith(": 'a.tar' and 'x/a.tar' are not in")
    assert "'./a.tar' is in it twice" in fails(archive, tar_of([("a.tar", one), ("./a.tar", one)]))
    archive.write_bytes(tar_of([("1.jpg", b"1"), ("2.jpg", b"2"), ("1.jpg", b"3")]))
    write_folder(tmp_path / "train", {"a/1.jpg": b"", "b/1.jpg": b""})
    (tmp_path / "labels.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"t\.tar: '1\.jpg' is in it twice"):
        scan(tmp_path, val=archive, val_labels=tmp_path / "labels.txt")


@pytest.mark.parametrize(
    "names",
    [
        ("train/a/1.jpg", "val/a/1.jpg"),
        ("a/1.jpg", "2.jpg"),
        ("a/1.jpg", "a/more/2.jpg"),
        ("seg_train/a/1.jpg", "seg_test/2.jpg"),
        ("beaker/1.jpg", "test/a/2.jpg"),
        ("a.tar", "b/2.jpg"),
        ("a.tar", "2.jpg"),
    ],
)
def test_images_in_different_places(tmp_path, names):
    one = tar_of([("1.jpg", b"1")])
    message = fails(tmp_path / "t.tar", tar_of((name, one) for name in names))
    assert message.startswith(f": {names[0]!r} and {names[1]!r} are not in the same place; make one archive for each")


def test_nothing_to_convert(tmp_path):
    archive = tmp_path / "t.tar"
    for files in ([], [("readme.txt", b"x")]):
        archive.write_bytes(tar_of(files))
        with pytest.raises(UserError, match=r"t\.tar: no class folders with images in it; it needs CLASS/image"):
            scan(archive)
    for others, directories in (([], ["./x", "./x/b/"]), ([("x/b/notes.txt", b"")], []), ([("x/b/more/1", b"")], [])):
        message = fails(archive, tar_of([("x/a/1.jpg", b"1"), *others], directories=directories))
        assert message.startswith(": 'x/b' is a class folder without images; make the archive again")
    message = fails(archive, tar_of([("a.tar", tar_of([("x.txt", b"")]))]))
    assert message.startswith(": a.tar: a class without images (1 other files)")
    archive.write_bytes(tar_of([("1.jpg", b"x")]))
    with pytest.raises(UserError, match=r"t\.tar: 1 images, but no class folders"):
        scan(archive)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_archives(tmp_path, mode):
    archive = tmp_path / "t.tar"
    with tarfile.open(archive, f"w:{mode}"):
        pass
    message = fails(archive, archive.read_bytes())
    assert message.startswith(": compressed (") and "; decompress it first" in message


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 5000, tar_of([("a/1.jpg", b"x")])[:511]])
def test_what_is_no_archive(tmp_path, content):
    assert fails(tmp_path / "t.tar", content) == ": not a folder, nor a tar archive"


def small_archives() -> list[bytes]:
    long = [(f"{LONG}/{LONG}.jpg", bytes(700)), ("a/größe.jpg", bytes(range(250))), ("a/2.jpg", bytes(BLOCK))]
    files = {"a/1.jpg": b"x" * 700, "a/2.jpg": b"", "b/1.jpg": b"y" * BLOCK}
    return [*(tar_of(long, format) for format in FORMATS), class_tars(files)]


@pytest.mark.parametrize("content", small_archives())
def test_an_archive_that_is_cut_off_anywhere(tmp_path, content):
    archive = tmp_path / "t.tar"
    archive.write_bytes(content)
    expected = list(archive_entries(archive))
    with tarfile.open(archive) as file:
        *_, last = file
        end = last.offset_data + -(-last.size // BLOCK) * BLOCK + 2 * BLOCK  # the rest is padding
    assert len(expected) == 3 and end <= len(content)
    between = [*range(100, end, 3 * BLOCK), *range(BLOCK + 1, end, 5 * BLOCK), end - 1]
    for length in [*range(0, end, BLOCK), *between]:
        message = fails(archive, content[:length])
        assert "cut off" in message or (length < BLOCK and "nor a tar archive" in message), length
    for length in (end, end + 1, end + BLOCK, len(content)):
        archive.write_bytes(content[:length])
        assert list(archive_entries(archive)) == expected


@pytest.mark.parametrize("content", small_archives())
def test_a_changed_byte_in_any_header(tmp_path, content):
    archive = tmp_path / "t.tar"
    headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    assert len(headers) >= 3
    for header in headers:
        for at in (0, 40, 124, 130, 148, 156, 257, 400):
            changed = bytearray(content)
            changed[header + at] ^= 0x11
            message = fails(archive, bytes(changed))
            assert "damaged at byte" in message or (header == 0 and "nor a tar archive" in message), (header, at)


def test_a_hole_of_zeros_is_no_end(tmp_path):
    content = tar_of([(f"a/{number}.jpg", bytes(BLOCK)) for number in range(4)])
    for start, size in ((2, 1), (2, 2), (2, 4)):
        hole = bytearray(content)
        hole[start * BLOCK : (start + size) * BLOCK] = bytes(size * BLOCK)
        message = fails(tmp_path / "t.tar", bytes(hole))
        assert message.startswith(f": goes on after the end mark at byte {start * BLOCK:,}; the download is incomplete")
    # Space that was reserved for a download looks like padding, but there is too much of it.
    assert "goes on after the end mark" in fails(tmp_path / "t.tar", content[: 2 * BLOCK] + bytes(2 << 20))
    assert "goes on after the end mark" in fails(tmp_path / "t.tar", content * 2)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    entry.pax_headers = pax or {}
    return entry.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "entry",
    [
        header("a/2.jpg", -BLOCK),
        header("a/2.jpg", -(1 << 60)),
        header("a/2.jpg", 1 << 60),
        header("a/2.jpg", BLOCK, pax={"size": "-1024"}),
        header("a/2.jpg", BLOCK, pax={"size": str(1 << 70)}),
        header("long", -BLOCK, tarfile.GNUTYPE_LONGNAME),
        header("long", 1 << 40, tarfile.GNUTYPE_LONGNAME),
        header("pax", 1 << 40, tarfile.XHDTYPE),
        header("pax", 0, tarfile.XGLTYPE) + header("long", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    ],
)
def test_headers_that_ask_for_the_impossible(tmp_path, entry):
    image = header("a/1.jpg", BLOCK) + bytes(BLOCK)
    content = image + entry + image * 4 + bytes(2 * BLOCK)
    message = fails(tmp_path / "t.tar", content)
    assert "damaged" in message or "cut off" in message
    message = fails(tmp_path / "t.tar", tar_of([("a.tar", content)]))
    assert message.startswith(": a.tar: ")
    assert "damaged" in message or "cut off" in message


def test_a_class_tar_ends_where_its_entry_ends(tmp_path):
    """Not where the next header of the outer archive says that something goes on."""
    inner = tar_of([("1.jpg", bytes(BLOCK))])
    content = tar_of([("a.tar", inner[: 2 * BLOCK]), ("b.tar", inner)])
    assert fails(tmp_path / "t.tar", content).startswith(": a.tar: cut off")
    content = tar_of([("a.tar", inner[:BLOCK]), ("b.tar", inner)])
    assert fails(tmp_path / "t.tar", content).startswith(": a.tar: cut off")
