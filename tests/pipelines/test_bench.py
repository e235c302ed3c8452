"""The benchmark: what it delivers and reports, never how fast; and that it leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_batches import config_for, installed, loader_for
from processes import children_of, running

from sdpnet.pipelines import bench
from sdpnet.pipelines.benchmarks import ceilings
from sdpnet.pipelines.benchmarks.process import BenchProcess, ContestantError
from sdpnet.pipelines.benchmarks.race import Entry, Race, run_race
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.benchmarks.worker import WARM_UP, Job, Round, Started
from sdpnet.pipelines.executors.registry import PIPELINES, why_missing
from sdpnet.pipelines.machine import usable_cores
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.terminal.remedy import install, rebuild

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--cores", "1", "--image-size", "32", "--batch-size", "5", "--rounds", "2", "--batches", "3"]


def job(contestant: str, data: Path, **changes: Any) -> Job:
    facts = {"split": "train", "mode": "train", "image_size": 32, "batch_size": 5, "cores": tuple(usable_cores()[:1])}
    return Job(contestant, str(data), **{**facts, "device": "cpu", **changes})


def plan_ids(data: Path, split: str, count: int) -> list[list[int]]:
    """What an endless first epoch gives, from the reference loader's own plan."""
    config = replace(config_for(data, "torchvision", batch_size_per_gpu=5), augment=AugmentOptions())
    plan = loader_for(config, split).source.plan
    return [plan.batch(0, index % len(plan)).sample_ids.tolist() for index in range(count)]


def bench_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = bench.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def _signals() -> Any:
    """`main` handles SIGTERM; the tests' own handler comes back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_all_pipelines_deliver_the_samples_of_the_plan(shard_set: Path) -> None:
    race = run_race([job(name, shard_set) for name in PIPELINES], 2, seconds=0, num_batches=7)
    ids = plan_ids(shard_set, "train", WARM_UP + 7)  # 24 samples are 4 batches of 5: it starts again within a round
    expected = tuple(zlib.crc32(np.array(batch, np.int64).tobytes()) for batch in ids[WARM_UP:])
    assert {"torchvision", "synthetic"} <= {entry.contestant for entry in race.running}
    for entry in race.entries:
        if entry.reason:
            assert entry.reason == why_missing(entry.contestant)
            continue
        assert len(entry.rounds) == 2
        for measured in entry.rounds:
            assert measured.checksums == expected, entry.contestant
            assert measured.num_images == 35 and measured.seconds > 0 and measured.peak_bytes > 1e7
    assert race.mismatched() == []
    assert race.reference is not None and race.reference.contestant == ("ffcv" if installed("ffcv") else "torchvision")


@pytest.mark.skipif(len(usable_cores()) < 2, reason="one core")
def test_evaluation_on_two_cores_with_workers(tar_set: Path) -> None:
    two = job("torchvision", tar_set, mode="eval", split="val", cores=tuple(usable_cores()[:2]))
    with BenchProcess(two) as process:
        started = process.start()
        assert started.crops == "plan" and started.first_batch_seconds > 0
        assert process.calibrate(0.01) % 2 == 0
        measured = process.round(4)
    ids = plan_ids(tar_set, "val", 2 * WARM_UP + 4)
    assert measured.checksums == tuple(zlib.crc32(np.array(batch, np.int64).tobytes()) for batch in ids[2 * WARM_UP :])
    assert not running(process._process.pid)


def test_a_repeated_plan(shard_set: Path) -> None:
    plan = loader_for(config_for(shard_set, "torchvision"), "train").source.plan
    repeated = RepeatedPlan(plan, 3 * len(plan) - 1)
    assert len(repeated) == 3 * len(plan) - 1 and len(plan) == 6
    for index in (0, 5, 6, 16):
        once, again = plan.batch(0, index % 6), repeated.batch(0, index)
        assert (once.sample_ids == again.sample_ids).all() and (once.crop_boxes == again.crop_boxes).all()


@pytest.mark.slow
def test_the_table_and_the_record(tar_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "torchvision,ffcv"
    file = tmp_path / "record.json"
    status, out, _ = bench_main(capsys, "--data", tar_set, "--pipelines", names, "--json", file, *SMALL)
    assert status == 0
    record = json.loads(file.read_text())
    assert {"date", "what", "commit", "commands", "hardware", "versions", "note"} <= set(record)
    assert record["commands"][0].startswith("python pipelines/bench.py --data") and record["rounds"] == 2
    (race,) = record["races"]
    assert race["image_size"] == 32 and race["cores"] == usable_cores()[:1] and race["same_samples"] is True
    assert race["ratio_to"] == "torchvision"  # ffcv reads no tars
    first, ffcv = race["results"]
    reason = "FFCV reads .beton files only" if installed("ffcv") else "pipeline 'ffcv' cannot be used here"
    assert set(ffcv) == {"contestant", "not_measured"} and reason in ffcv["not_measured"]
    assert f"\nffcv: {ffcv['not_measured']}\n" in out
    assert first["ratios"] == [1.0, 1.0] and first["median_ratio"] == 1.0
    assert len(first["images_per_second"]) == 2 and first["min"] <= first["median"] <= first["max"]
    assert first["num_batches"] == 3 and first["crops"] == "plan" and first["first_batch_seconds"] > 0
    rows = [line.split() for line in out.splitlines()]
    assert ["ffcv", "-"] in rows and any(row[:1] == ["torchvision"] and row[4] == "1.00" for row in rows)


def test_ratios_are_taken_within_rounds() -> None:
    def entry(name: str, *seconds: float) -> Entry:
        rounds = [Round(120, each, (), 1, None) for each in seconds]
        return Entry(name, started=Started(1, 1, "plan"), num_batches=1, rounds=rounds)

    race = Race(224, (0, 1), [entry("dali", 2, 4), entry("ffcv", 4, 2), Entry("native", "not built")])
    assert race.ratios(race.entries[0]) == [2.0, 0.5]
    assert [running.contestant for running in race.running] == ["dali", "ffcv"] and race.foreign is None


def test_other_samples_are_seen() -> None:
    def entry(name: str, *checksums: int) -> Entry:
        return Entry(name, rounds=[Round(1, 1.0, checksums, 1, None)])

    entries = [entry("a", 1, 2), entry("b", 1, 2, 3), entry("c", 1, 3), entry("own order")]
    assert Race(224, (0,), entries).mismatched() == ["c"]


def broken_ffcv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Puts a package `ffcv` with this code before the real one, for child processes."""
    for package in ("ffcv", "numba"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libopencv_core.so.406 is\\ngone')", "cannot be used here: libopencv_core.so.406 is gone;"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("import os, sys; print('no memory\\n', file=sys.stderr, flush=True); os._exit(3)", "with status 3: no memory"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_a_row(
    code: str,
    reason: str,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken_ffcv(tmp_path, monkeypatch, code)
    status, out, err = bench_main(capsys, "--data", shard_set, "--pipelines", "ffcv", *SMALL)
    (line,) = [line for line in out.splitlines() if line.startswith("ffcv: ")]
    assert status == 1 and reason in line and "Traceback" not in out + err


def test_a_damaged_image_is_a_row(shard_set: Path, tmp_path: Path) -> None:
    from sdpnet.pipelines.shards.layout import open_split

    copy = tmp_path / "shards"
    shutil.copytree(shard_set, copy)
    data = bytearray((copy / "train.beton").read_bytes())
    image = open_split(copy, "train")[1].encoded(3).tobytes()
    start = data.find(image)
    data[start : start + 200] = bytes(200)
    (copy / "train.beton").write_bytes(data)
    names = ["torchvision", *(["decode"] if ceilings.available() else [])]
    race = run_race([job(name, copy, batch_size=24) for name in names], 1, seconds=0, num_batches=2)
    assert "train.beton: sample 3: damaged JPEG" in race.entries[0].reason
    if len(names) > 1:
        assert race.entries[1].reason.endswith("train.beton: the first 24 samples of the plan: 1 cannot be decoded")
    assert race.running == [] and race.reference is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["webdataset", "timm"])
def test_peers_take_their_own_crops(name: str, tar_set: Path) -> None:
    pytest.importorskip(name)
    with BenchProcess(job(name, tar_set)) as process:
        assert process.start().crops == "own"
        measured = process.round(3)
    assert measured.num_images == 15 and measured.checksums == ()
    with BenchProcess(job(name, tar_set, mode="eval")) as process, pytest.raises(ContestantError, match="train only"):
        process.start()


@pytest.mark.slow
def test_spdl_follows_the_plan(shard_set: Path) -> None:
    pytest.importorskip("spdl.io")
    with BenchProcess(job("spdl", shard_set)) as process:
        try:
            process.start()
        except ContestantError as error:
            if "libspdl" in str(error):
                pytest.skip(str(error))
            raise
        measured = process.round(4)
    expected = plan_ids(shard_set, "train", WARM_UP + 4)[WARM_UP:]
    assert measured.checksums == tuple(zlib.crc32(np.array(batch, np.int64).tobytes()) for batch in expected)


def test_a_peer_that_is_not_installed(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ModuleNotFoundError('timm')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    with BenchProcess(job("timm", shard_set)) as process, pytest.raises(ContestantError) as caught:
        process.start()
    assert str(caught.value) == f"timm is not installed: {install('timm')}"


def test_webdataset_reads_no_beton(shard_set: Path) -> None:
    pytest.importorskip("webdataset")
    with BenchProcess(job("webdataset", shard_set)) as process, pytest.raises(ContestantError, match="tars only"):
        process.start()


@pytest.mark.parametrize("name", list(ceilings.CEILINGS))
def test_ceilings_count_every_image(name: str, shard_set: Path) -> None:
    if not ceilings.available():
        pytest.skip(f"not built: {rebuild()}")
    stream = ceilings.open_ceiling(job(name, shard_set, batch_size=7, cores=(0, 1, 2)))
    assert [size for size, _ in stream.batches(2)] == [7, 7]


def test_ceilings_that_are_not_built(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "LIBRARY", replace(ceilings.LIBRARY, path=tmp_path / "absent.so"))
    assert not ceilings.available()
    with pytest.raises(ceilings.BackendMissingError, match=r"not built: (\./dev setup --retry|install g\+\+)"):
        ceilings.open_ceiling(job("decode", shard_set))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pipelines", "torchvison"], ["--pipelines", "did you mean 'torchvision'"]),
        (["--cores", "0"], ["--cores", "whole numbers from 1"]),
        (["--cores", "1,many"], ["--cores", "'1,many'"]),
        (["--image-size", "4"], ["--image-size", "from 8"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "25"], ["--batch-size", "at most 24"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--batches", "-1"], ["--batches"]),
        (["--split", "test"], ["no split 'test'", "train, val"]),
        (["--data", "nowhere"], ["nowhere", "manifest.json"]),
        (["--json", "nowhere/record.json"], ["--json", "directory"]),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], words: list[str], shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = bench_main(capsys, "--data", shard_set, *SMALL, *arguments)
    (line,) = [line for line in err.splitlines() if line]
    assert status == 2 and out == "" and line.startswith("error: ") and all(word in line for word in words), line


def descendants(process: int) -> set[int]:
    children = children_of(process)
    return children.union(*(descendants(child) for child in children))


@pytest.mark.parametrize(
    ("stop", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_stopping_it_leaves_no_process(stop: signal.Signals, status: int, shard_set: Path) -> None:
    cores = min(2, len(usable_cores()))
    command = [sys.executable, str(ROOT / "pipelines" / "bench.py"), "--data", str(shard_set), "--image-size", "32"]
    command += ["--pipelines", "torchvision", "--batch-size", "4", "--cores", str(cores), "--seconds", "60"]
    before = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); {RUN}"
    bench_process = subprocess.Popen(
        [sys.executable, "-c", before, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wanted = 1 if cores == 1 else 1 + cores  # with DataLoader's workers
        deadline = time.monotonic() + 120
        while len(found := descendants(bench_process.pid)) < wanted and time.monotonic() < deadline:
            assert bench_process.poll() is None, bench_process.communicate()
            time.sleep(0.05)
        bench_process.send_signal(stop)
        _, err = bench_process.communicate(timeout=60)
    finally:
        bench_process.kill()
    assert bench_process.returncode == status and "Traceback" not in err
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) >= wanted and not any(running(pid) for pid in found)


RUN = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
