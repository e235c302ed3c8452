"""Ctrl-C while a command starts, and which processes are commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdpnet.pipelines.startup import is_command

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import sys, time
print("importing", flush=True)
for _ in range(6000):
    try:
        time.sleep(0.01)
    except BaseException:  # as libraries have it around what they import
        raise ImportError("a module of it is missing") from None
"""
COMMANDS = [
    ["-m", "sdpnet.train", "--out", "run"],
    ["-m", "sdpnet.cli", "predict", "--model", "m", "i.jpg"],
    ["-m", "sdpnet.pipelines.bench"],
    ["-m", "sdpnet.preprocess.verify", "shards"],
    ["preprocess/adopt.py", "shards"],
    ["pipelines/bench.py"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_an_interrupt_while_libraries_are_imported(words: list[str], tmp_path: Path) -> None:
    for library in ("torch", "numpy"):
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_other_programs_keep_their_own_interrupt() -> None:
    code = "import signal, sdpnet, preprocess; print(signal.getsignal(2) is signal.default_int_handler)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "sdpnet.train", "--out", "x"], True),
        (["-u", "-W", "error", "-m", "sdpnet.train"], True),
        (["-um", "sdpnet.preprocess.verify"], True),
        (["-m", "sdpnet", "verify"], True),
        ([str(ROOT / "preprocess" / "build_ffcv.py"), "--out"], True),
        ([str(Path(sys.executable).with_name("sdpnet")), "train"], True),
        (["-m", "pytest", "sdpnet.train"], False),
        (["-m", "sdpnet.model.sdpnet"], False),
        (["-m", "sdpnet.preprocess.workers.child", "3"], False),
        (["-c", "import sdpnet", "-m", "sdpnet.train"], False),
        (["my/train"], False),
        (["my/preprocess/verify.py"], False),
        ([], False),
    ],
)
def test_which_processes_are_commands(words: list[str], expected: bool) -> None:
    assert is_command([sys.executable, *words]) == expected
