from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpnet.preprocess.make_synthetic import FORMS, main, make_synthetic
from sdpnet.preprocess.sources.scan import scan

SCRIPT = Path(__file__).resolve().parents[2] / "preprocess" / "make_synthetic.py"


def pixels_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.float64)


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "images"
    make_synthetic(out, seed=3, num_classes=4, train_per_class=12, val_per_class=5)
    return out


def test_it_is_an_image_folder(folder):
    found = scan(folder)
    assert found.classes == tuple(sorted(list(FORMS)[:4]))
    assert {name: split.num_images for name, split in found.splits.items()} == {"train": 48, "val": 20}
    sizes = np.array([pixels_of(path).shape[:2] for path in folder.rglob("*.jpg")])
    assert sizes.min() >= 48 and sizes.max() <= 160
    ratios = sizes[:, 1] / sizes[:, 0]
    assert ratios.min() < 0.8 and ratios.max() > 1.25
    assert len(np.unique(sizes, axis=0)) > 50
    assert os.listdir(folder.parent) == ["images"]


def test_equal_arguments_give_equal_bytes(folder, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    make_synthetic(tmp_path / "again", seed=3, num_classes=4, train_per_class=12, val_per_class=5)
    assert digests(tmp_path / "again") == digests(folder)


def test_an_image_depends_on_its_own_place_alone(folder, tmp_path):
    make_synthetic(tmp_path / "fewer", seed=3, num_classes=2, train_per_class=3, val_per_class=1)
    ours, all_of_them = digests(tmp_path / "fewer"), digests(folder)
    assert ours.items() <= all_of_them.items()
    assert len(set(all_of_them.values())) == len(all_of_them)
    make_synthetic(tmp_path / "other", seed=4, num_classes=2, train_per_class=3, val_per_class=1)
    assert set(digests(tmp_path / "other").values()).isdisjoint(all_of_them.values())


def test_colour_alone_does_not_tell_the_class(tmp_path):
    make_synthetic(tmp_path / "out", train_per_class=30, val_per_class=10, min_side=48, max_side=64)
    found = scan(tmp_path / "out")
    features = {}
    for name, split in found.splits.items():
        pixels = [pixels_of(split.locate(index).path) for index in range(split.num_images)]
        features[name] = np.array([np.concatenate([image.mean((0, 1)), image.std((0, 1))]) for image in pixels])
    train, val = found.splits["train"], found.splits["val"]
    distances = np.linalg.norm(features["val"][:, None] - features["train"][None], axis=-1)
    nearest = train.labels[distances.argmin(axis=1)]
    assert (nearest == val.labels).mean() < 0.3  # by chance 0.1


def test_every_form_shows_both_colours(tmp_path):
    make_synthetic(tmp_path / "out", num_classes=len(FORMS), train_per_class=4, val_per_class=0)
    assert sorted(os.listdir(tmp_path / "out")) == ["train"]
    for path in (tmp_path / "out").rglob("*.jpg"):
        lightness = pixels_of(path).mean(-1)
        low, high = np.percentile(lightness, [2, 98])
        share = (lightness > (low + high) / 2).mean()
        assert 0.03 < share < 0.97, path


def test_the_script(tmp_path):
    arguments = ["--out", "pictures", "--classes", "2", "--train-per-class", "2", "--val-per-class", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pictures: 2 classes" in done.stdout
    assert os.listdir(tmp_path) == ["pictures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "17"], "--classes 17: must be 2 to 16"),
        (["--train-per-class", "0"], "--train-per-class 0"),
        (["--min-side", "200"], "--max-side 160: must be 200 to"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_values_out_of_range(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_what_is_there_is_kept(folder, capsys):
    before = digests(folder)
    assert main(["--out", str(folder)]) == 2
    assert "exists already; remove it, or choose another --out" in capsys.readouterr().err
    assert digests(folder) == before
