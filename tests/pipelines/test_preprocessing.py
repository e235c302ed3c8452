"""What the conversion does to pixels before the crop, repeated from a shard set's manifest and a model's card."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conversion import convert_folder
from PIL import Image, ImageOps

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.images.strict_jpeg import decode_jpeg
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.encoding.encode import EncodeSettings


def photograph(orientation: int) -> bytes:
    """60 x 40 pixels, red on the left and blue on the right as stored, with this EXIF orientation."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0], pixels[:, 30:, 2] = 220, 220
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_what_a_manifest_says() -> None:
    assert Preprocessing.of({"exif": "apply", "max_side": 400, "quality": 90}) == Preprocessing("apply", 400)
    assert Preprocessing.of({"encoder": "another program"}) == Preprocessing() == Preprocessing("ignore", 0)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_exif_says(exif: str, orientation: int) -> None:
    data = photograph(orientation)
    image = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(image) if exif == "apply" else image)
    assert np.array_equal(Preprocessing(exif).pixels(data), expected)


@pytest.mark.parametrize(("max_side", "size"), [(0, (40, 60)), (60, (40, 60)), (30, (20, 30)), (15, (10, 15))])
def test_the_longer_side_is_reduced(max_side: int, size: tuple[int, int]) -> None:
    pixels = Preprocessing(max_side=max_side).pixels(photograph(1))
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    half = size[1] // 2
    assert (pixels[:, : half - 1] == (220, 0, 0)).all() and (pixels[:, half + 1 :] == (0, 0, 220)).all()


@pytest.mark.parametrize("settings", [EncodeSettings(), EncodeSettings(max_side=45, exif="apply", quality=100)])
def test_the_conversion_stores_these_pixels(settings: EncodeSettings, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_bytes(data := photograph(6))
    manifest = convert_folder(tmp_path, tmp_path / "out", settings=settings)
    _, reader = open_split(tmp_path / "out", "train")
    stored = decode_jpeg(reader.encoded(0), *reader.sizes[0].tolist())
    ours = Preprocessing.of(manifest.encode).pixels(data)
    assert ours.shape == stored.shape and np.abs(ours.astype(int) - stored).mean() < 2


def test_values_out_of_range() -> None:
    for wrong in ({"exif": "turn"}, {"max_side": -1}, {"max_side": "500"}, {"max_side": True}, {"exif": None}):
        with pytest.raises(UserError, match=rf"{next(iter(wrong))} = .*: must be"):
            Preprocessing(**wrong)  # type: ignore[arg-type]


def test_it_is_plain_json() -> None:
    facts = vars(Preprocessing("apply", 500))
    assert Preprocessing(**json.loads(json.dumps(facts))) == Preprocessing("apply", 500)
