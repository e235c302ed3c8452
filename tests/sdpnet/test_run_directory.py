from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdpnet.distributed.run_directory import LOCK_NAME, no_run_in, run_directory
from sdpnet.pipelines.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from sdpnet.distributed.run_directory import no_run_in, run_directory
with run_directory(Path(sys.argv[1])) as held:
    (held.path / ".model.json.partial").touch()
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
            assert held.path == out and os.listdir(out) == [".lock"]
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


def renamed_and_replaced(out: Path) -> Path:
    """The directory's new name; another run has begun under the old one."""
    moved = out.with_name("moved")
    out.rename(moved)
    out.mkdir()
    (out / LOCK_NAME).write_text("of the other run")
    return moved


def test_the_lock_of_the_run_that_took_its_place_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with run_directory(out) as held:
        held.require_own()
        moved = renamed_and_replaced(out)
        with pytest.raises(OSError, match="the run's folder was replaced by another one") as caught:
            held.require_own()
        assert caught.value.filename == str(out)
    assert (out / LOCK_NAME).read_text() == "of the other run"
    assert os.listdir(moved) == []


def test_the_lock_of_a_run_that_began_in_the_same_directory_stays(tmp_path: Path) -> None:
    """After someone has removed the first one's lock, or all of the directory's files."""
    out = tmp_path / "run"
    with run_directory(out) as first:
        (out / LOCK_NAME).unlink()
        first.require_own()
        with run_directory(out) as second:
            with pytest.raises(OSError, match="another run has begun in the run's folder"):
                first.require_own()
            first.remove_lock()
            second.require_own()
            assert (out / LOCK_NAME).exists()


def test_an_empty_directory_of_another_run_is_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with run_directory(out):
        (tmp_path / "a").rename(tmp_path / "b")
        out.mkdir(parents=True)
    assert out.is_dir()


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with run_directory(out) as held:
        out.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="the run's folder was removed or renamed"):
            held.require_own()
    assert os.listdir(tmp_path / "moved") == [] and not out.exists()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in `runs`, and in `empty` nothing; the working directory is that which holds them."""
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet_xl", "cifar"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("runs/imagenet_x", "no run is there to resume; did you mean --out runs/imagenet_xl?"),
        ("rnus/cifar", "no run is there to resume; did you mean --out runs/cifar?"),
        ("runs/imagnet_xl/", "no run is there to resume; did you mean --out runs/imagenet_xl?"),
        ("./runs/../runs/cifra", "no run is there to resume; did you mean --out runs/../runs/cifar?"),
        ("runs", "is not a run, but holds runs/cifar, runs/imagenet_xl; pass the folder of one as --out"),
        ("runs/cifar/checkpoints", "is not a run, but lies in one; pass --out runs/cifar"),
        ("runs/cifar/checkpoints/step_00000001.pt", "is not a run, but lies in one; pass --out runs/cifar"),
        ("runs/notes", "no run is there to resume; the runs beside it are runs/cifar, runs/imagenet_xl; to begin"),
        ("empty/z", "no run is there to resume; nor is there one beside it; to begin one, pass --config"),
        ("/nowhere/of/this/name", "no run is there to resume; nor is there one beside it; to begin"),
    ],
)
def test_a_mistyped_run_is_told_the_nearest_one(out: str, message: str, runs: Path) -> None:
    line = no_run_in(Path(out))
    assert line.startswith(f"{Path(out)}: {message}") and "\n" not in line


def test_the_working_directory_is_no_parent_of_what_lies_beside_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs / "runs" / "cifar")
    assert no_run_in(Path("../imagnet_xl")).endswith("did you mean --out ../imagenet_xl?")
    (runs / "runs" / "cifar" / "config.yaml").unlink()
    assert "has checkpoints, but no config.yaml; pass --config" in no_run_in(Path("."))
