from __future__ import annotations

import zlib

import pytest
from special_files import SPECIAL_FILES

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import ShardFile, Split
from sdpnet.preprocess.conversion.journal import (
    JOURNAL_NAME,
    BadImage,
    Begun,
    Commit,
    Finished,
    Journal,
    Published,
    finished_split,
    is_published,
    last_commit,
    quarantined,
    read_journal,
)
from sdpnet.preprocess.conversion.writers.records import Records
from sdpnet.preprocess.workers.result import ImageState

ENTRIES = [
    Begun({"source": "S", "num_images": {"train": 3}}, output={"format": "beton"}, origin={"x": None}),
    Commit("train", 2, 7),
    Commit("train", 3, 9, (BadImage(2, 'ä\n"q" 漢.jpg', "empty (0 bytes)"),)),
]
MORE = Published(("train.crc32", "train.beton"))
# As the first version with dicts as entries wrote them, each with the entry that it is.
SHARD = ShardFile("train.beton", 2, 9, "ab", {"train.crc32": "cd"}, 4)
WRITTEN_BEFORE = {
    b'73771940 {"conversion": {"num_images": {"train": 3}, "source": "S"}, "origin": {"x": null}, '
    b'"output": {"format": "beton"}}\n': ENTRIES[0],
    b'34c3118d {"bad": [], "count": 2, "crc32": 7, "split": "train"}\n': ENTRIES[1],
    b'8769d9d6 {"bad": [{"file": "\\u00e4\\n\\"q\\" \\u6f22.jpg", "index": 2, "reason": "empty (0 bytes)"}], '
    b'"count": 3, "crc32": 9, "split": "train"}\n': ENTRIES[2],
    b'7d67b0fe {"finished": {"files": [{"bytes": 9, "hashed_from": 4, "name": "train.beton", "num_samples": 2, '
    b'"sha256": "ab", "sidecars": {"train.crc32": "cd"}}], "format": "beton", "num_kept": 1, "num_quarantined": 1, '
    b'"num_samples": 2}, "split": "train"}\n': Finished("train", Split(2, "beton", (SHARD,), 1, 1)),
    b'e1ee7ce9 {"published": ["train.crc32", "train.beton"]}\n': MORE,
    b'91f77c1c {"conversion": {"source": "S"}, "part": "part-1-of-2"}\n': Begun({"source": "S"}, part="part-1-of-2"),
}


@pytest.fixture
def written(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in ENTRIES:
        journal.append(entry)
    journal.close()
    return tmp_path / "journal.jsonl"


def test_what_was_appended_is_read_again(written):
    assert read_journal(written) == (ENTRIES, written.stat().st_size)
    journal = Journal(written)
    assert journal.entries == ENTRIES
    journal.append(MORE)
    journal.close()
    assert read_journal(written)[0] == [*ENTRIES, MORE]
    assert read_journal(written.with_name("none")) == ([], 0)


def test_journals_of_before_are_read_and_written_to_the_byte(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(WRITTEN_BEFORE))
    entries, end = read_journal(path)
    assert entries == list(WRITTEN_BEFORE.values()) and end == path.stat().st_size
    journal = Journal(tmp_path / "new.jsonl")
    for entry in entries:
        journal.append(entry)
    journal.close()
    assert (tmp_path / "new.jsonl").read_bytes() == path.read_bytes()
    assert last_commit(entries, "train") == ENTRIES[2] and last_commit(entries, "val") == Commit("val", 0, 0)
    assert finished_split(entries, "train").num_samples == 2 and finished_split(entries, "val") is None
    assert is_published(entries) and not is_published(ENTRIES)
    assert quarantined(entries, "train") == {2: ENTRIES[2].bad[0]} and quarantined(entries, "val") == {}


def test_the_numbers_of_states_in_records():
    assert {state.name: int(state) for state in ImageState} == {"REENCODED": 1, "KEPT": 2, "BAD": 3}


def test_a_journal_cut_off_anywhere_keeps_its_whole_lines(written):
    content = written.read_bytes()
    ends = [0] + [index + 1 for index, byte in enumerate(content) if byte == 0x0A]
    for length in range(len(content) + 1):
        written.write_bytes(content[:length])
        journal = Journal(written)
        whole = sum(end <= length for end in ends) - 1
        assert journal.entries == ENTRIES[:whole]
        journal.append(Commit("after", length, 0))
        journal.close()
        assert read_journal(written)[0] == [*ENTRIES[:whole], Commit("after", length, 0)]


def test_a_flipped_bit_ends_what_counts(written):
    content = written.read_bytes()
    first = content.index(b"\n") + 1
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        written.write_bytes(damaged)
        entries, _ = read_journal(written)
        assert entries == ENTRIES[: len(entries)]
        assert len(entries) < 3 and (len(entries) == 0) == (position < first)


RECORDS = [
    (100, 7, 3, 10, 20, ImageState.REENCODED),
    (0, 0, 1, 0, 0, ImageState.BAD),
    (2**32 - 1, 2**32 - 1, 0, 65_500, 1, ImageState.REENCODED),
]


def test_records(tmp_path):
    records = Records(tmp_path / "r", 0, 0)
    assert list(records.pieces()) == []
    states = []
    for record in RECORDS:
        records.append(record)
        states.append(records.done)
    records.close()
    for keep in (3, 2, 1):  # what lies behind the ones that count is dropped
        records = Records(tmp_path / "r", *states[keep - 1])
        assert [tuple(record) for piece in records.pieces(2) for record in piece.tolist()] == RECORDS[:keep]
        records.close()


def test_records_that_are_not_as_the_journal_says(tmp_path):
    records = Records(tmp_path / "r", 0, 0)
    for record in RECORDS:
        records.append(record)
    count, crc32 = records.done
    records.close()
    content = (tmp_path / "r").read_bytes()
    for damaged in (content[:-1], content[:5] + b"x" + content[6:], b""):
        (tmp_path / "r").write_bytes(damaged)
        with pytest.raises(UserError, match="does not match the journal beside it; remove"):
            Records(tmp_path / "r", count, crc32)


NOT_OURS = {
    "no object": b"[1]",
    "deep": b"[" * 200_000,
    "another object": b'{"a": 1}',
    "a commit without its count": b'{"split": "train"}',
    "a bad image without its name": b'{"split": "train", "count": 1, "crc32": 1, "bad": [{"index": 0}]}',
    "a split without files": b'{"split": "train", "finished": {}}',
}


@pytest.mark.parametrize("kind", ["named pipe", "link to /dev/zero", "folder", "sparse terabyte", *NOT_OURS])
def test_what_no_conversion_has_written(tmp_path, kind):
    path = tmp_path / JOURNAL_NAME
    if kind in SPECIAL_FILES:
        SPECIAL_FILES[kind](path)
    else:
        text = NOT_OURS[kind] + b"\n"
        path.write_bytes(b"%08x %s" % (zlib.crc32(text), text))
    with pytest.raises(UserError, match=rf"{JOURNAL_NAME}: was not written by a conversion; remove .* to start over"):
        read_journal(path)
