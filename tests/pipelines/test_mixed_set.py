"""One decoder for one contract: `evaluate` on a shard set and `predict` on its original files agree on every image.

The model knows the pictures from what was drawn, not from any decoder: it takes the nearest one. Each file is a class
of its own, so a file that is turned, clipped, inverted or black goes to another class.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion import convert_folder
from PIL import Image, features
from torch import nn
from torchvision.transforms.v2 import functional as TF

from sdpnet import cli
from sdpnet.checkpoints.model import ModelCard
from sdpnet.commands import evaluate as evaluate_command
from sdpnet.commands import predict
from sdpnet.model.sdpnet import create_model_options
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.preprocess.encoding.encode import EncodeSettings

HEIGHT, WIDTH = 48, 64
SIZE, FRACTION = 32, 0.875


def blocks(seed: int, colours: int) -> np.ndarray:
    """4 x 4 blocks of strong colours, or of greys: uint8 (48, 64, 3)."""
    coarse = np.random.default_rng(seed).choice([20, 90, 165, 240], (4, 4, colours)).astype(np.uint8)
    return np.broadcast_to(np.kron(coarse, np.ones((12, 16, 1), np.uint8)), (HEIGHT, WIDTH, 3))


def png(pixels: np.ndarray, depth: int, colour_type: int) -> bytes:
    """A PNG of uint8 or uint16 (H, W, channels), written by hand: Pillow has no colour of 16 bits."""
    rows = pixels.astype(">u2" if depth == 16 else "u1")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff_of_12_bits(grey: np.ndarray) -> bytes:
    """Two pixels in three bytes, written by hand, of uint8 (H, W)."""
    values = (grey.astype(np.uint32) * 4095 + 127) // 255
    even, odd = values[:, ::2], values[:, 1::2]
    strip = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2).astype(np.uint8).tobytes()
    height, width = grey.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def saved(image: Image.Image, format: str, orientation: int = 0, **options: Any) -> bytes:
    file = io.BytesIO()
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    image.save(file, format, **options)
    return file.getvalue()


def turned(pixels: np.ndarray, orientation: int) -> Image.Image:
    """What a camera stores, held so that this orientation makes it upright."""
    back = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarter turns against the clock
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, back)))


def alpha(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)


def wide(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) * 257


# Name -> whether the picture is grey, and the file's bytes of it, uint8 (48, 64, 3).
FILES: dict[str, tuple[bool, Callable[[np.ndarray], bytes]]] = {
    "colour.png": (False, lambda p: saved(Image.fromarray(p), "PNG")),
    "grey_16.png": (True, lambda p: saved(Image.fromarray(wide(p[..., 0])), "PNG")),
    "grey_alpha_16.png": (True, lambda p: png(wide(np.dstack([p[..., 0], alpha(1)])), 16, 4)),
    "colour_16.png": (False, lambda p: png(wide(p), 16, 2)),
    "colour_alpha_16.png": (False, lambda p: png(wide(np.dstack([p, alpha(2)])), 16, 6)),
    "grey_16.tif": (True, lambda p: saved(Image.fromarray(wide(p[..., 0])), "TIFF")),
    "grey_16.pgm": (True, lambda p: b"P5 64 48 65535\n" + wide(p[..., 0]).astype(">u2").tobytes()),
    "grey_12.tif": (True, lambda p: tiff_of_12_bits(p[..., 0])),
    "palette.png": (False, lambda p: saved(Image.fromarray(p).quantize(64), "PNG")),
    "palette_transparent.png": (False, lambda p: saved(Image.fromarray(p).quantize(64), "PNG", transparency=0)),
    "gif.png": (False, lambda p: saved(Image.fromarray(p).quantize(64), "GIF")),
    "alpha.png": (False, lambda p: saved(Image.fromarray(np.dstack([p, alpha(3)])), "PNG")),
    "grey_alpha.png": (True, lambda p: saved(Image.fromarray(np.dstack([p[..., :1], alpha(4)])), "PNG")),
    "alpha.webp": (False, lambda p: saved(Image.fromarray(np.dstack([p, alpha(5) | 128])), "WEBP", quality=95)),
    "bits.png": (True, lambda p: saved(Image.fromarray(p).convert("1", dither=Image.Dither.NONE), "PNG")),
    "grey.jpg": (True, lambda p: saved(Image.fromarray(p).convert("L"), "JPEG", quality=95)),
    "progressive.jpg": (False, lambda p: saved(Image.fromarray(p), "JPEG", quality=95, progressive=True)),
    "cmyk.jpg": (False, lambda p: saved(Image.fromarray(p).convert("CMYK"), "JPEG", quality=95)),
    "cmyk.tif": (False, lambda p: saved(Image.fromarray(p).convert("CMYK"), "TIFF")),
    "turned_3.jpg": (False, lambda p: saved(turned(p, 3), "JPEG", 3, quality=95)),
    "turned_6.jpg": (False, lambda p: saved(turned(p, 6), "JPEG", 6, quality=95)),
    "turned_8.jpg": (True, lambda p: saved(turned(p, 8).convert("L"), "JPEG", 8, quality=95)),
    "turned_6.png": (False, lambda p: saved(turned(p, 6), "PNG", 6)),
    "turned_8.webp": (False, lambda p: saved(turned(p, 8), "WEBP", 8, quality=95)),
    "turned_3.tif": (False, lambda p: saved(turned(p, 3), "TIFF", 3)),
    "colour.bmp": (False, lambda p: saved(Image.fromarray(p), "BMP")),
    "avif.jpg": (False, lambda p: saved(Image.fromarray(p), "AVIF", quality=95)),
    "jpeg_2000.jpg": (False, lambda p: saved(Image.fromarray(p), "JPEG2000")),
}
if not features.check("avif"):
    del FILES["avif.jpg"]
if not features.check("jpg_2000"):
    del FILES["jpeg_2000.jpg"]
NAMES = sorted(FILES)


def picture(name: str) -> np.ndarray:
    """What is to be seen in a file."""
    pixels = blocks(zlib.crc32(name.encode()), 1 if FILES[name][0] else 3)
    return np.where(pixels > 127, np.uint8(255), np.uint8(0)) if name == "bits.png" else pixels


class NearestPicture(nn.Module):
    """Logits by the distance to each picture, upright or as it is stored, of images in [0, 1]."""

    def __init__(self, exif: str) -> None:
        super().__init__()
        crops = []
        for name in NAMES:
            pixels, side = picture(name), round(FRACTION * HEIGHT)
            # The orientation of TIFF is part of the format, and always obeyed.
            if name.startswith("turned") and exif == "ignore" and not name.endswith(".tif"):
                pixels = np.asarray(turned(pixels, int(name[7])))
            top, left = ((length - side) // 2 for length in pixels.shape[:2])
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
            crops.append(TF.resized_crop(image, top, left, side, side, [SIZE, SIZE], antialias=True))
        self.register_buffer("known", torch.stack(crops) / 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -60 * (images[:, None] - self.known).square().mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    for split in ("train", "val"):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            (root / split / name / name).write_bytes(FILES[name][1](picture(name)))
    return root


@pytest.mark.parametrize(
    ("pipeline", "exif", "max_side"),
    [("torchvision", "ignore", 500), ("torchvision", "apply", 40), ("native", "apply", 500)],
)
def test_evaluate_and_predict_agree_on_every_image(
    pipeline: str,
    exif: str,
    max_side: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if pipeline == "native" and not native_decoder.available():
        pytest.skip("the native decoder is not built")
    settings = EncodeSettings(max_side=max_side, exif=exif, quality=95, subsampling="4:4:4")
    manifest = convert_folder(source, tmp_path / "shards", settings=settings)
    assert list(manifest.classes) == NAMES and manifest.splits["val"].num_samples == len(NAMES)
    options = create_model_options("sdpnet_tiny", num_classes=len(NAMES))
    of_shards = Preprocessing.of(manifest.encode)
    card = ModelCard(options, manifest.classes, SIZE, FRACTION, (0.0,) * 3, (1.0,) * 3, {}, preprocessing=of_shards)
    for module in (evaluate_command, predict):
        monkeypatch.setattr(module, "load_model", lambda *_: (NearestPicture(exif), card))

    table = tmp_path / "classes.csv"
    data = ["--data", str(tmp_path / "shards"), "--pipeline", pipeline, "--batch-size", "8", "--amp", "fp32"]
    assert cli.main(["evaluate", "--model", "m", *data, "--device", "cpu", "--per-class", str(table), "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["val_loss"]
    with table.open(newline="") as file:
        hits = {row["name"]: float(row["top1"]) for row in csv.DictReader(file)}
    assert hits == dict.fromkeys(NAMES, 1.0)

    assert cli.main(["predict", "--model", "m", "--device", "cpu", "--json", str(source / "val")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(line["file"]).name: line["predictions"][0]["name"] for line in lines} == {n: n for n in NAMES}
    own = np.array([line["predictions"][0]["probability"] for line in lines])
    assert own.min() > 0.3 and -np.log(own).mean() == pytest.approx(loss, rel=0.05)  # JPEG's loss, and no more
