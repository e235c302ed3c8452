from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from sdpnet.pipelines.errors import UserError, run_command
from sdpnet.pipelines.lasting_output import lasting_output, print_note


@contextmanager
def broken_pipe() -> Iterator[TextIO]:
    """A stream whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize(
    ("broken", "reason"), [(broken_pipe, "Broken pipe"), (full_disk, "No space left on device")], ids=["pipe", "disk"]
)
def test_a_lost_stdout_is_said_once_on_stderr(broken: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stream can be closed: Python's own flush at its end would change the exit status."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with broken() as stream:  # type: ignore[operator]
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output("the work goes on"):
            for _ in range(3):
                print("a line", flush=True)
            assert sys.stdout.fileno() == stream.fileno()
        assert sys.stdout is stream
    assert errors.getvalue() == f"stdout is lost ({reason}): the work goes on\n"


def test_both_lost_and_both_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken_pipe() as out, broken_pipe() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with lasting_output(""):
            print("a line", flush=True)
    for stream in (out, None):  # closed by now; None: closed before Python began
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with lasting_output(""):
            print("a line", flush=True)
            assert not sys.stdout.isatty() if stream is None else True


def test_what_comes_back_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that is full for a while (non-blocking, as some programs leave it) is not lost."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with open(write, "w", encoding="utf-8") as stream, open(read, "rb", buffering=0) as reader:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output("it goes on"):
            for _ in range(100):
                print("x" * 4000, flush=True)
            print("\nafter")
            received = b""
            for _ in range(20):  # Python 3.14 keeps all that the pipe did not take; earlier versions keep the last 8 kB
                while select.select([read], [], [], 0)[0]:
                    received += reader.read(1 << 16)
                sys.stdout.flush()
        assert b"\nafter\n" in received


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_characters_that_the_terminal_lacks_are_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with lasting_output(""):
        print("caf\u00e9 \u2192 \u732b \udcff")
    expected = "caf\u00e9" if encoding != "ascii" else "caf\\xe9"
    assert raw.getvalue() == f"{expected} \\u2192 \\u732b \\udcff\n".encode(encoding)


def test_a_command_ends_with_its_own_status_on_a_lost_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("a mistake")

    with broken_pipe() as err:
        monkeypatch.setattr(sys, "stderr", err)
        assert run_command(fail) == 2


@pytest.mark.parametrize("broken", [broken_pipe, full_disk], ids=["pipe", "disk"])
def test_a_note_that_cannot_be_printed_is_discarded(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with broken() as stream:  # type: ignore[operator]
        monkeypatch.setattr(sys, "stderr", stream)
        print_note("a line")
        print_note("another", end="")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    print_note("a line", end="")
    assert stream.getvalue() == "a line"
