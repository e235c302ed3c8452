"""Runs the decoder of image files on a folder of odd files, and compares its pixels with those of other libraries.

    python tests/support/odd_files.py FOLDER --out records/DATE-odd-files.json

It needs OpenCV, pyvips and tifffile. If a file is decoded, the result is the largest difference to each library that
reads it too (in levels of 255). If it is refused, the result is the reason, and the libraries that read it. This is not
a test: it takes minutes, and a person has to look at the differences.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sdpnet.pipelines.errors import ImageFileError  # noqa: E402
from sdpnet.pipelines.images.file import decode_image  # noqa: E402


def by_opencv(data: bytes) -> np.ndarray:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ValueError("not read")
    return pixels


def by_libvips(data: bytes) -> np.ndarray:
    import pyvips

    image = pyvips.Image.new_from_buffer(data, "", fail_on="error")
    if image.hasalpha():
        image = image.extract_band(0, n=image.bands - 1)
    if image.format in ("float", "double", "int", "uint", "short"):
        raise ValueError("samples of unknown range")
    if image.interpretation == "cmyk":
        raise ValueError("converted by its profile")
    pixels = image.colourspace("srgb").numpy()
    return (
        pixels if pixels.ndim == 3 and pixels.shape[2] == 3 else np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)
    )


def by_pillow(data: bytes) -> np.ndarray:
    """Any format that Pillow knows, except greyscale of more than 8 bits, which it clips."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "EPS":
            raise ValueError("would start Ghostscript")
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError("clipped")
        return np.asarray(image.convert("RGB"))


def by_tifffile(data: bytes) -> np.ndarray:
    """Greyscale of more than 8 bits."""
    import tifffile

    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    pixels = page.asarray().squeeze().astype(np.float64)
    if pixels.ndim != 2 or page.sampleformat != 1 or not 8 < page.bitspersample <= 16:
        raise ValueError("not compared")
    pixels = pixels * 255 / (2**page.bitspersample - 1)
    return np.repeat((255 - pixels if page.photometric == 0 else pixels)[..., None], 3, 2)


ORACLES: dict[str, Callable[[bytes], np.ndarray]] = {
    "opencv": by_opencv,
    "libvips": by_libvips,
    "pillow": by_pillow,
    "tifffile": by_tifffile,
}


def difference(path: Path, oracle: str, ours: np.ndarray | None) -> int | str | None:
    """The largest difference of pixels between the decoder and a library.

    The result is "size" if the sizes differ, "read" if only the library reads the file, and None if it does not.
    """
    warnings.simplefilter("ignore")
    try:
        theirs = ORACLES[oracle](path.read_bytes())
    except Exception:
        return None
    if ours is None:
        return "read"
    if theirs.shape != ours.shape:
        return "size"
    return int(np.ceil(np.abs(theirs.astype(np.float64) - ours).max() - 1e-9))


def judge(path: Path) -> tuple[str | None, dict[str, int | str]]:
    """The reason of a refusal, or None, and the results of `difference` by library."""
    warnings.simplefilter("ignore")
    try:
        ours, reason = decode_image(path.read_bytes()), None
    except ImageFileError as error:
        ours, reason = None, str(error)
    found = {oracle: difference(path, oracle, ours) for oracle in ORACLES}
    return reason, {oracle: value for oracle, value in found.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.is_file())
    pixels: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    crashed: list[str] = []
    pool = ProcessPoolExecutor(1)
    for number, path in enumerate(paths):
        name = path.relative_to(arguments.folder).as_posix()
        try:
            reason, found = pool.submit(judge, path).result()
        except BrokenProcessPool:  # the decoder or a library has crashed
            crashed.append(name)
            pool = ProcessPoolExecutor(1)
            continue
        said = ", ".join(f"{oracle} {value}" for oracle, value in found.items())
        if reason is None:
            pixels[said].append(name)
        else:
            refused[reason].append(f"{name} [{said}]" if said else name)
        print(f"\r{number + 1:,} of {len(paths):,}", end="", file=sys.stderr)
    packages = ("pillow", "opencv-python", "pyvips-binary", "tifffile", "numpy")
    record = {
        "what": "outcome of decode_image on real odd files; numbers are the largest difference in levels of 255",
        "versions": {package: version(package) for package in packages},
        "files": len(paths),
        "pixels": sum(map(len, pixels.values())),
        "refused": sum(map(len, refused.values())),
        "crashed": crashed,
        "decoded": dict(sorted(pixels.items(), key=lambda item: -len(item[1]))),
        "reasons": dict(sorted(refused.items(), key=lambda item: -len(item[1]))),
    }
    arguments.out.write_text(json.dumps(record, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{record['pixels']:,} decoded, {record['refused']:,} refused, {len(crashed)} crashed", file=sys.stderr)


if __name__ == "__main__":
    main()
