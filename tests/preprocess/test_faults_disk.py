"""A disk that refuses ends a conversion in one line, and the same command goes on; short writes succeed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from faults import CALLS, Commands, Fault, command_line, contents, require_absent_or_complete

FORMATS = ("beton", "tar")
# Which of all calls of a kind: the first, the last and some between.
PLACES = {"mkdir": (0,), "rmdir": (0,), "unlink": (0, 0.5, 1), "io.open": (0, 0.5, 1)}


@pytest.fixture(scope="module")
def num_calls(commands, tiny_folder, tmp_path_factory) -> dict[str, dict[str, int]]:
    """Of each format: how often a conversion that nothing stops makes each call."""
    root = tmp_path_factory.mktemp("calls")
    return {format: commands.run(format, command_line(tiny_folder, root / format)).calls for format in FORMATS}


def refused(commands: Commands, format: str, source: Path, out: Path, whole: Path, fault: Fault) -> None:
    """The command ends in one line, leaves what was there, and goes on when it is repeated."""
    out.mkdir()
    (out / "notes.txt").write_text("somebody's")
    ended = commands.run(format, command_line(source, out), fault)
    assert (out / "notes.txt").read_text() == "somebody's"
    (out / "notes.txt").unlink()
    complete = contents(whole)
    if ended.status == 0:  # the call was one that the conversion does not need
        assert {name: content for name, content in contents(out).items() if name != ".unfinished"} == complete, fault
    else:
        last = ended.stderr.splitlines()[-1]
        reason = os.strerror(getattr(errno, fault.action))
        assert ended.status == 2 and last.startswith("error: ") and reason in last, (fault, ended)
        assert str(out) in last and ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr, ended
        require_absent_or_complete(out, whole)
    ended = commands.run(format, command_line(source, out))
    assert ended.status == 0 or "already holds a shard set" in ended.stderr, (fault, ended)
    assert contents(out) == complete, fault


@pytest.mark.parametrize("action", ["ENOSPC", "EIO"])
@pytest.mark.parametrize(
    ("call", "place"), [(call, place) for call in CALLS for place in PLACES.get(call, (0, 0.3, 0.6, 0.8, 1))]
)
@pytest.mark.parametrize("format", FORMATS)
def test_a_call_is_refused(commands, tiny_folder, tiny_sets, tmp_path, num_calls, format, call, action, place):
    """A full disk stays full, another error comes once."""
    nth = 1 + round(place * (num_calls[format][call] - 1))
    fault = Fault(call, "", nth, action, lasting=action == "ENOSPC")
    refused(commands, format, tiny_folder, tmp_path / "out", tiny_sets[format], fault)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_any_call_is_refused(commands, tiny_folder, tiny_sets, tmp_path, num_calls, format, lasting):
    for call in CALLS:
        for nth in range(1, num_calls[format][call] + 1):
            out = tmp_path / f"{call} {nth}"
            fault = Fault(call, "", nth, "EIO", lasting)
            refused(commands, format, tiny_folder, out, tiny_sets[format], fault)


@pytest.mark.parametrize("path", ["", "journal", "records", r"\.(beton|tar)$", "manifest"])
@pytest.mark.parametrize("format", FORMATS)
def test_writes_that_take_little(commands, tiny_folder, tiny_sets, tmp_path, format, path):
    """Each write to such a file takes 7 bytes, as often as it needs."""
    out = tmp_path / "out"
    ended = commands.run(format, command_line(tiny_folder, out), Fault("pwrite", path, 1, "short", lasting=True))
    assert ended.status == 0 and contents(out) == contents(tiny_sets[format])


@pytest.mark.parametrize("action", ["ENOSPC", "EIO"])
@pytest.mark.parametrize(("call", "nth"), [("pwrite", 3), ("pwrite", 12), ("fsync", 7), ("open", 2), ("ftruncate", 2)])
def test_a_part_is_refused(commands, tiny_folder, tiny_sets, tmp_path, call, nth, action):
    out = tmp_path / "out"
    arguments = command_line(tiny_folder, out, "--part", "1/1")
    ended = commands.run("beton", arguments, Fault(call, "", nth, action, lasting=True))
    assert ended.status == 2 and ended.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in ended.stderr
    assert commands.run("beton", arguments).status == 0
    merging = ["--out", str(out), "--merge"]
    ended = commands.run("beton", merging, Fault(call, "", nth, action))
    assert ended.status == 2 and ended.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in ended.stderr
    require_absent_or_complete(out, tiny_sets["beton"])
    assert commands.run("beton", merging).status == 0 and contents(out) == contents(tiny_sets["beton"])
