from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from image_files import file_bytes
from PIL import Image

from sdpnet.pipelines.images.kinds import HEAD_BYTES, kind_of

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("PNG", "PNG"),
        ("JPEG", "JPEG"),
        ("MPO", "JPEG"),
        ("GIF", "GIF"),
        ("WEBP", "WEBP"),
        ("TIFF", "TIFF"),
        ("BMP", "BMP"),
        ("DIB", "DIB"),
        ("PPM", "PPM"),
        ("AVIF", "AVIF"),
        ("JPEG2000", "JPEG2000"),
        ("TGA", None),
        ("ICO", None),
        ("PCX", None),
        ("SGI", None),
        ("DDS", None),
        ("EPS", None),
        ("PDF", None),
        ("ICNS", None),
        ("QOI", None),
    ],
)
def test_what_pillow_writes(format: str, expected: str | None) -> None:
    kind = kind_of(file_bytes(PICTURE, format))
    assert kind.format == expected
    assert expected is not None or kind.remedy


def archived(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a.jpg"), b"x")  # the name alone would add the time
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.jpg"))
    return buffer.getvalue()


def media(brand: bytes, *compatible: bytes) -> bytes:
    body = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + bytes(40)


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (media(b"heic", b"mif1", b"heic"), "a HEIC image (HEIF), which is not read: convert it to JPEG or PNG"),
        (media(b"mif1", b"heix"), "a HEIC image (HEIF), which is not read: convert it to JPEG or PNG"),
        (media(b"isom", b"mp41"), "a video (MP4 or QuickTime), not an image: extract its frames as PNG or JPEG"),
        (media(b"qt  "), "a video (MP4 or QuickTime), not an image: extract its frames as PNG or JPEG"),
        (media(b"crx ", b"isom"), "a camera's raw image (CR3), which is not read: develop it to PNG or JPEG"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image, which is not read: convert it to PNG or JPEG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image, which is not read: convert it to PNG or JPEG"),
        (b"\xff\xd8\xff\xf7\0\x0b", "a JPEG-LS image, which is not read: convert it to PNG or JPEG"),
        (b"8BPS\0\x01" + bytes(20), "a Photoshop document (PSD), which is not read: export it as PNG or JPEG"),
        (b"%PDF-1.7\n", "a PDF document, not an image: render it to PNG or JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document (EPS), not an image: render it to PNG or JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing, which is not read: render it to PNG or JPEG"),
        (b"<?xml version='1.0'?>\n<svg/>", "an SVG drawing, which is not read: render it to PNG or JPEG"),
        (b"\n<!DOCTYPE html>\n<html>", "an HTML page, not an image: download it again"),
        (b"\xef\xbb\xbf<html><body>Not found", "an HTML page, not an image: download it again"),
        ("<!-- é --><HTML>".encode("utf-16"), "an HTML page, not an image: download it again"),
        (b"<h1>404 Not Found</h1>", "an HTML page, not an image: download it again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML text, not an image: download it again"),
        (json.dumps({"error": "denied"}).encode(), "a JSON text, not an image: download it again"),
        (b"[" + b'{"a": 1},' * 1000, "a JSON text, not an image: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, not an image: run git lfs pull"),
        (gzip.compress(b"x", mtime=0), "a gzip file, not an image: unpack it"),
        (archived("zip"), "a zip archive, not an image: unpack it"),
        (b"\0\0\2\0\1\0\x10\x10", "a Windows cursor (CUR), which is not read: convert it to PNG or JPEG"),
        (file_bytes(PICTURE, "TGA"), "a TGA image, which is not read: convert it to PNG or JPEG"),
        (archived("tar"), "a tar archive, not an image: unpack it"),
        (bytes(128) + b"DICM" + bytes(9), "a DICOM file, which is not read: choose a range of values, and"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "an OpenEXR image of floating-point samples, which is not read: choose a range"),
        (b"Pf\n2 2\n-1.0\n", "a PFM image of floating-point samples, which is not read: choose a range of values"),
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw image (CR2), which is not read: develop it to PNG or JPEG"),
        (b"IIRO\x08\0\0\0", "a camera's raw image (ORF), which is not read: develop it to PNG or JPEG"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw image (RAF), which is not read: develop it to PNG or JPEG"),
        (b"RIFF\0\0\0\0AVI LIST", "a video (AVI), not an image: extract its frames as PNG or JPEG"),
        (b"\x1aE\xdf\xa3\x01", "a video (Matroska or WebM), not an image: extract its frames as PNG or JPEG"),
        (bytes(5000), "nothing but zero bytes, not an image: copy or download it again"),
        (b"\0\x05\x16\x07\0\2\0\0", "a file of macOS metadata (AppleDouble), not an image: remove it; the image lies"),
        (b"\xef\xbf\xbdPNG\r\n\x1a\n", "a PNG image that was damaged as if it were text, which is not read: copy or"),
        (b"\x93NUMPY\1\0", "a NumPy array, not an image: save it as PNG"),
        (b"data:image/png;base64,iVBORw0", "a data URI in a text, not an image: decode its base64 text into a file"),
        (b"<br />\n<b>Warning</b>: fopen", "an HTML page, not an image: download it again"),
        (base64.b64encode(file_bytes(PICTURE, "JPEG")), "a base64 text, not an image: decode it into a file"),
        (b"/annex/objects/SHA256E-s9--1.jpg\n", "a git-annex pointer, not an image: run git annex get"),
        (b"outs:\n- md5: 1f\n  path: a.jpg\n", "a DVC pointer, not an image: run dvc pull"),
        (b"Too many requests\n", "not an image but a text that begins 'Too many requests': replace or remove it"),
        (b"\x1b[2Jx\n" * 9, "not an image but a text that begins '\\x1b[2Jx': replace or remove it"),
        ("Straße ".encode() * 900, "not an image but a text that begins 'Straße Straße Straße Straße Straße Straß"),
        (b"\x89PN", "not an image of a known format (it begins with 89 50 4e): replace or remove it"),
        (b"\x07\xfe\x99\0" * 9, "not an image of a known format (it begins with 07 fe 99 00 07 fe 99 00): replace"),
    ],
)  # fmt: skip
def test_what_is_not_decoded_has_its_name_and_the_remedy_that_fits(data: bytes, refusal: str) -> None:
    kind = kind_of(data)
    assert kind.format is None
    assert kind.refusal.startswith(refusal)
    assert kind_of(data[:HEAD_BYTES]) == kind
    assert kind.refusal.isprintable()


def test_avif_is_known_by_any_of_its_brands() -> None:
    assert kind_of(media(b"mif1", b"miaf", b"avif")).format == "AVIF"
    assert kind_of(media(b"avis", b"msf1")).format == "AVIF"


@pytest.mark.parametrize("start", [b"BMW is a car\n", b"P5 is a road\n", b"Python\n", b"GIF is a format\n", b"II\n"])
def test_a_text_is_no_image_whatever_its_first_letters(start: bytes) -> None:
    assert kind_of(start * 20).format in (None, "PPM")  # P5 and white space may begin an image
    assert (kind_of(start * 20).format == "PPM") == start.startswith(b"P5")


def test_a_bitmap_with_odd_planes_is_a_bitmap() -> None:
    data = bytearray(file_bytes(Image.fromarray(PICTURE), "BMP"))
    data[26] = 5
    assert kind_of(bytes(data)).format == "BMP"
