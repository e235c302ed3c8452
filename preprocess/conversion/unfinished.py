"""The folder of unfinished work, OUT/.unfinished. One process at a time locks it; its journal says what it is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import exclusive, sync_directory
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, QUARANTINE_NAME
from sdpnet.preprocess.conversion.journal import JOURNAL_NAME, Begun, Journal, read_journal

__all__ = ["LOCK_NAME", "open_journal", "refuse_existing", "writing"]

LOCK_NAME: Final = "lock"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_SUFFIXES: Final = (".beton", ".crc32", ".tar", ".idx", ".samples", ".index", ".converted")


def refuse_existing(out: Path, splits: Iterable[str] = ()) -> None:
    """Raises `UserError` if a folder has a shard set, or files that a shard set with these splits may have."""
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"{out}: already holds a shard set; remove it, or choose another --out")
    if (out / QUARANTINE_NAME).exists():
        raise UserError(f"{out / QUARANTINE_NAME}: exists already; remove it, or choose another --out")
    for split in splits:
        for path in sorted(out.glob(f"{split}*")):
            if path.suffix in _SUFFIXES:
                raise UserError(f"{path}: exists already; remove it, or choose another --out")


@contextmanager
def writing(work: Path) -> Iterator[Path]:
    """Makes a folder for unfinished work, holds its lock, and turns errors of the system into `UserError`.

    At the end, the folder stays if its journal says that something is done. Otherwise it is removed, together with the
    folders above it that were made for it.
    """
    created = [folder for folder in (work, *work.parents[:3]) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        with exclusive(work / LOCK_NAME):
            try:
                yield work
            finally:
                if len(read_journal(work / JOURNAL_NAME)[0]) <= 1:  # only the identity
                    for entry in os.scandir(work):
                        if not entry.is_dir() and not entry.name.startswith(f"{LOCK_NAME}."):
                            os.unlink(entry)
    except OSError as error:
        advice = "; free some and repeat the command: it goes on from there" if error.errno in _FULL else ""
        raise UserError(f"{error.filename or work}: cannot be written ({error.strerror}){advice}") from None
    finally:
        for folder in (work, *created[1:]):
            with suppress(OSError):  # it is not empty, is removed already, or another run has begun in it
                folder.rmdir()


def open_journal(work: Path, begun: Begun) -> Journal:
    """Opens the journal of the unfinished conversion in `work`, or a new one with `begun` as its first entry.

    Raises:
        UserError: the unfinished conversion is another one. Only the origin may differ.
    """
    journal = Journal(work / JOURNAL_NAME)
    begun = Begun(**json.loads(json.dumps(begun.to_dict())))  # the form in which it is read from a journal
    first = journal.entries[0] if journal.entries else None
    if first is None:
        journal.append(begun)
        sync_directory(work)
    elif not isinstance(first, Begun) or replace(first, origin=None) != replace(begun, origin=None):
        journal.close()
        different = _difference(first, begun) if isinstance(first, Begun) else "another kind of journal"
        raise UserError(
            f"{work}: an unfinished conversion with {different} lies here; repeat its command to go on with it, "
            "or remove that folder to start over"
        )
    return journal


def _difference(old: Begun, new: Begun) -> str:
    one, other = ({**entry.conversion, "part": entry.part} for entry in (old, new))
    for key, what in (
        ("source", "another source"),
        ("val_draw", "another --val-share or --val-seed"),
        ("num_images", "other images"),
        ("fingerprints", "other images"),
        ("classes", "other classes"),
        ("encode", "other settings"),
        ("created_by", "another version of the encoder"),
        ("part", "another part"),
    ):
        if one.get(key) != other.get(key):
            return what
    return "another kind of output"
