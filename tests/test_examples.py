"""The examples: each runs as a process on a small shard set of drawn shapes, learns, and continues where it stopped."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion import convert_folder

from sdpnet.preprocess.make_synthetic import make_synthetic

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "look_inside.ipynb"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
STOPPED = ROOT / "tests" / "support" / "stopped_example.py"
STOPPED_STATUS = 9
SMALL = ("--image-size", "32", "--batch-size", "16", "--epochs", "2")  # 10 steps an epoch
STOPPED_AFTER, SAVED_EVERY = 17, 6  # the last checkpoint is that of step 12, in the second epoch


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of four classes with 40 training and 20 validation images each, of about 64 pixels a side."""
    images, out = tmp_path_factory.mktemp("shapes") / "images", tmp_path_factory.mktemp("shards")
    make_synthetic(images, num_classes=4, train_per_class=40, val_per_class=20, min_side=48, max_side=80)
    convert_folder(images, out)
    return out


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 40, 20, 10 and 5 training images."""
    images, out = tmp_path_factory.mktemp("unequal") / "images", tmp_path_factory.mktemp("shards")
    make_synthetic(images, num_classes=4, train_per_class=40, val_per_class=20, min_side=48, max_side=80)
    for number, folder in enumerate(sorted((images / "train").iterdir())):
        for image in sorted(folder.iterdir())[40 >> number :]:
            image.unlink()
    convert_folder(images, out)
    return out


def run(name: str, *arguments: object, stop_after: int | None = None, **environment: str) -> str:
    """Runs an example and returns its output. With `stop_after` it is ended after so many batches."""
    command = [str(EXAMPLES / name), *map(str, arguments)]
    if stop_after is not None:
        command = [str(STOPPED), str(stop_after), *command]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == (0 if stop_after is None else STOPPED_STATUS), done.stdout + done.stderr
    return done.stdout


def requires(*modules: str) -> None:
    """Skips where a package of the extra `examples` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss (-?[\d.]+)", output)]


# ---- what all have in common


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_and_can_be_copied(script: Path) -> None:
    text = script.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) < 60
    assert f"examples/{script.name} --data SHARDS" in (ast.get_docstring(tree) or ""), "how it is started"
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported if node.module and node.module.startswith("sdpnet")] == ["sdpnet"]


def test_all_are_there() -> None:
    wanted = ("accelerate_loop", "balanced_finetuning", "lightning_module", "plain_pytorch", "timm_model", "two_views")
    assert [script.stem for script in SCRIPTS] == list(wanted)


# ---- each of them


PLAIN = (*SMALL, "--lr", 0.02, "--save-every", SAVED_EVERY, "--checkpoint")


@pytest.fixture(scope="module")
def plain(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output and the last checkpoint of plain_pytorch.py, not interrupted."""
    checkpoint = tmp_path_factory.mktemp("plain") / "whole.pt"
    return run("plain_pytorch.py", "--data", shapes, *PLAIN, checkpoint), checkpoint


def test_plain_pytorch_continues_at_the_batch_of_its_checkpoint(
    shapes: Path, plain: tuple[str, Path], tmp_path: Path
) -> None:
    output, whole = plain
    parts = tmp_path / "parts.pt"
    run("plain_pytorch.py", "--data", shapes, *PLAIN, parts, stop_after=STOPPED_AFTER)
    again = run("plain_pytorch.py", "--data", shapes, *PLAIN, parts)
    assert "continues at step 12, in epoch 1" in again
    first, last = losses(output)
    assert last < first
    assert output.splitlines()[-1].partition("top-1")[2] == again.splitlines()[-1].partition("top-1")[2]
    one, other = torch.load(parts), torch.load(whole)
    assert one["loader"] == other["loader"] and one["loader"]["epoch"] == 2 and one["loader"]["batch"] == 0
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])


def test_timm(shapes: Path) -> None:
    requires("timm")
    small = ("--model", "test_resnet", "--epochs", 3, "--warmup-epochs", 1, "--lr", 0.005, "--augment", "cifar10")
    found = losses(run("timm_model.py", "--data", shapes, *SMALL, *small))
    assert len(found) == 3 and found[-1] < found[0]


def test_lightning_restores_the_state_of_the_loader(shapes: Path, tmp_path: Path) -> None:
    requires("lightning", "torchmetrics")
    arguments = ("--data", shapes, *SMALL, "--lr", 0.02, "--save-every", SAVED_EVERY, "--out", tmp_path)
    run("lightning_module.py", *arguments, stop_after=STOPPED_AFTER)
    for step, batch in ((12, 2), (18, 8)):
        saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
        (loader,) = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert (saved["global_step"], loader["batch"]) == (step, batch)
        if step == 12:
            run("lightning_module.py", *arguments)
    lines = [path.read_text().splitlines() for path in sorted(tmp_path.glob("lightning_logs/*/metrics.csv"))]
    assert len(lines) == 2 and "loss" in lines[1][0] and lines[1][-1].startswith("1,"), "of the second epoch alone"


def test_accelerate_restores_the_state_of_the_loader(shapes: Path, tmp_path: Path) -> None:
    requires("accelerate")
    small = ("--data", shapes, *SMALL, "--model", "resnet18", "--save-every", SAVED_EVERY, "--out", tmp_path)
    run("accelerate_loop.py", *small, stop_after=STOPPED_AFTER)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["00000006", "00000012"]
    again = run("accelerate_loop.py", *small)
    assert re.match(r"epoch 1: loss [\d.]+, top-1 [\d.]+%$", again), "the first epoch was finished already"
    loader = torch.load(tmp_path / "00000018" / "custom_checkpoint_1.pkl")
    assert (loader["epoch"], loader["batch"]) == (1, 8)


def test_two_views(shapes: Path, tmp_path: Path) -> None:
    small = ("--image-size", 16, "--small-size", 12, "--batch-size", 32, "--model", "resnet18", "--lr", 4)
    output = run("two_views.py", "--data", shapes, *small, "--epochs", 2, "--out", tmp_path / "backbone.pt")
    first, last = losses(output)
    assert last < first < 0.1 and min(map(float, re.findall(r"codes ([\d.]+)", output))) > 0.5, "not collapsed"
    assert "layer4.1.bn2.weight" in torch.load(tmp_path / "backbone.pt")


def test_balanced_finetuning(unequal: Path, plain: tuple[str, Path]) -> None:
    small = ("--batch-size", 15, "--epochs", 3, "--weights", plain[1], "--subset", 0.8, "--lr", 0.003)
    output = run("balanced_finetuning.py", "--data", unequal, *SMALL, *small)
    first, _, last = losses(output)
    assert last < first
    drawn = [[int(n) for n in epoch.split(", ")] for epoch in re.findall(r"drawn of each \[(.*)\]", output)]
    assert [sum(epoch) for epoch in drawn] == [60, 60, 60] and len(drawn[0]) == 4
    # Each class has 60 draws of probability 1/4: 15 with a standard deviation of 3.4. Without weights, the last has 4.
    assert min(map(min, drawn)) > 4


# ---- the notebook


def test_the_notebook_has_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]


def test_the_notebook_runs(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requires("nbclient", "nbformat", "ipykernel", "plotly")
    import nbformat
    from nbclient import NotebookClient

    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    values = {"DATA": str(shapes), "IMAGE_SIZE": 32, "BATCH_SIZE": 16, "EPOCHS": 1}
    for name, value in values.items():
        parameters.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", parameters.source)
        assert count == 1
    NotebookClient(notebook, timeout=120).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "application/vnd.plotly.v1+json"} <= kinds
    text = "".join(output.get("text", "") for output in outputs)
    assert "4 classes: checker, disc, ring, stripes" in text and "epoch 0 again is the same: True" in text
