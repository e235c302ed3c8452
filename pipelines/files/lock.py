"""A lock that is a file, made by exclusive creation: for file systems without locks of their own.

    NAME          {"host": ..., "pid": ..., "token": ...} of the process that holds it; it goes when that is done
    NAME.TOKEN    the same of the one process that may replace a lock with that token, whose holder has died

The lock of a process of this machine that is known to have died is taken over. For each such lock only one process at a
time can make NAME.TOKEN; it replaces the lock by its own if the lock still has that token. Each process writes another
token, so that no two of them take over the same lock. The lock of another machine, or of this one before it was started
again, is believed.
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
    """Takes the lock and returns None, or returns who holds it: an empty dictionary where that is not known.

    Raises OSError for what else the system refuses.
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
    """Gives the lock back if it is this process's."""
    with suppress(OSError):
        owner = owner_of(path)
        if (owner.get("host"), owner.get("pid")) == (socket.gethostname(), os.getpid()):
            os.unlink(path)


def owner_of(path: Path) -> Owner:
    """Whom a lock file names; an empty dictionary where it does not say. Raises FileNotFoundError."""
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
    """Whether a process may still run."""
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
    """Tells the machine since its last start, and the container, from others of the same name; nothing if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, which tells it from a later one of the same number; nothing if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _create(path: Path, owner: Owner) -> bool:
    """Makes a file that did not exist; whether it is this process's."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(owner).encode())  # whole or, on a full disk, not at all: it is short
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return True
