from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import UserError
from sdpnet.run_directory import run_directory

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys
from pathlib import Path
from sdpnet.run_directory import run_directory
with run_directory(Path(sys.argv[1])) as out:
    (out / ".model.json.partial").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_it_and_a_killed_one_no_longer(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"run: another run \(process {holder.pid} on"), run_directory(out):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        assert set(os.listdir(out)) == {".lock", ".model.json.partial"}
        with run_directory(out) as held:
            assert held == out and os.listdir(out) == [".lock"]
            (out / "config.yaml").touch()
        assert os.listdir(out) == ["config.yaml"]
    finally:
        holder.stdin.close()
        holder.wait(30)
        holder.stdout.close()


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a mistake"), run_directory(tmp_path / "a" / "run"):
        raise UserError("a mistake")
    assert os.listdir(tmp_path) == []
    (tmp_path / "run").mkdir()
    with run_directory(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == ["run"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), run_directory(tmp_path / "file"):
        pass
