from __future__ import annotations

import zlib

import pytest
from special_files import SPECIAL_FILES

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.conversion.journal import BAD, JOURNAL_NAME, REENCODED, Journal, Records, read_journal

ENTRIES = [{"a": 1}, {"text": 'ä\n"quoted" 漢'}, {"list": [{"b": None}]}]


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
    journal.append({"more": 2})
    journal.close()
    assert read_journal(written)[0] == [*ENTRIES, {"more": 2}]
    assert read_journal(written.with_name("none")) == ([], 0)


def test_a_journal_cut_off_anywhere_keeps_its_whole_lines(written):
    content = written.read_bytes()
    ends = [0] + [index + 1 for index, byte in enumerate(content) if byte == 0x0A]
    for length in range(len(content) + 1):
        written.write_bytes(content[:length])
        journal = Journal(written)
        whole = sum(end <= length for end in ends) - 1
        assert journal.entries == ENTRIES[:whole]
        journal.append({"after": length})
        journal.close()
        assert read_journal(written)[0] == [*ENTRIES[:whole], {"after": length}]


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


RECORDS = [(100, 7, 3, 10, 20, REENCODED), (0, 0, 1, 0, 0, BAD), (2**32 - 1, 2**32 - 1, 0, 65_500, 1, REENCODED)]


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
        with pytest.raises(UserError, match="is not as the journal beside it says; remove"):
            Records(tmp_path / "r", count, crc32)


@pytest.mark.parametrize("kind", ["named pipe", "link to /dev/zero", "folder", "sparse terabyte", "no object", "deep"])
def test_what_no_conversion_has_written(tmp_path, kind):
    path = tmp_path / JOURNAL_NAME
    if kind in SPECIAL_FILES:
        SPECIAL_FILES[kind](path)
    else:
        text = (b"[1]" if kind == "no object" else b"[" * 200_000) + b"\n"
        path.write_bytes(b"%08x %s" % (zlib.crc32(text), text))
    with pytest.raises(UserError, match=rf"{JOURNAL_NAME}: is no file of a conversion; remove .* to start over"):
        read_journal(path)
