"""`decode_batch`: the decoder alone, on bytes and paths."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image
from pipeline_batches import load, pipeline
from torchvision.transforms.v2.functional import center_crop, horizontal_flip, resize, resized_crop

from sdpnet import decode_batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.file import decode_image


def encoded(image: np.ndarray, **options: Any) -> bytes:
    file = BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(image).convert(mode).save(file, **{"format": "JPEG", "quality": 95, **options})
    return file.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "PNG": {"format": "PNG"},
    "palette": {"format": "PNG", "mode": "P"},
    "WebP": {"format": "WEBP", "lossless": True},
}


@pytest.mark.parametrize("native_decoder", [True, False], ids=["native", "torchvision"])
def test_all_kinds_against_pillow_and_torchvision(native_decoder: bool, request: pytest.FixtureRequest) -> None:
    """Within the tolerance of decoders and resizers, which the pipelines' tests use too."""
    if native_decoder:
        request.getfixturevalue("native")
    else:
        patch = request.getfixturevalue("monkeypatch")
        patch.setattr("sdpnet.pipelines.native.decoder.available", lambda: False)
        patch.setattr("sdpnet.pipelines.images.file.native_is_built", lambda: False)
    images = [make_image(number, 90 + 7 * number, 140 - 5 * number) for number in range(len(KINDS))]
    files = [encoded(image, **options) for image, options in zip(images, KINDS.values(), strict=True)]
    boxes = [(3, 5, 60, 70 + number) for number in range(len(files))]
    flips = [number % 2 == 1 for number in range(len(files))]
    got = decode_batch(files, 48, boxes=boxes, flips=flips)
    assert got.shape == (len(files), 48, 48, 3) and got.dtype == torch.uint8 and got.is_contiguous()
    central = decode_batch(files, 48, centre_fraction=1.0)
    for number, file in enumerate(files):
        pixels = torch.from_numpy(np.array(Image.open(BytesIO(file)).convert("RGB"))).permute(2, 0, 1)
        crop = resized_crop(pixels, *boxes[number], [48, 48], antialias=True)
        expected = horizontal_flip(crop) if flips[number] else crop
        assert (got[number].permute(2, 0, 1).int() - expected.int()).abs().float().mean() <= 1, list(KINDS)[number]
        whole = resize(center_crop(pixels, [min(pixels.shape[1:])] * 2), [48, 48], antialias=True)
        assert (central[number].permute(2, 0, 1).int() - whole.int()).abs().float().mean() <= 1.5


@pytest.mark.parametrize("name", [pipeline("native")])
def test_it_is_the_native_pipeline(name: str, shard_set: Path) -> None:
    loader = load(shard_set, name)
    reader = loader.source.reader
    for batch in loader.batches(1):
        files = [reader.encoded(sample) for sample in batch.sample_ids.tolist()]
        plan = batch.plan
        for given in (files, [file.tobytes() for file in files], [torch.from_numpy(file.copy()) for file in files]):
            for threads in (1, 3):
                got = decode_batch(given, 64, boxes=plan.crop_boxes, flips=plan.flips, num_threads=threads)
                assert torch.equal(got, batch.images)
    loader.close()
    val = load(shard_set, name, "val")
    batch = next(val.batches())
    files = [val.source.reader.encoded(sample) for sample in batch.sample_ids.tolist()]
    fraction = val.source.plan.centre_fraction
    assert torch.equal(decode_batch(files, 64, centre_fraction=fraction), batch.images)
    val.close()


def test_paths_arrays_and_tensors(tmp_path: Path) -> None:
    file = encoded(make_image(1, 60, 80))
    path = tmp_path / "ein Bild.jpg"
    path.write_bytes(file)
    array = np.frombuffer(file, np.uint8)
    given: list[Any] = [file, bytearray(file), memoryview(file), path, str(path), array, torch.tensor(array)]
    got = decode_batch(given, 32)
    assert all(torch.equal(image, got[0]) for image in got) and got[0].max() > 0
    assert decode_batch([], 32).shape == (0, 32, 32, 3)
    assert torch.equal(
        decode_batch(tuple(given[:1]), 32, boxes=torch.tensor([[0, 0, 60, 80]]), flips=[False])[0],
        decode_batch(given[:1], 32, boxes=[[0, 0, 60, 80]])[0],
    )


def test_pixels_of_other_kinds_are_those_of_a_conversion(native: None) -> None:
    """A PNG's pixels go through the same crop and resize as a JPEG's."""
    image = make_image(2, 70, 70)
    png = encoded(image, format="PNG")
    assert np.array_equal(decode_image(png), image)
    assert np.array_equal(decode_batch([png], 70, boxes=[[0, 0, 70, 70]])[0], image)


BROKEN = encoded(make_image(3, 50, 50))[:700]
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("a.jpg",), {}, "images: must be a list of files (their bytes or paths), not one of them; write [image]"),
    ((b"\xff\xd8",), {}, "images: must be a list"),
    ((3,), {}, "images: must be a list"),
    (([3],), {}, "image 0: is int: must be a file's bytes"),
    (([np.zeros((2, 2), np.uint8)],), {}, "image 0: is uint8 (2, 2): must be a file's bytes"),
    ((["/nowhere/a.jpg"],), {}, "/nowhere/a.jpg: cannot be read (No such file or directory)"),
    ((["/"],), {}, "/: is a folder, not a file"),
    ((["a\0b"],), {}, "a\\x00b: cannot be read"),
    (([b""],), {}, "image 0: empty (0 bytes)"),
    (([b"what is this"],), {}, "image 0: not an image"),
    (([encoded(make_image(0, 9, 9)), BROKEN],), {}, "image 1: damaged image"),
    (
        ([encoded(make_image(0, 50, 60))],),
        {"boxes": [[0, 0, 51, 9]]},
        "image 0: the box (0, 0, 51, 9) is not inside the image of 50 x 60 pixels",
    ),
    (([encoded(make_image(0, 50, 60))],), {"boxes": [[0, -1, 5, 9]]}, "is not inside"),
    (([encoded(make_image(0, 50, 60))],), {"boxes": [[0, 0, 0, 9]]}, "is not inside"),
    (([encoded(make_image(0, 50, 60))],), {"boxes": [[1 << 62, 0, 1 << 62, 9]]}, "is not inside"),
    (([encoded(make_image(0, 9, 9))],), {"boxes": [0, 0, 9, 9]}, "boxes = int64 (4,): must be int (1, 4)"),
    (([encoded(make_image(0, 9, 9))],), {"boxes": [[0.0, 0, 9, 9]]}, "boxes = float64 (1, 4): must be int (1, 4)"),
    (([encoded(make_image(0, 9, 9))],), {"flips": [1]}, "flips = int64 (1,): must be bool (1,)"),
    (([],), {"image_size": 7}, "image_size = 7: must be 8 to 4,096 pixels"),
    (([],), {"num_threads": -1}, "num_threads = -1: must be a whole number from 0 on"),
    (([],), {"on_error": "skip"}, "on_error = 'skip': must be raise or mask"),
    (([],), {"centre_fraction": 1.5}, "centre_fraction = 1.5: must be in (0, 1]"),
    (([],), {"centre_fraction": "1"}, "centre_fraction = '1': must be in (0, 1]"),
]


@pytest.mark.parametrize(("positional", "options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_use_is_one_line(positional: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode_batch(*positional, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_that_cannot_be_decoded_may_be_black() -> None:
    good = encoded(make_image(0, 40, 40))
    got = decode_batch([good, BROKEN, b"", "/nowhere.jpg", good], 32, on_error="mask")
    assert got[1:4].max() == 0 < got[0].max() and torch.equal(got[0], got[4])


def test_no_thread_is_left() -> None:
    code = """
import time, numpy as np
from pathlib import Path
from io import BytesIO
from PIL import Image
from sdpnet import decode_batch
file = BytesIO(); Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(file, "JPEG")
decode_batch([file.getvalue()] * 9, 32, num_threads=4)
before = len(list(Path("/proc/self/task").iterdir()))
for _ in range(20): decode_batch([file.getvalue()] * 9, 32, num_threads=4)
for _ in range(500):  # a thread that was joined stays visible for a moment
    if len(list(Path("/proc/self/task").iterdir())) <= before: break
    time.sleep(0.01)
else: raise SystemExit("threads are left")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
