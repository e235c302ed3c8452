"""A lock file made by exclusive creation, for file systems that have no locks.

    NAME          {"host": ..., "pid": ..., "token": ...} of the process that holds the lock; removed when it is done
    NAME.TOKEN    the same, of the process that is replacing the lock with that token because its holder has died

A lock whose holder ran on this machine and is known to have died is taken over. Only one process at a time can create
NAME.TOKEN, and it replaces the lock only if the lock still has that token. Each process writes its own token, so no two
processes take over the same lock. A lock of another machine, or of this machine before its last restart, counts as
held.

`filelock` is not used because it does not take over locks of dead processes where files cannot be exchanged atomically,
as on NFS (records/LOG.md).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdpnet.pipelines.files.regular import open_regular_file

__all__ = ["Owner", "acquire", "is_alive", "owner_of", "release"]

Owner = dict[str, Any]


def acquire(path: Path) -> Owner | None:
    """Takes the lock and returns None, or returns its holder: an empty dictionary if the holder is not known.

    Raises `OSError` if the file system refuses for another reason.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    mine |= {"system": _system(), "started": _started(os.getpid())}
    while True:
        if _create(path, mine):
            return None
        try:
            held = owner_of(path)
        except FileNotFoundError:  # it was released just now
            continue
        if "token" not in held or is_alive(held):
            return held
        claim = path.with_name(f"{path.name}.{held['token']}")
        if not _create(claim, mine):
            return held  # another process is about to take it over
        unfinished = path.with_name(f"{path.name}.{mine['token']}")
        try:
            with suppress(FileNotFoundError):
                if owner_of(path).get("token") == held["token"]:
                    _create(unfinished, mine)
                    os.replace(unfinished, path)
                    return None
        finally:
            for leftover in (unfinished, claim):
                with suppress(FileNotFoundError):
                    os.unlink(leftover)


def release(path: Path) -> None:
    """Releases the lock if this process holds it."""
    with suppress(OSError):
        owner = owner_of(path)
        if (owner.get("host"), owner.get("pid")) == (socket.gethostname(), os.getpid()):
            os.unlink(path)


def owner_of(path: Path) -> Owner:
    """The process that a lock file names, or an empty dictionary if it names none. Raises `FileNotFoundError`."""
    try:
        with open(open_regular_file(path), "rb", 0) as file:
            raw = json.loads(file.read(4096) or b"")
        owner: Owner = {"host": str(raw["host"]), "pid": int(raw["pid"])}
        owner |= {key: raw[key] for key in ("system", "started", "token") if isinstance(raw.get(key), str)}
        return owner if owner["pid"] > 0 and owner.get("token", "a").isalnum() else {}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def is_alive(owner: Owner) -> bool:
    """Whether a process may still be running. It is False only if the process is known to have ended."""
    if owner["host"] != socket.gethostname() or owner.get("system", _system()) != _system():
        return True
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return bool(owner.get("started", "") in ("", _started(owner["pid"])))


def _system() -> str:
    """Identifies this start of the machine, and the container, among those of the same name; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The start time of a process, which differs from that of a later process with the same id; empty if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _create(path: Path, owner: Owner) -> bool:
    """Creates a file that does not exist yet. Returns whether this process created it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(owner).encode())  # so short that a full disk takes all of it or nothing
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return True
