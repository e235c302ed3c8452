from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import make_image
from PIL import Image

from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.build_dali import main
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "preprocess" / "build_dali.py"


def stored(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """What a split must hold, in order: each image as `encode_image` stores it, and its label."""
    found = scan(folder).splits[split]
    images = (encode_image(found.locate(index).read(), EncodeSettings()).data for index in range(found.num_images))
    return list(zip(images, found.labels.tolist(), strict=True))


def tars(shards: Path, split: str) -> list[str]:
    return [str(shards / file.name) for file in read_manifest(shards).splits[split].files]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_is_there_in_order(image_folder, tar_set, split):
    _, reader = open_split(tar_set, split)
    samples = range(reader.num_samples)
    assert [(reader.encoded(i).tobytes(), int(reader.labels[i])) for i in samples] == stored(image_folder, split)
    assert sorted(tars(tar_set, split)) == [str(path) for path in sorted(tar_set.glob(f"{split}-*.tar"))]


@pytest.mark.filterwarnings("ignore")  # the library leaves its files to the garbage collector to close
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_webdataset_library_reads_it(image_folder, tar_set, split):
    expected = stored(image_folder, split)
    read = list(webdataset.WebDataset(tars(tar_set, split), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{index:09}" for index in range(len(expected))]
    assert [(sample["jpg"], int(sample["cls"])) for sample in read] == expected
    decoded = webdataset.WebDataset(tars(tar_set, split), shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    for (pixels, label), (data, expected_label) in zip(decoded, expected, strict=True):
        assert label == expected_label
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("split", ["train", "val"])
def test_dalis_reader_reads_it(image_folder, tar_set, split):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (it is an optional backend)")
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    expected = stored(image_folder, split)
    paths = tars(tar_set, split)
    pipe = Pipeline(batch_size=1, num_threads=2, device_id=None)
    with pipe:
        indices = [str(Path(path).with_suffix(".idx")) for path in paths]
        jpg, cls = fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg", "cls"], name="reader")
        pipe.set_outputs(jpg, fn.decoders.image(jpg, output_type=types.RGB), cls)
    pipe.build()
    assert pipe.epoch_size("reader") == len(expected)
    for data, label in expected:
        encoded, pixels, digits = (output.at(0) for output in pipe.run())
        assert encoded.tobytes() == data
        assert digits.tobytes() == str(label).encode()
        difference = np.abs(pixels.astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int))
        assert difference.max() <= 2, difference.max()


def convert(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


@pytest.fixture(scope="module")
def grain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 1.9 MB together, once encoded: 20 to train with, 4 to validate."""
    root = tmp_path_factory.mktemp("grain")
    for split, count in (("train", 10), ("val", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 256, (300, 300, 3), dtype=np.uint8)
                picture = make_image(number, 300, 300) // 2 + noise // 2
                Image.fromarray(picture).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def grain_set(grain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grain_set")
    assert convert("--source", grain, "--out", out, "--shard-mib", 1) == 0
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_command_makes_several_tars_and_accounts_for_every_image(grain, grain_set, tmp_path, capsys):
    manifest = read_manifest(grain_set)
    names = {name for split in manifest.splits.values() for file in split.files for name in (file.name, *file.sidecars)}
    assert set(os.listdir(grain_set)) == {"manifest.json", *names}
    assert [len(split.files) for split in manifest.splits.values()] == [2, 1]
    assert all(file.bytes <= 1 << 20 for file in manifest.splits["train"].files)
    assert list(verify(grain_set, decode=True)) == []
    assert convert("--source", grain, "--out", tmp_path / "one") == 0
    output = capsys.readouterr().out
    assert "train: 20 images found, 20 converted" in output and "val:   4 images found, 4 converted" in output
    assert [len(split.files) for split in read_manifest(tmp_path / "one").splits.values()] == [1, 1]


def test_parts_are_merged_into_the_same_bytes(grain, grain_set, tmp_path):
    for part in ("2/3", "1/3", "3/3"):
        assert convert("--source", grain, "--out", tmp_path / "out", "--part", part) == 0
    assert main(["--merge", "--out", str(tmp_path / "out"), "--shard-mib", "1"]) == 0
    assert content(tmp_path / "out") == content(grain_set)


def test_another_size_of_tars_is_another_conversion(grain, grain_set, tmp_path, capsys):
    """An unfinished conversion is gone on with by its own command only."""
    bad = tmp_path / "in"
    for path in sorted(grain.rglob("*.png")):
        (bad / path.relative_to(grain)).parent.mkdir(parents=True, exist_ok=True)
        (bad / path.relative_to(grain)).symlink_to(path)
    (bad / "val" / "b" / "1.png").unlink()
    (bad / "val" / "b" / "1.png").write_text("no image")
    arguments = ("--source", bad, "--out", tmp_path / "out", "--shard-mib")
    assert convert(*arguments, 1) == 2
    capsys.readouterr()
    assert convert(*arguments, 2) == 2
    assert "an unfinished conversion with another kind of output lies here" in capsys.readouterr().err
    assert convert(*arguments, 1, "--on-bad", "skip") == 0
    for name in ("train-000000.tar", "train-000001.idx", "train-000001.samples"):
        assert (tmp_path / "out" / name).read_bytes() == (grain_set / name).read_bytes()


def test_mistakes_end_in_one_line(grain, grain_set, capsys):
    assert convert("--source", grain, "--out", grain_set, "--shard-mib", 0) == 2
    assert capsys.readouterr().err == "error: --shard-mib 0: must be at least 1\n"
    assert convert("--source", grain, "--out", grain_set) == 2
    assert "already holds a shard set" in capsys.readouterr().err


def test_a_foreign_tar_is_kept(grain, tmp_path, capsys):
    (tmp_path / "val-000000.tar").write_text("somebody's")
    assert convert("--source", grain, "--out", tmp_path) == 2
    assert "val-000000.tar: exists already" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["val-000000.tar"]


@pytest.mark.parametrize("start", [[SCRIPT], ["-m", "sdpnet.preprocess.build_dali"]])
def test_starts_as_a_file_and_as_a_module(start):
    command = [sys.executable, *map(str, start), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--shard-mib" in done.stdout
