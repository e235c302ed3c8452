"""A conversion that is killed, at named points and at random ones, goes on to the same bytes; nothing looks finished
before it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conversion import convert_folder
from faults import CALLS, ROOT, Commands, Ended, Fault, command_line, contents, require_absent_or_complete
from faults import require_finished as finished

from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter

FORMATS = ("beton", "tar")
DATA = r"train.*\.(beton|tar)$"
POINTS = {
    "before the journal": Fault("open", "journal"),
    "in the journal's first line": Fault("pwrite", "journal", 1, "kill half"),
    "before the first image": Fault("add"),
    "after the first image": Fault("add", action="kill after"),
    "in an image": Fault("pwrite", DATA, 4, "kill half"),
    "before an image's record": Fault("pwrite", r"train\.records", 3),
    "in an image's record": Fault("pwrite", r"train\.records", 3, "kill half"),
    "before the fsync of images": Fault("fsync", DATA, 3),
    "between the fsyncs of images and records": Fault("fsync", r"train\.records", 3),
    "between the fsync of records and the journal's line": Fault("pwrite", "journal", 5),
    "in a line of the journal": Fault("pwrite", "journal", 5, "kill half"),
    "before the fsync of the journal": Fault("fsync", "journal", 5),
    "after a line of the journal": Fault("fsync", "journal", 5, "kill after"),
    "after the last image": Fault("finish"),
    "in the sidecars": Fault("pwrite", r"train.*\.(crc32|samples)$", 1, "kill half"),
    "before the closing checksum": Fault("sha256_of"),
    "between two checksums": Fault("sha256_of", action="kill after"),
    "between two splits": Fault("open", r"val\.records"),
    "in the last split": Fault("add", nth=10, action="kill after"),
    "before the renames": Fault("replace"),
    "between two renames": Fault("replace", nth=2),
    "after the last rename but the manifest's": Fault("io.open", "quarantine"),
    "in the quarantine": Fault("pwrite", "quarantine", 1, "kill half"),
    "before the manifest": Fault("io.open", "manifest"),
    "in the manifest": Fault("pwrite", "manifest", 1, "kill half"),
    "before the manifest's rename": Fault("replace", "manifest"),
    "after the manifest's rename": Fault("replace", "manifest", action="kill after"),
    "in the tidy-up": Fault("unlink", r"\.records", action="kill after"),
    "before the journal goes": Fault("unlink", "journal"),
    "after the journal has gone": Fault("unlink", "journal", action="kill after"),
    "after the lock has gone": Fault("unlink", "lock", action="kill after"),
    "at the very end": Fault("rmdir", action="kill after"),
}
OF_FORMAT = {
    "beton": {
        "before the tables": Fault("pwrite", r"train\.beton", 10),
        "in the field descriptors": Fault("pwrite", r"train\.beton", 10, "kill half"),
        "in the metadata": Fault("pwrite", r"train\.beton", 11, "kill half"),
        "in the allocation table": Fault("pwrite", r"train\.beton", 12, "kill half"),
        "before the header": Fault("pwrite", r"train\.beton", 13),
        "in the header": Fault("pwrite", r"train\.beton", 13, "kill half"),
        "before the last fsync": Fault("fsync", r"train\.beton", 12),
    },
    "tar": {
        "at a tar's end": Fault("pwrite", r"train-000000\.tar", 5, "kill half"),
        "between two tars": Fault("open", r"train-000001\.tar"),
        "in the second tar": Fault("pwrite", r"train-000001\.tar", 2, "kill half"),
        "before the .idx": Fault("io.open", r"train-000000\.idx"),
        "in an .idx": Fault("pwrite", r"train-000001\.idx", 1, "kill half"),
        "before the last .samples": Fault("io.open", r"train-000001\.samples"),
    },
}
NAMED = [
    pytest.param(format, fault, id=f"{format}: {name}")
    for format in FORMATS
    for name, fault in {**POINTS, **OF_FORMAT[format]}.items()
]


@pytest.fixture(scope="module")
def num_calls(commands, tiny_folder, tmp_path_factory) -> dict[str, int]:
    """Of each format: the system calls of a conversion that nobody stops."""
    calls = {}
    for format in FORMATS:
        made = commands.run(format, command_line(tiny_folder, tmp_path_factory.mktemp("calls") / "out")).calls
        calls[format] = sum(number for call, number in made.items() if call in CALLS)
    assert min(calls.values()) > 150
    return calls


def killed(commands: Commands, format: str, arguments: list[str], fault: Fault, processes: bool = False) -> Ended:
    ended = commands.run(format, arguments, fault, processes)
    assert ended.status == -signal.SIGKILL, (fault, ended)
    return ended


def at_random(seed: list[int], num_calls: int) -> Fault:
    rng = np.random.default_rng(seed)
    return Fault("*", "", 1 + int(rng.integers(num_calls)), str(rng.choice(["kill", "kill half", "kill after"])))


@pytest.mark.parametrize(("format", "fault"), NAMED)
def test_killed_at_a_named_point(commands, tiny_folder, tiny_sets, tmp_path, format, fault):
    arguments = command_line(tiny_folder, tmp_path / "out")
    killed(commands, format, arguments, fault)
    require_absent_or_complete(tmp_path / "out", tiny_sets[format])
    finished(commands.run(format, arguments), tmp_path / "out", tiny_sets[format])


@pytest.mark.parametrize("moment", range(40))
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_a_random_call(commands, tiny_folder, tiny_sets, tmp_path, num_calls, format, moment):
    arguments = command_line(tiny_folder, tmp_path / "out")
    killed(commands, format, arguments, at_random([moment], num_calls[format]))
    require_absent_or_complete(tmp_path / "out", tiny_sets[format])
    finished(commands.run(format, arguments), tmp_path / "out", tiny_sets[format])


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "kill half"])
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_every_call(commands, tiny_folder, tiny_sets, tmp_path, num_calls, format, action):
    for nth in range(1, num_calls[format] + 1):
        arguments = command_line(tiny_folder, tmp_path / str(nth))
        killed(commands, format, arguments, Fault("*", "", nth, action))
        require_absent_or_complete(tmp_path / str(nth), tiny_sets[format])
        finished(commands.run(format, arguments), tmp_path / str(nth), tiny_sets[format])


@pytest.mark.parametrize("chain", range(4))
@pytest.mark.parametrize("format", FORMATS)
def test_killed_again_and_again(commands, tiny_folder, tiny_sets, tmp_path, format, chain):
    """Each run is killed after up to 60 calls, until one gets through."""
    arguments = command_line(tiny_folder, tmp_path / "out")
    for number in count(1):
        ended = commands.run(format, arguments, at_random([chain, number], 60))
        require_absent_or_complete(tmp_path / "out", tiny_sets[format])
        if ended.status != -signal.SIGKILL:
            break
    assert number > 2
    finished(ended, tmp_path / "out", tiny_sets[format])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("in a line of the journal", "before the journal goes"),
        ("between the fsyncs of images and records", "between two renames"),
        ("in the sidecars", "between two splits"),
        ("after the last rename but the manifest's", "in the tidy-up"),
        ("in the manifest", "in the manifest"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_two_named_points(commands, tiny_folder, tiny_sets, tmp_path, format, first, second):
    arguments = command_line(tiny_folder, tmp_path / "out")
    for name in (first, second):
        killed(commands, format, arguments, POINTS[name])
        require_absent_or_complete(tmp_path / "out", tiny_sets[format])
    finished(commands.run(format, arguments), tmp_path / "out", tiny_sets[format])


@pytest.mark.parametrize("lost", ["records|journal", DATA, "records", "."])
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("format", FORMATS)
def test_power_is_lost(commands, tiny_folder, tiny_sets, tmp_path, num_calls, format, moment, lost):
    """Some files lose what was not fsynced, others keep it: what the journal says is there all the same."""
    out = tmp_path / "out"
    fault = at_random([moment, 2], num_calls[format] * 3 // 4)
    killed(commands, format, command_line(tiny_folder, out), Fault("*", "", fault.nth, fault.action, lost=lost))
    require_absent_or_complete(out, tiny_sets[format])
    finished(commands.run(format, command_line(tiny_folder, out)), out, tiny_sets[format])


@pytest.mark.parametrize("name", ["in an image", "in a line of the journal", "in the manifest"])
@pytest.mark.parametrize("format", FORMATS)
def test_killed_with_worker_processes(commands, tiny_folder, tiny_sets, tmp_path, format, name):
    arguments = command_line(tiny_folder, tmp_path / "out", "--workers", "1")
    killed(commands, format, arguments, POINTS[name], processes=True)
    require_absent_or_complete(tmp_path / "out", tiny_sets[format])
    finished(commands.run(format, arguments), tmp_path / "out", tiny_sets[format])


@pytest.fixture(scope="module")
def parts(commands, tiny_folder, tmp_path_factory) -> Path:
    """Both parts of a conversion, finished."""
    out = tmp_path_factory.mktemp("parts") / "out"
    for part in ("1/2", "2/2"):
        assert commands.run("beton", command_line(tiny_folder, out, "--part", part)).status == 0
    return out


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("part", [1, 2])
def test_a_part_is_killed(commands, tiny_folder, tiny_sets, tmp_path, parts, part, moment):
    out, other = tmp_path / "out", f"part-{3 - part}-of-2"
    shutil.copytree(parts / ".unfinished" / other, out / ".unfinished" / other)
    arguments = command_line(tiny_folder, out, "--part", f"{part}/2")
    killed(commands, "beton", arguments, at_random([moment, part], 60))
    assert os.listdir(out) == [".unfinished"]
    assert commands.run("beton", arguments).status == 0
    finished(commands.run("tar", ["--out", str(out), "--merge"]), out, tiny_sets["tar"])


MERGE_POINTS = {
    "before the first image": Fault("add"),
    "between two parts": Fault("add", nth=4),
    "in an image": Fault("pwrite", DATA, 4, "kill half"),
    "in a line of the journal": Fault("pwrite", "journal", 5, "kill half"),
    "between two renames": Fault("replace", nth=2),
    "in the manifest": Fault("pwrite", "manifest", 1, "kill half"),
    "before the parts go": Fault("unlink"),
    "when some of a part has gone": Fault("unlink", "part-1", 3),
    "when a part has gone": Fault("rmdir", "part-1", action="kill after"),
    "before the journal goes": Fault("unlink", r"unfinished/journal"),
    "after the journal has gone": Fault("unlink", r"unfinished/journal", action="kill after"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", MERGE_POINTS.values(), ids=MERGE_POINTS)
def test_a_merge_is_killed(commands, tiny_sets, tmp_path, parts, format, fault):
    out = tmp_path / "out"
    shutil.copytree(parts, out)
    killed(commands, format, ["--out", str(out), "--merge"], fault)
    require_absent_or_complete(out, tiny_sets[format])
    finished(commands.run(format, ["--out", str(out), "--merge"]), out, tiny_sets[format])


@pytest.mark.parametrize("point", ["in the last split", "between two renames"])
def test_a_merge_of_what_has_no_parts(commands, tiny_folder, tiny_sets, tmp_path, point):
    arguments = command_line(tiny_folder, tmp_path / "out")
    killed(commands, "beton", arguments, POINTS[point])
    ended = commands.run("beton", ["--out", str(tmp_path / "out"), "--merge"])
    assert ended.status == 2 and "an unfinished conversion without parts lies here; go on with that" in ended.stderr
    finished(commands.run("beton", arguments), tmp_path / "out", tiny_sets["beton"])


def test_a_part_beside_a_merge_that_was_killed(commands, tiny_folder, tiny_sets, tmp_path, parts):
    """Some files have their names: nobody is told to remove them."""
    out = tmp_path / "out"
    shutil.copytree(parts, out)
    killed(commands, "beton", ["--out", str(out), "--merge"], MERGE_POINTS["between two renames"])
    ended = commands.run("beton", command_line(tiny_folder, out, "--part", "1/2"))
    assert ended.status == 2 and "a merge of all parts was interrupted here; repeat --merge" in ended.stderr
    finished(commands.run("beton", ["--out", str(out), "--merge"]), out, tiny_sets["beton"])


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(4))
@pytest.mark.parametrize(("command", "writer"), [("build_ffcv", BetonWriter), ("build_dali", TarWriter)])
def test_all_processes_are_killed_after_a_random_time(image_folder, tmp_path, command, writer, trial):
    """As it comes from outside, and again until a run gets through."""
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "out"), "--workers", "2"]
    rng = np.random.default_rng(trial)
    for _ in range(200):
        running = subprocess.Popen(
            [sys.executable, "-m", f"sdpnet.preprocess.{command}", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.5, 4))
        if running.poll() is not None:
            break
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    convert_folder(image_folder, tmp_path / "whole", writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
