"""Files, folders and classes with names that would act on a terminal: every command prints them as text on one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sdpnet import cli
from sdpnet.pipelines.terminal.next_step import next_line, sdpnet
from sdpnet.preprocess import adopt, build_ffcv, make_synthetic, verify
from sdpnet.preprocess import describe as report
from sdpnet.preprocess.conversion.progress import Meter

HOSTILE = "[red]x\x1b[2J\x9b\n\r\t\u202e\udce9"
SHOWN = r"[red]x\x1b[2J\x9b\n\r\t\u202e\xe9"
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def printed(capsys: pytest.CaptureFixture[str], *, shows: bool = True) -> str:
    """What was printed, which has the name as text, and nothing of it that acts."""
    output = capsys.readouterr()
    text = output.out + output.err
    assert FORBIDDEN.search(text) is None and text
    assert (SHOWN in text or repr(HOSTILE)[1:-1] in text) == shows
    return text


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split, count in (("train", 16), ("val", 2)):
        folder = tmp_path / HOSTILE / split / HOSTILE
        folder.mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number).save(folder / f"{number}{HOSTILE}.png")
    return tmp_path / HOSTILE


def test_conversion_and_what_looks_at_its_shards(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    (images / "train" / HOSTILE / f"0{HOSTILE}.png").write_bytes(b"nothing")
    out = tmp_path / f"shards {HOSTILE}"
    flags = ["--source", str(images), "--out", str(out), "--workers", "1"]
    assert build_ffcv.main(flags) == 2
    printed(capsys)
    assert build_ffcv.main([*flags, "--on-bad", "skip"]) == 0
    printed(capsys)
    for command in (verify.main, report.main):
        assert command([str(out)]) in (0, 1)
        printed(capsys, shows=command is report.main)
    page = (out / "report.html").read_bytes().decode()
    assert SHOWN in page and FORBIDDEN.search(page) is None
    (out / "train.beton").write_bytes(b"")
    (out / f"{HOSTILE}.tar").touch()
    assert verify.main([str(out)]) == 1
    assert f"note: {SHOWN}.tar: the manifest does not name it" in printed(capsys)
    assert verify.main([str(images)]) == report.main([str(images)]) == 2
    printed(capsys)
    for name in ("manifest.json", "val.crc32", "quarantine.jsonl"):
        (out / name).unlink()
    assert adopt.main(["--val", str(out / "val.beton")]) == 0
    printed(capsys)
    assert adopt.main(["--train", str(out / "train.beton"), "--val", str(out / "val.beton")]) == 2
    printed(capsys)


def test_other_commands(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    name = str(images)
    made = str(tmp_path / f"made {HOSTILE}")
    size = ["--classes", "2", "--train-per-class", "1", "--val-per-class", "1"]
    assert make_synthetic.main(["--out", made, *size]) == 0
    printed(capsys)
    for arguments in (
        ["report", name],
        ["report", name, "--out", f"{name}.pdf"],
        ["sheet", "--data", name],
        ["sheet", "--config", name],
        ["doctor", "--data", name],
        ["bench", "step", "--data", name, "--model", "sdpnet_l"],
        ["bench", "step", "--model", f"sdpnet{HOSTILE}"],
    ):
        assert cli.main(arguments) == 2, arguments
        text = printed(capsys)
        assert text.startswith("error: ") and text.count("\n") == 1, arguments


def test_a_run(images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    config = {"data": {"path": HOSTILE}, "optim": {"lr": "[red]"}}
    (images / "config.yaml").write_text(json.dumps(config))
    (images / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1, "lr": 1}\n')
    assert cli.main(["report", str(images), str(images)]) == 0
    text = printed(capsys)
    assert f"{next_line(*sdpnet('train', '--resume', '--out'))} $'" in text


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(HOSTILE, 1, 3) as meter:
        meter.note(f"waiting for {HOSTILE}")
    text = printed(capsys)
    assert text.splitlines()[-1] == f"{SHOWN}: waiting for {SHOWN}"
