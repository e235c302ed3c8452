"""`sdpnet predict`: batches, folders and patterns, files that are bad, and what it prints."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image

from sdpnet import cli
from sdpnet.checkpoints.model import ModelCard, load_model, save_model
from sdpnet.commands.image_inputs import Missing, SkippedFiles, find_images
from sdpnet.commands.predict import Result, predict
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

CLASSES = ("n01440764", "b\x1b[2J\x7f", "猫")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    options = create_model_options("sdpnet_tiny", num_classes=5, dim=32, heads=2, patch_size=16)  # two are nobody's
    torch.manual_seed(1)
    card = ModelCard(options, CLASSES, 32, 0.875, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), {})
    save_model(directory, SdPNet(options), card)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with and without a suffix in folders in folders, and what lies among them."""
    root = tmp_path_factory.mktemp("photos")
    (root / "b" / "c").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b/c/deep.png", "b/no_suffix", "b/x.JPG", "z[1].png")):
        image = Image.fromarray(make_image(number, 40 + number, 50))
        image.save(root / name, "PNG" if "png" in name.lower() else "JPEG")
    (root / "b" / "notes.txt").write_text("notes")
    (root / "b" / "README").write_text("read")
    (root / ".hidden.jpg").write_text("hidden")
    (root / "b" / "up").symlink_to(root / "b")  # a loop
    return root


NAMES = ("a.jpg", "b/c/deep.png", "b/no_suffix", "b/x.JPG", "z[1].png")


def run(capsys: pytest.CaptureFixture[str], model: Path, *arguments: object) -> tuple[int, list[str], list[str]]:
    status = cli.main(["predict", "--model", str(model), "--device", "cpu", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_what_is_found(photos: Path) -> None:
    skipped = SkippedFiles()
    root = str(photos)
    assert list(find_images([root], skipped)) == [f"{root}/{name}" for name in NAMES]
    assert (skipped.count, skipped.example) == (2, f"{root}/b/README")
    assert list(find_images([f"{root}/z[1].png", f"{root}/b/notes.txt"])) == [f"{root}/z[1].png", f"{root}/b/notes.txt"]
    assert list(find_images([f"{root}/*.[jp]*g"])) == [f"{root}/a.jpg", f"{root}/z[1].png"]
    assert list(find_images([f"{root}/b/c*"])) == [f"{root}/b/c/deep.png"]
    assert [Path(str(path)).name for path in find_images([f"{root}/**/*.png"])] == ["deep.png", "z[1].png"]
    assert list(find_images([f"{root}/*.gif"])) == [Missing(f"{root}/*.gif", "no file has a name of this pattern")]
    assert list(find_images([""])) == [Missing("''", "an empty name")]
    (photos / "empty").mkdir()
    assert list(find_images([f"{root}/empty"])) == [Missing(f"{root}/empty", "no image is in this folder")]
    (photos / "empty").rmdir()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_change_nothing(model: Path, photos: Path, batch_size: int) -> None:
    network, card = load_model(model)
    (alone,) = predict(network, card, [photos / NAMES[1]])
    results = list(predict(network, card, find_images([str(photos)]), batch_size=batch_size))
    assert [Path(result.path).relative_to(photos).as_posix() for result in results] == list(NAMES)
    same = results[1].predictions
    assert [one.label for one in same] == [one.label for one in alone.predictions] and len(same) == 3
    np.testing.assert_allclose([one.probability for one in same], [one.probability for one in alone.predictions], 1e-4)
    values = [one.probability for one in same]
    assert values == sorted(values, reverse=True) and sum(values) < 1  # the model has two classes more


def test_only_a_few_batches_are_held(model: Path, photos: Path) -> None:
    """Inputs are taken as results are: memory does not grow with their number."""
    network, card = load_model(model)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(photos / "a.jpg")

    results = predict(network, card, endless(), batch_size=4)
    for number in range(1, 41):
        assert next(results).error is None and taken <= number + 3 * 4
    results.close()


def test_results_as_text(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    status, out, err = run(capsys, model, photos)
    assert status == 0 and err == [f"skipped in folders: 2 files that are not images, such as {photos}/b/README"]
    assert [line for line in out if not line.startswith("  ")] == [f"{photos}/{name}" for name in NAMES]
    assert sorted(line.split()[-1] for line in out[1:4]) == sorted(["tench", "b\\x1b[2J\\x7f", "猫"])


def test_results_as_json(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    status, out, _ = run(
        capsys, model, "--json", "--batch-size", 2, photos / "a.jpg", photos / "gone.jpg", photos / "b"
    )
    assert status == 1 and len(out) == 5
    lines: list[dict[str, Any]] = [json.loads(line) for line in out]
    assert [line["file"] for line in lines] == [
        f"{photos}/{name}" for name in ("a.jpg", "gone.jpg", "b/c/deep.png", "b/no_suffix", "b/x.JPG")
    ]
    assert lines[1] == {"file": f"{photos}/gone.jpg", "error": "cannot be read (No such file or directory)"}
    for line in (lines[0], *lines[2:]):
        of_class = {one["label"]: one for one in line["predictions"]}
        assert [of_class[label]["class"] for label in range(3)] == list(CLASSES)
        assert [of_class[label]["name"] for label in range(3)] == ["tench", *CLASSES[1:]]
        assert all(0 < one["probability"] < 1 for one in line["predictions"])


def test_a_bad_file_costs_itself_only(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty\n\x1b[2J.jpg").touch()
    (tmp_path / "half.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    os.mkfifo(tmp_path / "pipe")
    bad = ("text.jpg", "empty\n\x1b[2J.jpg", "half.jpg", "pipe", "absent.jpg", "*.gif")
    status, out, err = run(capsys, model, *(tmp_path / name for name in bad), photos / "a.jpg")
    assert status == 1 and out[0] == str(photos / "a.jpg") and len(out) == 4
    shown = [name.replace("\n", "\\n").replace("\x1b", "\\x1b") for name in bad]
    assert len(err) == 7 and err[6] == "6 of 7 images could not be predicted"
    for line, name in zip(err, shown, strict=False):
        assert line.startswith(f"error: {tmp_path}/{name}: "), line
    assert err[3].endswith("pipe: not a file") and "empty (0 bytes)" in err[1]
    status, out, err = run(capsys, model, tmp_path)
    assert (status, out) == (2, []) and len(err) == 5
    assert err[3:] == [
        f"skipped in folders: 1 file that is not an image, {tmp_path}/pipe",
        "3 of 3 images could not be predicted",
    ]


def test_what_the_conversion_refuses_is_refused_with_its_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow's `convert("RGB")` would give pixels, and start whatever is called gs for the document."""
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    (tmp_path / "document.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "page.png").write_text("<!doctype html><title>404</title>")
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    status, out, err = run(capsys, model, *(tmp_path / name for name in ("float.tif", "document.jpg", "page.png")))
    assert (status, out) == (2, []) and not (tmp_path / "was_run").exists()
    for line, reason in zip(err, ("floating-point", "a PostScript document", "an HTML page"), strict=False):
        with pytest.raises(UserError) as caught:
            encode_image(line.split(": ")[1], EncodeSettings())
        assert line == f"error: {caught.value}" and reason in line


def test_a_name_that_is_not_utf8_and_a_terminal_that_knows_ascii_only(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    Path(name).write_bytes((photos / "a.jpg").read_bytes())
    command = ["predict", "--device", "cpu", "--model", str(model), name]
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(command) == 0 and cli.main([*command, "--json"]) == 0
    text = shown.buffer.getvalue().decode("ascii")
    assert text.startswith(f"{tmp_path}/caf\\xe9.jpg\n") and "\\u732b" in text
    assert json.loads(text.splitlines()[-1])["file"] == name


def test_a_reader_that_has_seen_enough_ends_it_quietly(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["predict", "--device", "cpu", "--model", str(model), str(photos)]) == 141
        monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        status, out, _ = run(capsys, model, photos)
        monkeypatch.undo()
        stderr.flush()
        text = ""
        while "skipped" not in text:  # the last that is said; a terminal gives a part at a time
            text += os.read(main, 1 << 16).decode()
    os.close(main)
    assert status == 0 and len(out) == 5 * 4
    assert "5 of 5 images, " in text and text.count("images/s") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0", "a.jpg"], "--batch-size = 0: must be at least 1"),
        (["--model", "nowhere", "a.jpg"], "nowhere: not there; give the directory of a run"),
        (["--device", "cuda", "a.jpg"], "--device cuda: there is no usable GPU here"),
    ],
)
def test_mistakes(
    model: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys, model, *arguments)
    assert (status, out) == (2, []) and len(err) == 1 and err[0].startswith(f"error: {message}")


def test_a_result_is_plain_data(model: Path, photos: Path) -> None:
    network, card = load_model(model)
    (result,) = predict(network, card, [photos / "a.jpg"], top=1)
    assert isinstance(result, Result) and result.error is None and len(result.predictions) == 1
    assert result.predictions[0].class_name == CLASSES[result.predictions[0].label]
