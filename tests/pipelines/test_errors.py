"""Names in messages: what reaches a terminal or a log of lines is one line without control characters."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from sdpnet.pipelines.errors import BackendMissingError, ShardError, UserError, printable, run_command


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("猫/ñandú été – Ωμέγα 👩\u200d🚀 می\u200cخواهم\u00a0e\u0301\u3000x.png",) * 2,
        ("[red]x[/red]", "[red]x[/red]"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("a\nb\r\nc\td\x0b\x0c", r"a\nb\r\nc\td\x0b\x0c"),
        ("nul\0bell\adel\x7f", r"nul\x00bell\x07del\x7f"),
        ("\x80\x85\x9b31m\x9f", r"\x80\x85\x9b31m\x9f"),
        ("gnp.\u202eexe\u2066\u2069\u200e\u200f\u061c", r"gnp.\u202eexe\u2066\u2069\u200e\u200f\u061c"),
        ("two\u2028lines\u2029", r"two\u2028lines\u2029"),
        ("\ud83d half, \udc01 half", r"\ud83d half, \udc01 half"),
        (b"caf\xe9\x1b\xff", r"caf\xe9\x1b\xff"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("caf\xe9".encode(), "caf\xe9"),
        (Path("a\nb") / "c", r"a\nb/c"),
        ("\ufeffx\uffff", r"\ufeffx\uffff"),
        (r"C:\new\x1b", r"C:\new\x1b"),
    ],
)
def test_printable(name: str | bytes | Path, shown: str) -> None:
    assert printable(name) == shown == printable(shown)
    shown.encode()


@pytest.mark.parametrize("kind", [UserError, ShardError, BackendMissingError])
def test_no_error_carries_a_names_control_characters(kind: type[UserError], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise kind("run\x1b[2J/\nconfig.yaml: not a config")

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: run\\x1b[2J/\\nconfig.yaml: not a config\n"
    error = pickle.loads(pickle.dumps(kind("a\nb")))  # as it comes back from a process
    assert type(error) is kind and str(error) == r"a\nb"


@pytest.mark.parametrize("name", ["x\x1b[2J\n", b"x\x1b[2J\n"])
def test_the_systems_refusal_names_the_file_on_one_line(name: str | bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: x\\x1b[2J\\n: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: out of memory; "),
        (RuntimeError("can't start new thread"), "error: the system starts no more threads; "),
    ],
)
def test_a_machine_that_has_no_more_ends_a_command_in_a_line(capsys, error, line):
    def main() -> int:
        raise error

    assert run_command(main) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_other_mistakes_of_ours_keep_their_traceback():
    def main() -> int:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_command(main)
