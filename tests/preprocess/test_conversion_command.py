from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from sdpnet.preprocess import build_dali, build_ffcv
from sdpnet.preprocess.workers.pool import Workers

Usage = namedtuple("Usage", ["total", "used", "free"])
COMMANDS = [pytest.param(build_ffcv.main, id="ffcv"), pytest.param(build_dali.main, id="dali")]


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """The disk has this many bytes free; returns the folders that were asked about."""
    asked: list[Path] = []
    monkeypatch.setattr(
        "sdpnet.preprocess.conversion.command.shutil.disk_usage", lambda path: asked.append(path) or Usage(0, 0, free)
    )
    return asked


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("part", [[], ["--part", "1/2"]])
def test_a_disk_that_is_too_small_is_said_before_the_work(image_folder, tmp_path, monkeypatch, capsys, command, part):
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "a" / "b"), "--workers", "1"]
    assert command([*arguments, "--out", str(tmp_path / "plenty")]) == 0
    capsys.readouterr()
    needed = sum(os.path.getsize(path) for path in (tmp_path / "plenty").glob("*.tar")) or 500_000
    asked = set_free(monkeypatch, needed // 20)
    assert command([*arguments, *part]) == 2
    error = capsys.readouterr().err
    assert "GB (estimated from 34 of 34 images" in error and "GB free" in error
    assert ("parts and merged" in error) == bool(part)
    assert asked == [tmp_path] and not (tmp_path / "a").exists()


def test_a_disk_that_just_holds_it_is_enough(image_folder, tmp_path, monkeypatch):
    set_free(monkeypatch, 2_000_000)
    assert build_dali.main(["--source", str(image_folder), "--out", str(tmp_path), "--workers", "1"]) == 0


def test_a_large_disk_needs_no_estimate(image_folder, tmp_path, monkeypatch):
    set_free(monkeypatch, 1 << 50)
    encode = Workers.encode
    calls = []
    monkeypatch.setattr(Workers, "encode", lambda *a: calls.append(a) or encode(*a))
    assert build_ffcv.main(["--source", str(image_folder), "--out", str(tmp_path), "--workers", "1"]) == 0
    assert [call[2:] for call in calls] == [(0, 24), (0, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reencode", "often"], "invalid choice: 'often'"),
        (["--exif", "maybe"], "invalid choice: 'maybe'"),
        (["--part", "1/2", "--merge"], "not allowed with argument"),
        (["--shard-mib", "x"], "invalid int value"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        build_dali.main(["--source", "in", "--out", "out", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-mib", "0"], "--shard-mib 0: must be at least 1"),
        (["--hang-seconds", "0"], "--hang-seconds 0: must be above 0"),
        (["--hang-seconds", "nan"], "--hang-seconds nan: must be above 0"),
        (["--workers", "-1"], "--workers -1: must be 1 to 512"),
        (["--workers", "100000"], "--workers 100000: must be 1 to 512"),
    ],
)
def test_values_out_of_range(arguments, message, capsys, image_folder, tmp_path):
    assert build_dali.main(["--source", str(image_folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_the_native_codec_keeping_is_refused_before_the_work(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sdpnet.preprocess.encoding.jpeg.available", lambda: False)
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "out"), "--reencode", "auto"]
    assert build_ffcv.main([*arguments, "--on-bad", "skip"]) == 2
    assert "--reencode auto: the native JPEG codec is not built" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conversion_without_the_native_codec_says_so(image_folder, tmp_path, monkeypatch, capsys):
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("sdpnet.preprocess.encoding.jpeg.available", lambda: False)
        assert build_ffcv.main(arguments) == 0
    assert "encoded with Pillow, since the native JPEG codec is not built; it is faster: " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_under_the_progress_ends_no_conversion(command, image_folder, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert command(["--source", str(image_folder), "--out", str(tmp_path / "shards"), "--workers", "1"]) == 0
        monkeypatch.undo()
    assert (tmp_path / "shards" / "manifest.json").is_file()
