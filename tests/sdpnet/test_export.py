from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpnet import cli
from sdpnet.checkpoints.model import ModelCard, load_model, save_model
from sdpnet.commands import export as module
from sdpnet.commands.export import Format, export
from sdpnet.model.sdpnet import create_model
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.terminal.remedy import install_extra

FORMATS = ["onnx", "torch-export"]


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    if "onnx" in request.node.name:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished model of each position embedding."""
    made = {}
    for position in ("learned", "rope", "sincos"):
        torch.manual_seed(0)
        model = create_model(
            "sdpnet_tiny",
            num_classes=3,
            conv_blocks=1,
            transformer_blocks=1,
            position=position,
            grid_size=3,
            layer_scale=0.3,
            drop_path=0.2,
            final_norm=True,
        )
        model(torch.randn(8, 3, 32, 32))
        made[position] = tmp_path_factory.mktemp(position)
        card = ModelCard(model.options, ("ant", "bee", "cow"), 32, 0.9, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), {"top1": 0.5})
        save_model(made[position], model, replace(card, preprocessing=Preprocessing("apply", 400)))
    return made


def run_file(path: Path, format: Format, images: torch.Tensor) -> torch.Tensor:
    """Logits by the file alone, as its user gets them."""
    if format == "torch-export":
        return torch.export.load(str(path)).module()(images).detach()
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(path), full_check=True)
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    return torch.from_numpy(np.asarray(evaluator.run(["logits"], {"images": images.numpy()})[0]))


@pytest.mark.parametrize(
    ("format", "position"),
    [("onnx", "learned"), ("onnx", "rope"), ("torch-export", "learned"), ("torch-export", "sincos")],
)
def test_the_file_gives_the_models_logits_for_any_batch(
    format: Format, position: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported.pt2"
    command = ["export", "--model", str(runs[position]), "--format", format, "--out", str(out)]
    assert cli.main([*command, "--image-size", "48"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 48 px, batch dynamic; differs from the model by ") and printed.count("\n") == 2
    start, code = shlex.split(printed.splitlines()[1].removeprefix("next: "))[-2:]
    assert start == "-c"
    exec(code, {})
    assert ("torch.export" if format == "torch-export" else "images") in code + capsys.readouterr().out
    model, card = load_model(runs[position])
    for batch in (1, 3, 4):
        images = torch.randn(batch, 3, 48, 48)
        with torch.no_grad():
            assert torch.allclose(run_file(out, format, images), model(images), atol=1e-5)
    facts = json.loads((tmp_path / "exported.pt2.json").read_text())
    assert facts["classes"] == ["ant", "bee", "cow"] and facts["image_size"] == 48 and facts["centre_fraction"] == 0.9
    assert facts["mean"] == list(card.mean) and facts["std"] == list(card.std)
    assert facts["preprocessing"] == {"exif": "apply", "max_side": 400}
    assert facts["steps"][1:4] == [
        "turn upright as EXIF says",
        "reduce the longer side to 400 pixels by area averaging, where it is longer",
        "crop the centre square whose side is 0.9 of the shorter side",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"exported.pt2", "exported.pt2.json"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_fixed_batch(format: Format, runs: dict[str, Path], tmp_path: Path) -> None:
    model, card = load_model(runs["rope"])
    assert export(model, card, tmp_path / "model", format, 32, batch=1) < 1e-5
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(run_file(tmp_path / "model", format, images), model(images), atol=1e-5)


def nan_in_the_second(x: torch.Tensor) -> torch.Tensor:
    return x * float("nan") if len(x) == 1 else x


@pytest.mark.parametrize("found", [lambda x: x + 1, nan_in_the_second, lambda x: x[:1]])
def test_a_file_that_differs_is_not_left(
    found, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, card = load_model(runs["rope"])
    monkeypatch.setattr(module, "_save_torch", lambda model, example, dynamic, path: path.touch())
    monkeypatch.setattr(module, "_load_torch", lambda path: lambda images: found(model(images)))
    with pytest.raises(UserError, match=r"not written: as torch-export the logits differ by \S+ from the model's"):
        export(model, card, tmp_path / "model.pt2", "torch-export", 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line(
    missing: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    out = ["--out", str(tmp_path / "model.onnx")]
    assert cli.main(["export", "--model", str(runs["rope"]), "--format", "onnx", *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: export to onnx needs {missing} (") and error.count("\n") == 1
    assert install_extra("export") in error


def test_without_onnxruntime_the_reference_checks_the_onnx_file(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model, card = load_model(runs["rope"])
    assert export(model, card, tmp_path / "model.onnx", "onnx", 32) < 1e-5


ON_A_FULL_DISK = """
import resource, signal, sys
from sdpnet import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_names_the_file(format: Format, runs: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, because what an error leaves behind may only crash as the process ends."""
    out = tmp_path / "model.x"
    command = ["export", "--model", str(runs["rope"]), "--format", format, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {out}: File too large", done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nodir/m.onnx", "the directory {}/nodir does not exist; make it first"),
        ("file/m.onnx", "the directory {}/file is not a directory"),
        ("", "is a directory; give the name of a file"),
    ],
)
def test_a_place_where_no_file_can_be_is_said_before_the_work(
    out: str,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_save_torch", lambda *_: pytest.fail("exported"))
    (tmp_path / "file").touch()
    command = ["export", "--model", str(runs["rope"]), "--format", "torch-export", "--out", str(tmp_path / out)]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path / out}: {message.format(tmp_path)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_batch_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "--model", "m", "--format", "onnx", "--out", "o", "--batch", "x"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert error == "sdpnet export: error: argument --batch: must be dynamic or a number of images, not 'x'"


def test_impossible_sizes_are_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--model", str(runs["rope"]), "--format", "torch-export", "--out", str(tmp_path / "x")]
    for more, message in (
        (["--image-size", "33"], "image_size = 33: must be a multiple of the patch size 8"),
        (["--image-size", "0"], "image_size = 0: must be a multiple of the patch size 8"),
        (["--batch", "0"], "batch = 0: must be 'dynamic' or at least 1"),
    ):
        assert cli.main([*command, *more]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not list(tmp_path.iterdir())
