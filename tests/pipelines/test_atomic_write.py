from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conversion import convert_folder
from faults import contents

from sdpnet.checkpoints.file import write_atomically
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import exclusive, publish_bytes, write_all

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from sdpnet.pipelines.files.atomic_write import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until it is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_and_a_stale_lock_is_none(tmp_path):
    lock = tmp_path / "lock"
    with hold(lock) as holder:
        message = rf"another run \(process {holder.pid} on .*\) is writing here; wait for it, or choose another folder"
        with pytest.raises(UserError, match=message), exclusive(lock):
            pass
        holder.kill()
    assert holder.returncode == -signal.SIGKILL and lock.exists()
    with exclusive(lock), pytest.raises(UserError, match=f"process {os.getpid()} on"), exclusive(lock):
        pass
    with exclusive(lock):
        pass


def test_a_lock_does_not_live_on_in_a_forked_child(tmp_path):
    """A decoding worker outlives the process that is killed by some seconds; the next run must not wait for it."""
    fork = "import os, sys\nfrom pathlib import Path\nfrom sdpnet.pipelines.files.atomic_write import exclusive\n"
    fork += (
        "with exclusive(Path(sys.argv[1])):\n    os.fork() or print(os.getpid(), flush=True)\n    sys.stdin.read()\n"
    )
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", fork, lock], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match=f"process {holder.pid} on"), exclusive(lock):
            pass
        holder.kill()
        holder.wait(30)
        os.kill(child, 0)
        with exclusive(lock):
            pass
    finally:
        holder.stdin.close()  # ends them both
        holder.wait(30)
        holder.stdout.close()


@pytest.mark.parametrize("state", ["dead", "alive", "elsewhere", "unreadable"])
def test_without_locks_of_the_system_the_file_is_the_lock(tmp_path, monkeypatch, state):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = tmp_path / "lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pid = {"dead": ended.pid, "alive": os.getppid(), "elsewhere": ended.pid}.get(state, 0)
    host = "some.other.machine" if state == "elsewhere" else socket.gethostname()
    lock.write_text("{" if state == "unreadable" else json.dumps({"host": host, "pid": pid}))
    if state in ("dead", "unreadable"):
        with exclusive(lock):
            assert json.loads(lock.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    else:
        with pytest.raises(UserError, match=rf"process {pid} on {host}"), exclusive(lock):
            pass


# Processes that all take a lock at the same moment, round after round, on a file system without locks. In each round
# one has died while it held the lock, and those that get in end in one of the ways "done", "killed", "error".
RACE = """
import errno, fcntl, os, random, signal, sys
from pathlib import Path
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import exclusive
def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = refuse
folder, rounds, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def contend(gate, number):
    os.read(gate, 1)
    random.seed(number)
    try:
        with exclusive(folder / "lock"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            for _ in range(random.randrange(1000)):
                pass
            os.unlink(folder / "inside")
            if number % 3 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return 0
    except UserError:
        return 3
for round in range(rounds):
    gate, opened = os.pipe()
    children = []
    for number in range(size):
        child = os.fork()
        if not child:
            os.close(opened)
            status = 1
            try:
                status = contend(gate, round * size + number)
            finally:
                os._exit(status)
        children.append(child)
    os.close(gate)
    os.close(opened)  # now
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(ended) <= {0, 3, -signal.SIGKILL} and ended != [3] * size, ended
left = sorted(path.name for path in folder.iterdir())
assert set(left) <= {"lock", "lock.held"}, left
"""


def test_without_locks_of_the_system_one_of_many_gets_in(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RACE, tmp_path, "40", "6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("change", [{"system": "another start"}, {"started": "1"}, {"token": "../x"}, {"pid": 1 << 70}])
def test_whose_lock_file_is_believed(tmp_path, no_locks, change):
    """That of another start of the machine is, that of a process with the number of a dead one is not."""
    with exclusive(tmp_path / "lock"):
        held = json.loads((tmp_path / "lock.held").read_text())
    assert os.listdir(tmp_path) == ["lock"]
    (tmp_path / "lock.held").write_text(json.dumps({**held, **change}))
    if "system" in change or "token" in change:
        message = r"if no such run exists any more, remove .*lock\.held"
        with pytest.raises(UserError, match=message), exclusive(tmp_path / "lock"):
            pass
        assert json.loads((tmp_path / "lock.held").read_text()) == {**held, **change}
    else:
        with exclusive(tmp_path / "lock"):
            assert json.loads((tmp_path / "lock.held").read_text())["token"] != held["token"]


def test_a_conversion_that_does_not_get_in_touches_nothing(tmp_path, no_locks, image_folder):
    work = tmp_path / "out" / ".unfinished"
    work.mkdir(parents=True)
    with exclusive(work / "lock"):
        (work / "train.beton").write_text("of another run")
        before = {path: path.read_bytes() for path in work.iterdir()}
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing here"):
            convert_folder(image_folder, tmp_path / "out")
        assert {path: path.read_bytes() for path in work.iterdir()} == before


def test_a_conversion_without_locks_of_the_system(tmp_path, no_locks, image_folder, shard_set):
    convert_folder(image_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shard_set)


def test_a_lock_that_its_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder finishes and removes it."""
    lock = tmp_path / "lock"
    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with exclusive(lock):
        assert len(calls) == 2 and lock.exists()


def test_writing_goes_on_after_short_writes(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    publish_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    with (tmp_path / "b").open("wb") as file:
        write_all(file.fileno(), b"xyz" * 5, 4)
    assert (tmp_path / "b").read_bytes() == bytes(4) + b"xyz" * 5


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output"):
        publish_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    "write", [publish_bytes, lambda path, data: write_atomically(path, lambda to: to.write_bytes(data))]
)
def test_the_systems_refusal_names_the_file_itself(write, tmp_path, monkeypatch):
    """Not the unfinished file beside it; and an error of write(), which names nothing, gets a name."""
    for wrong, reason in (
        (tmp_path / "nodir" / "m.json", f"No such file or directory (make the directory {tmp_path / 'nodir'} first)"),
        (tmp_path / "file" / "m.json", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(OSError) as caught:
            write(wrong, b"{}")
        assert (caught.value.filename, caught.value.strerror) == (str(wrong), reason)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path / "m.json", b"{}")
    assert caught.value.filename == str(tmp_path / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_a_full_disk_refuses_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device") as caught, exclusive(tmp_path / ".lock"):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")
