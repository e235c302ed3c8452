"""The build commands with worker processes that crash, hang or are killed: the image is named, and none is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_image
from conversion import convert_folder
from faults import ROOT
from PIL import Image
from processes import children_of

from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.verify import verify

COMMANDS = {"beton": ("build_ffcv", BetonWriter), "tar": ("build_dali", TarWriter)}
NUM_IMAGES = 8
VICTIM = "5.png"
# A build command whose worker processes do something else than encode the image with the name `VICTIM`, when
# one of them comes to it; from then on the file `marker` exists.
RUN = """
import importlib, subprocess, sys
module, marker, deed, *arguments = sys.argv[1:]
from sdpnet.preprocess.workers import pool as workers
workers.ASLEEP_SECONDS = 1
command = importlib.import_module("sdpnet.preprocess." + module)
WORK = '''
import os, signal, sys, time
from sdpnet.preprocess.workers import child as worker
marker, deed, *descriptors = sys.argv[1:]
def misbehave(location, settings, encode_one=worker.encode_one):
    if location.name.endswith("/5.png"):
        open(marker, "w").close()
        exec(deed)
    try:
        return encode_one(location, settings)
    finally:
        worker.encode_image = encode_image
encode_image = worker.encode_image
worker.encode_one = misbehave
worker.work(*map(int, descriptors))
'''
popen = subprocess.Popen
def start(line, **options):
    return popen([sys.executable, "-c", WORK, marker, deed, *map(str, options["pass_fds"])], **options)
subprocess.Popen = start
sys.exit(command.main(arguments))
"""
HANG = "time.sleep(1000)"
BAD = {
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder crashes (SIGSEGV)"),
    "waits": (HANG, "the decoder hangs (asleep for 1 s)"),
    "spins": ("while True: pass", "the decoder hangs (more than 0.5 s of processor time)"),
    "raises": ("worker.encode_image = lambda *_: 1 / 0", "cannot be converted (ZeroDivisionError: division by zero)"),
}
ENDED = {
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL (out of memory?)"),
    "leaves": ("raise SystemExit(4)", "ended by status 4"),
    "has no files": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))", "ended by status 1"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source")
    (root / "train" / "ant").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        Image.fromarray(make_image(number, 20 + number, 30)).save(root / "train" / "ant" / f"{number}.png")
    return root


def start(format: str, source: Path, out: Path, deed: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, COMMANDS[format][0], str(out) + ".began", deed]
    arguments = ["--source", str(source), "--out", str(out), "--workers", "1", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def require_all_but(out: Path, source: Path, format: str, bad: list[str], folder: Path) -> None:
    """The set holds exactly the images that are not bad: those that a conversion without the bad ones makes."""
    shutil.copytree(source, folder / "rest")
    for name in bad:
        (folder / "rest" / "train" / "ant" / name).unlink()
    convert_folder(folder / "rest", folder / "expected", COMMANDS[format][1])
    _, reader = open_split(out, "train")
    _, expected = open_split(folder / "expected", "train")
    assert reader.num_samples == expected.num_samples == NUM_IMAGES - len(bad)
    for sample in range(reader.num_samples):
        assert reader.encoded(sample).tobytes() == expected.encoded(sample).tobytes()
    assert list(verify(out, decode=True)) == []


@pytest.mark.parametrize(("format", "what"), [(("beton", "tar")[i % 2], what) for i, what in enumerate(BAD)])
def test_a_worker_that_fails_at_an_image(source, tmp_path, format, what):
    """It ends the command; with `--on-bad skip` it costs that image and no other."""
    deed, reason = BAD[what]
    with start(format, source, tmp_path / "out", deed, "--hang-seconds", "0.5") as running:
        _, printed = running.communicate(timeout=60)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert running.returncode == 2 and "Traceback" not in printed, printed
    assert len(errors) == 1 and errors[0].startswith(f"error: {source}/train/ant/{VICTIM}: {reason}")
    assert os.listdir(tmp_path / "out") == [".unfinished"]
    with start(format, source, tmp_path / "out", deed, "--hang-seconds", "0.5", "--on-bad", "skip") as running:
        _, printed = running.communicate(timeout=60)
    assert running.returncode == 0, printed
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["split"], entry["file"]) for entry in listed] == [("train", f"ant/{VICTIM}")]
    assert listed[0]["reason"].startswith(reason)
    require_all_but(tmp_path / "out", source, format, [VICTIM], tmp_path)


@pytest.mark.parametrize(("format", "what"), [(("beton", "tar")[i % 2], what) for i, what in enumerate(ENDED)])
def test_a_worker_that_is_ended(source, tmp_path, format, what):
    """That says nothing of the image: even `--on-bad skip` does not leave it out, and a second run has it."""
    deed, reason = ENDED[what]
    with start(format, source, tmp_path / "out", deed, "--on-bad", "skip") as running:
        _, printed = running.communicate(timeout=60)
    last = printed.splitlines()[-1]
    assert running.returncode == 2 and "Traceback" not in printed, printed
    assert last.startswith(f"error: {source}/train/ant/{VICTIM}: its worker process was {reason}")
    with start(format, source, tmp_path / "out", "pass", "--on-bad", "skip") as running:
        _, printed = running.communicate(timeout=60)
    assert running.returncode == 0 and "5 of 8 images are done already" in printed
    require_all_but(tmp_path / "out", source, format, [], tmp_path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize(("format", "on_bad"), [("beton", "fail"), ("tar", "skip")])
def test_a_worker_killed_from_outside(source, tmp_path, format, on_bad):
    with start(format, source, tmp_path / "out", HANG, "--on-bad", on_bad) as running:
        wait_for(tmp_path / "out.began")
        (worker,) = children_of(running.pid)
        os.kill(worker, signal.SIGKILL)
        _, printed = running.communicate(timeout=10)
    reason = f"error: {source}/train/ant/{VICTIM}: its worker process was ended by SIGKILL (out of memory?)"
    assert running.returncode == 2 and printed.splitlines()[-1].startswith(reason)


@pytest.mark.slow
@pytest.mark.parametrize("format", COMMANDS)
def test_a_decoder_without_end_ends_the_command(source, tmp_path, format):
    """With the default of `--hang-seconds`."""
    with start(format, source, tmp_path / "out", "while True: pass") as running:
        wait_for(tmp_path / "out.began")
        _, printed = running.communicate(timeout=20)
    reason = f"error: {source}/train/ant/{VICTIM}: the decoder hangs (more than 8 s of processor time)"
    assert running.returncode == 2 and printed.splitlines()[-1].startswith(reason)
