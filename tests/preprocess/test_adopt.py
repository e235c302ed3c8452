"""Files by FFCV's own writer as shard sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from ffcv_writer import write_with_ffcv
from jpeg_files import make_image
from pipeline_batches import collect, load

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.adopt import adopt, main
from sdpnet.preprocess.verify import verify

pytest.importorskip("ffcv")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ffcv")
    samples = [(make_image(i, 40 + i, 70 - i), i % 3) for i in range(12)]
    write_with_ffcv({folder / "a.beton": "jpg", folder / "b.beton": "raw"}, samples)
    return folder


@pytest.fixture
def files(written: Path, tmp_path: Path) -> dict[str, Path]:
    for name in ("a.beton", "b.beton"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    return {"train": tmp_path / "a.beton", "val": tmp_path / "b.beton"}


@pytest.mark.usefixtures("native")
def test_it_becomes_a_shard_set(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--train", str(files["train"]), "--val", str(files["val"])]) == 0
    assert "train 12, val 12, 3 classes" in capsys.readouterr().out
    assert list(verify(tmp_path, decode=True)) == []
    manifest, reader = open_split(tmp_path, "train")
    assert reader.num_samples == 12 and reader.labels.tolist() == [0, 1, 2] * 4
    assert manifest.classes == ("0", "1", "2") and manifest.splits["val"].num_kept == 0
    for split in ("train", "val"):  # JPEGs without restart markers, and raw pixels
        ours, theirs = (collect(load(tmp_path, name, split)) for name in ("native", "torchvision"))
        assert [batch.labels.tolist() for batch in ours] == [batch.labels.tolist() for batch in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert (a.images.int() - b.images.int()).abs().max() <= 1


def test_a_changed_sample_is_found(files: dict[str, Path], tmp_path: Path) -> None:
    adopt(files)
    _, reader = open_split(tmp_path, "val")
    content = bytearray(files["val"].read_bytes())
    start = bytes(content).index(reader.encoded(3).tobytes())
    content[start + 100] ^= 1
    files["val"].write_bytes(content)
    problems = [str(problem) for problem in verify(tmp_path)]
    assert any("sample 3" in problem for problem in problems)


def test_names_of_classes(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names").write_text("ant\nbee\ncow\ndog\n")
    arguments = ["--train", str(files["train"]), "--classes", str(tmp_path / "names")]
    assert main(arguments) == 0
    assert open_split(tmp_path, "train")[0].classes == ("ant", "bee", "cow", "dog")
    assert main(arguments) == 2
    assert "there is a manifest.json already" in capsys.readouterr().err


def test_what_it_refuses(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="labels from 0 to 2, but there are 2 classes"):
        adopt(files, ("ant", "bee"))
    (tmp_path / "other").mkdir()
    moved = files["val"].rename(tmp_path / "other" / "b.beton")
    with pytest.raises(UserError, match="must lie in one folder"):
        adopt({**files, "val": moved})
    moved.write_bytes(moved.read_bytes()[:-10])
    with pytest.raises(ShardError, match="allocation table"):
        adopt({"val": moved})
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("*.crc32"))
    assert main([]) == 2
    assert "no file given" in capsys.readouterr().err
    assert main(["--train", str(tmp_path / "nothing.beton")]) == 2
