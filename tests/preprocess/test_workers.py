from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from processes import children_of, running

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.workers import pool as workers
from sdpnet.preprocess.workers.pool import Workers, encode_all
from sdpnet.preprocess.workers.result import Bad, Encoded

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EncodeSettings(max_side=64)
# What a test's worker processes do at an image whose name contains the word, in the place of encoding it.
MISBEHAVIOUR = """
import os, signal, subprocess, sys, time
from sdpnet.preprocess.workers import child as worker
def misbehave(location, settings, encode_one=worker.encode_one):
    if "hang" in location.name: time.sleep(1000)
    if "murder" in location.name:
        subprocess.Popen(["sh", "-c", f"kill -TERM {os.getpid()}"])
        time.sleep(1000)
    if "nap" in location.name: time.sleep(1)
    if "pause" in location.name:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    if "spin" in location.name:
        while True: pass
    if "segv" in location.name: os.kill(os.getpid(), signal.SIGSEGV)
    if "abrt" in location.name: os.abort()
    if "kill" in location.name: os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in location.name: os._exit(3)
    return encode_one(location, settings)
worker.encode_one = misbehave
worker.SHARED_BYTES = int(os.environ.get("SHARED_BYTES", worker.SHARED_BYTES))
worker.work(*map(int, sys.argv[1:]))
"""


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes do what the name of an image says."""
    popen = subprocess.Popen

    def start(command: list[str], **options):
        descriptors = map(str, options["pass_fds"])
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return popen([sys.executable, "-c", MISBEHAVIOUR, *descriptors], env=environment, **options)

    monkeypatch.setattr("sdpnet.preprocess.workers.process.subprocess.Popen", start)


def children() -> set[int]:
    return children_of(os.getpid())


def locations(image_folder: Path, *words: str) -> list[Location]:
    """Good images, as many as there are words, each named by its word."""
    split = scan(image_folder).splits["train"]
    return [Location(f"{index} {word}", split.locate(index).path) for index, word in enumerate(words)]


def run(places: list[Location], num_workers: int, **options) -> list[Encoded | Bad]:
    with closing(encode_all(places.__getitem__, 0, len(places), SETTINGS, num_workers, **options)) as results:
        return [r._replace(data=bytes(r.data)) if isinstance(r, Encoded) else r for r in results]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_images_come_in_order_for_any_number_of_workers(image_folder, num_workers):
    before = children()
    split = scan(image_folder).splits["train"]
    with closing(encode_all(split.locate, 3, 21, SETTINGS, num_workers)) as images:
        results = [image._replace(data=bytes(image.data)) for image in images]
    expected = [encode_image(Path(split.locate(index).path).read_bytes(), SETTINGS) for index in range(3, 21)]
    assert [result.data for result in results] == [image.data for image in expected]
    assert [(result.height, result.width) for result in results] == [(i.height, i.width) for i in expected]
    assert children() == before
    assert list(encode_all(split.locate, 4, 4, SETTINGS, num_workers)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_has_a_reason_and_harms_no_other(image_folder, tmp_path, num_workers):
    places = locations(image_folder, *["good"] * 6)
    (tmp_path / "bad.jpg").write_text("no image")
    places[2] = Location("bad", str(tmp_path / "bad.jpg"))
    places[4] = Location("gone", str(tmp_path / "gone.jpg"))
    results = run(places, num_workers)
    assert [type(result) for result in results] == [Encoded, Encoded, Bad, Encoded, Bad, Encoded]
    assert results[2].reason.startswith("not an image")
    assert results[4].reason == "cannot be read (No such file or directory)"
    (named,) = run([Location("a\n\x1b", str(tmp_path / "bad.jpg"))], num_workers)
    assert named.reason.startswith("not an image")  # without the name, which is escaped in errors


def test_a_mistake_of_a_library_is_the_images_reason(image_folder, monkeypatch):
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("sdpnet.preprocess.workers.child.encode_image", broken)
    assert run(locations(image_folder, "a"), 0) == [Bad("cannot be converted (MemoryError: no room)")]


@pytest.mark.parametrize("at", [0, 5, 19])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("segv", r"the decoder crashes \(SIGSEGV\)"),
        ("abrt", r"the decoder crashes \(SIGABRT\)"),
        ("hang", r"the decoder hangs \(asleep for 0.5 s\)"),
        ("spin", r"the decoder hangs \(more than 0.5 s of processor time\)"),
    ],
)
def test_a_worker_that_crashes_or_hangs_costs_one_image(misbehaving, image_folder, word, reason, at):
    before = children()
    words = ["good"] * 20
    words[at] = word
    results = run(locations(image_folder, *words), 2, hang_seconds=0.5, asleep_seconds=0.5)
    assert [index for index, result in enumerate(results) if isinstance(result, Bad)] == [at]
    assert re.match(reason, results[at].reason)
    assert children() == before


@pytest.mark.parametrize("word", ["nap", "pause"])
def test_time_in_which_a_worker_does_not_run_costs_no_image(misbehaving, image_folder, word):
    """It is stopped or sleeps for a second, as it may wait for a processor on a busy machine."""
    options = {} if word == "nap" else {"asleep_seconds": 0.3}
    results = run(locations(image_folder, "good", word, "good"), 1, hang_seconds=0.3, **options)
    assert [type(result) for result in results] == [Encoded] * 3


@pytest.mark.parametrize("state", ["R", "D", "T", "t", "S"])
def test_only_processor_time_and_sleep_count(image_folder, monkeypatch, state):
    """A worker is watched for as long as it takes; by the system's word, the processor time of none of it was its."""
    monkeypatch.setattr("sdpnet.preprocess.workers.process.WorkerProcess.activity", lambda worker: (state, 3.0))
    monkeypatch.setattr("sdpnet.preprocess.workers.process.WorkerProcess.finished", lambda worker: 0)
    places = locations(image_folder, "good")
    with Workers(SETTINGS, 1, hang_seconds=0.01, asleep_seconds=100) as pool:
        results = pool.encode(places.__getitem__, 0, 1)
        (worker,) = pool._workers.values()
        worker.ready = True
        worker.tasks.append(0)
        for _ in range(500):
            pool._check(worker, 0.1)
        assert worker.asleep == pytest.approx(50 if state == "S" else 0, abs=0.5)
        assert list(pool._workers.values()) == [worker]
        results.close()


@pytest.mark.parametrize(("word", "what"), [("kill", r"SIGKILL \(out of memory\?\)"), ("exit", "status 3")])
def test_a_worker_that_is_ended_from_outside_ends_the_run_and_names_the_image(misbehaving, image_folder, word, what):
    before = children()
    with pytest.raises(
        UserError, match=rf"^4 {word}: its worker process was ended by {what}; the same command goes on"
    ):
        run(locations(image_folder, *["good"] * 4, word, *["good"] * 10), 2)
    assert children() == before


def test_a_worker_killed_by_somebody_ends_the_run(misbehaving, image_folder):
    """The kill comes from another process, at an image that takes long."""
    with pytest.raises(UserError, match=r"^2 murder: its worker process was ended by SIGTERM"):
        run(locations(image_folder, "good", "good", "murder", "good"), 1)


def test_stopping_early_ends_all_processes(image_folder):
    before = children()
    split = scan(image_folder).splits["train"]
    results = encode_all(split.locate, 0, 24, SETTINGS, 2)
    assert isinstance(next(results), Encoded)
    assert len(children()) == len(before) + 2
    results.close()
    assert children() == before


def test_workers_take_one_stretch_after_another(image_folder):
    before = children()
    split = scan(image_folder).splits["train"]
    with Workers(SETTINGS, 2) as pool:
        started = children()
        results = [bytes(result.data) for result in pool.encode(split.locate, 0, 7)]
        results += [bytes(result.data) for result in pool.encode(split.locate, 7, 20)]
        assert children() == started and len(started) == len(before) + 2
    assert children() == before
    assert results == [encode_image(Path(split.locate(i).path).read_bytes(), SETTINGS).data for i in range(20)]


def test_finished_images_do_not_wait_for_a_slow_one(misbehaving, image_folder):
    before = children()
    places = locations(image_folder, "good", "good", "good", "hang")
    with closing(encode_all(places.__getitem__, 0, 4, SETTINGS, 1)) as results:
        first = next(results)
        started = children()
        assert [type(result) for result in (first, next(results), next(results))] == [Encoded] * 3
        assert children() == started != before


@pytest.mark.parametrize("size", [1, 2500, 6000])
def test_images_that_do_not_fit_into_the_shared_memory(misbehaving, image_folder, monkeypatch, size):
    """None does, some do, some more do; a bad one's reason is among them."""
    monkeypatch.setenv("SHARED_BYTES", str(size))
    monkeypatch.setattr("sdpnet.preprocess.workers.process.SHARED_BYTES", size)
    places = locations(image_folder, *["good"] * 20)
    places[7] = Location("gone", "gone.jpg")
    results = run(places, 2)
    expected = [encode_image(place.path, SETTINGS).data for place in places if place.name != "gone"]
    assert results.pop(7) == Bad("cannot be read (No such file or directory)")
    assert [result.data for result in results] == expected


def test_a_worker_that_cannot_start_is_said(image_folder, monkeypatch, capfd):
    monkeypatch.setattr("sdpnet.preprocess.workers.process.sys.executable", "/bin/false")
    with pytest.raises(UserError, match=r"a worker process cannot start \(status 1\)"):
        run(locations(image_folder, "good"), 2)


def test_finished_images_wait_in_bounded_memory(misbehaving, image_folder):
    """While the first image takes long, the others are encoded only so far ahead."""
    asked: list[int] = []
    places = locations(image_folder, "hang")

    def locate(index: int) -> Location:
        asked.append(index)
        return places[0] if index == 0 else Location("good", scan(image_folder).splits["train"].locate(1).path)

    with closing(encode_all(locate, 0, 300, SETTINGS, 2, asleep_seconds=1)) as results:
        assert isinstance(next(results), Bad)
        assert 2 * workers._TASKS <= max(asked) < 4 * workers._TASKS * 2


def test_workers_end_with_a_parent_that_is_killed(image_folder):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sdpnet.preprocess.encoding.encode import EncodeSettings\n"
        "from sdpnet.preprocess.sources.scan import scan\n"
        "from sdpnet.preprocess.workers.pool import encode_all\n"
        "split = scan(Path(sys.argv[1])).splits['train']\n"
        "results = encode_all(split.locate, 0, 24, EncodeSettings(), 2)\n"
        "next(results)\n"
        "for entry in os.listdir('/proc'):\n"
        "    if entry.isdigit():\n"
        "        try: fields = open(f'/proc/{entry}/stat').read().rpartition(')')[2].split()\n"
        "        except OSError: continue\n"
        "        if int(fields[1]) == os.getpid(): print(entry)\n"
        "sys.stdout.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, image_folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(found) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(running(process) for process in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(process) for process in found)
