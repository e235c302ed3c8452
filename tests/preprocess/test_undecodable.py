"""The one strict decoder in `adopt --decode`, `verify --decode`, and the torchvision and native pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversion import write_samples
from jpeg_files import joined, make_image, pillow_jpeg, segments
from pipeline_batches import load

from sdpnet.pipelines.errors import ShardError
from sdpnet.preprocess.adopt import main
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.encoding.encode import EncodedImage
from sdpnet.preprocess.verify import verify


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """Six images; the codes of sample 4 end too early, of which libjpeg only warns, and Pillow says nothing."""
    images = []
    for number in range(6):
        jpeg = pillow_jpeg(make_image(number, 40, 57), restart_marker_rows=1)
        if number == 4:
            found, rest = segments(jpeg)
            marker = rest.index(b"\xff\xd1")
            jpeg = joined(found, rest[: marker - 20] + rest[marker:])
        images.append(EncodedImage(jpeg, 40, 57))
    (file,) = write_samples(BetonWriter, tmp_path, "train", images)
    (tmp_path / "train.crc32").unlink()
    return tmp_path / file.name


def test_what_one_refuses_all_refuse(native: None, beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--train", str(beton), "--decode"]) == 2
    said = capsys.readouterr().err
    assert f"{beton}: sample 4: cannot be decoded (Corrupt JPEG data: premature end of data segment)" in said
    assert sorted(path.name for path in beton.parent.iterdir()) == ["train.beton"]
    assert main(["--train", str(beton)]) == 0
    assert list(verify(beton.parent)) == []
    assert [problem.sample for problem in verify(beton.parent, decode=True)] == [4]
    for name in ("native", "torchvision"):
        loader = load(beton.parent, name, val_split="train", split="val", num_workers=1, centre_fraction=1.0)
        with pytest.raises(ShardError, match=r"sample 4: damaged JPEG \(Corrupt JPEG data: premature end"):
            list(loader.batches())
        loader.close()
