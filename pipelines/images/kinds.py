"""Identifies files by their first bytes, whatever their suffix, and says what to do with those that are not decoded."""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

__all__ = ["HEAD_BYTES", "MAX_PIXELS", "Kind", "kind_of"]

MAX_PIXELS: Final = 178_956_970  # twice Pillow's MAX_IMAGE_PIXELS, Pillow's own limit, and that of the native decoders
HEAD_BYTES: Final = 4096  # the number of bytes at a file's start that `kind_of` needs


class Kind(NamedTuple):
    """The kind of a file.

    Attributes:
        name: the kind in words, such as "a PNG image", "an HTML page" or "not an image of a known format".
        format: Pillow's name of the format if `sdpnet.pipelines.images.file` decodes it, else None.
        is_image: whether the file is an image, or a document that shows one.
        remedy: what to do with the file if it is not decoded.
    """

    name: str
    format: str | None
    is_image: bool
    remedy: str

    @property
    def refusal(self) -> str:
        """Why a file of this kind is not decoded, and what to do, as part of a sentence."""
        if self.name.startswith("not an image"):
            return f"{self.name}: {self.remedy}"
        return f"{self.name}, {'which is not read' if self.is_image else 'not an image'}: {self.remedy}"


_CONVERT: Final = "convert it to PNG or JPEG"
_EXPORT: Final = "export it as PNG or JPEG"
_RENDER: Final = "render it to PNG or JPEG"
_REMOVE: Final = "replace or remove it"
_DOWNLOAD: Final = "download it again"
_UNPACK: Final = "unpack it"
_DEVELOP: Final = "develop it to PNG or JPEG"
_RANGE: Final = "choose a range of values, and convert it to PNG or JPEG"
_FRAMES: Final = "extract its frames as PNG or JPEG"

# (offset, bytes, Pillow's name, name): the formats that are decoded.
_DECODED: Final = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG", "a PNG image"),
    (0, b"GIF87a", "GIF", "a GIF image"),
    (0, b"GIF89a", "GIF", "a GIF image"),
    (0, b"II*\0", "TIFF", "a TIFF image"),
    (0, b"MM\0*", "TIFF", "a TIFF image"),
    (0, b"II+\0", "TIFF", "a BigTIFF image"),
    (0, b"MM\0+", "TIFF", "a BigTIFF image"),
    (0, b"MM*\0", "TIFF", "a TIFF image"),  # written by mistake; Pillow reads both
    (0, b"II\0*", "TIFF", "a TIFF image"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000", "a JPEG 2000 image"),
)

# (offset, bytes, name, what to do): images that were damaged by a transfer in text mode.
_BINARY: Final = "copy or download it again as a binary file"
_MANGLED: Final = tuple(
    (0, start, f"a {name} image that was damaged as if it were text", _BINARY)
    for name, starts in {
        "PNG": (b"\x89PNG\n", b"\x89PNG\r\r\n", b"\x89PNG\r\n\x1a\r\n", b"\xc2\x89PNG", b"\xef\xbf\xbdPNG", b"?PNG"),
        "JPEG": (b"\xef\xbf\xbd" * 3, b"\xc3\xbf\xc3\x98\xc3\xbf"),
    }.items()
    for start in starts
)

# (offset, bytes, name, what to do): images that are not decoded. Longer and rarer beginnings come first, because a
# shorter one would match their files too.
_IMAGES: Final = (
    (0, b"\xff\xd8\xff\xf7", "a JPEG-LS image", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _CONVERT),
    (0, b"\xff\x10\xff\x50", "a JPEG XS image", _CONVERT),
    (0, b"II\xbc", "a JPEG XR image", _CONVERT),
    (8, b"CR\x02\0", "a camera's raw image (CR2)", _DEVELOP),
    (0, b"IIRO", "a camera's raw image (ORF)", _DEVELOP),
    (0, b"IIRS", "a camera's raw image (ORF)", _DEVELOP),
    (0, b"MMOR", "a camera's raw image (ORF)", _DEVELOP),
    (0, b"IIU\0", "a camera's raw image (RW2)", _DEVELOP),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw image (RAF)", _DEVELOP),
    (0, b"\0MRM", "a camera's raw image (MRW)", _DEVELOP),
    (0, b"FOVb", "a camera's raw image (X3F)", _DEVELOP),
    (6, b"HEAPCCDR", "a camera's raw image (CRW)", _DEVELOP),
    (0, b"8BPS\0\x01", "a Photoshop document (PSD)", _EXPORT),
    (0, b"8BPS\0\x02", "a Photoshop document (PSB)", _EXPORT),
    (0, b"gimp xcf", "a GIMP image (XCF)", _EXPORT),
    (0, b"PDN3", "a Paint.NET image", _EXPORT),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)", _RENDER),
    (40, b" EMF", "a Windows metafile (EMF)", _RENDER),
    (0, b"AT&TFORM", "a DjVu document", _RENDER),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image of floating-point samples", _RANGE),
    (0, b"#?RADIANCE", "a Radiance HDR image of floating-point samples", _RANGE),
    (0, b"#?RGBE", "a Radiance HDR image of floating-point samples", _RANGE),
    (0, b"PF\n", "a PFM image of floating-point samples", _RANGE),
    (0, b"Pf\n", "a PFM image of floating-point samples", _RANGE),
    (128, b"DICM", "a DICOM file", _RANGE),
    (0, b"SIMPLE  =", "a FITS file", _RANGE),
    (344, b"n+1\0", "a NIfTI file", _RANGE),
    (0, b"P7\n", "a PAM image", _CONVERT),
    (0, b"P7 332", "an XV thumbnail", _CONVERT),
    (0, b"icns", "a macOS icon (ICNS)", _CONVERT),
    (0, b"qoif", "a QOI image", _CONVERT),
    (0, b"farbfeld", "a farbfeld image", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"\xabKTX ", "a KTX texture", _CONVERT),
    (0, b"BLP1", "a BLP texture", _CONVERT),
    (0, b"BLP2", "a BLP texture", _CONVERT),
    (0, b"BPG\xfb", "a BPG image", _CONVERT),
    (0, b"FLIF", "a FLIF image", _CONVERT),
    (0, b"\x8aMNG\r\n\x1a\n", "an MNG animation", _CONVERT),
    (0, b"\x8bJNG\r\n\x1a\n", "a JNG image", _CONVERT),
    (0, b"\x59\xa6\x6a\x95", "a Sun raster image", _CONVERT),
    (0, b"\x01\xda\0", "an SGI image", _CONVERT),
    (0, b"\x01\xda\x01", "an SGI image", _CONVERT),
    (0, b"\x0a\x05\x01", "a PCX image", _CONVERT),
    (0, b"\x0a\x03\x01", "a PCX image", _CONVERT),
    (0, b"SDPX", "a DPX image", _CONVERT),
    (0, b"XPDS", "a DPX image", _CONVERT),
    (0, b"\x80\x2a\x5f\xd7", "a Cineon image", _CONVERT),
    (0, b"/* XPM", "an XPM image", _CONVERT),
    (0, b"DanM", "a Microsoft Paint image (MSP)", _CONVERT),
    (0, b"LinS", "a Microsoft Paint image (MSP)", _CONVERT),
    (4, b"\x11\xaf", "an Autodesk animation (FLI)", _CONVERT),
    (4, b"\x12\xaf", "an Autodesk animation (FLC)", _CONVERT),
    (0, b"FTEX", "an FTEX texture", _CONVERT),
    (0, b"GRIB", "a GRIB file", _RANGE),
    (0, b"BUFR", "a BUFR file", _RANGE),
    (8, b"ILBM", "an IFF image (ILBM)", _CONVERT),
)

# (offset, bytes, name, what to do): files that are not images.
_OTHERS: Final = (
    (0, b"version https://git-lfs.github.com/spec/", "a git-lfs pointer", "run git lfs pull"),
    (0, b"%PDF", "a PDF document", _RENDER),
    (0, b"%!PS", "a PostScript document (EPS)", _RENDER),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document (EPS)", _RENDER),
    (0, b"\x1f\x8b", "a gzip file", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _REMOVE),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"BZh", "a bzip2 file", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)", _FRAMES),
    (0, b"\0\0\x01\xba", "a video (MPEG)", _FRAMES),
    (0, b"\0\0\x01\xb3", "a video (MPEG)", _FRAMES),
    (0, b"FLV\x01", "a video (FLV)", _FRAMES),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (WMV)", _FRAMES),
    (0, b"OggS", "an Ogg file (sound or video)", _FRAMES),
    (4, b"moov", "a video (QuickTime)", _FRAMES),
    (4, b"mdat", "a video (QuickTime)", _FRAMES),
    (0, b"ID3", "a sound file (MP3)", _REMOVE),
    (0, b"fLaC", "a sound file (FLAC)", _REMOVE),
    (0, b"\0\x05\x16\x07", "a file of macOS metadata (AppleDouble)", "remove it; the image lies beside it"),
    (0, b"Bud1", "a .DS_Store file", "remove it"),
    (4, b"Bud1", "a .DS_Store file", "remove it"),
    (0, b"\x93NUMPY", "a NumPy array", "save it as PNG"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save its images as PNG"),
    (0, b"MATLAB 5.0", "a MATLAB file", "save its images as PNG"),
    (0, b"PAR1", "a Parquet file", "save its images as files"),
    (0, b"SQLite format 3\0", "an SQLite database", _REMOVE),
    (0, b"\x7fELF", "a program", _REMOVE),
    (0, b"MZ\x90\0", "a program", _REMOVE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", "export its images as PNG or JPEG"),
    (0, b"{\\rtf", "a text document (RTF)", _REMOVE),
)

_ICONS: Final = {
    b"\0\0\x01\0": Kind("a Windows icon (ICO)", None, True, _CONVERT),
    b"\0\0\x02\0": Kind("a Windows cursor (CUR)", None, True, _CONVERT),
}
# Major and compatible brands of ISO base media files.
_AVIF_BRANDS: Final = (b"avif", b"avis")
_HEIF_BRANDS: Final = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"mif2", b"msf1", b"miaf")
_RIFF: Final = {
    b"WEBP": Kind("a WebP image", "WEBP", True, _CONVERT),
    b"AVI ": Kind("a video (AVI)", None, False, _FRAMES),
    b"WAVE": Kind("a sound file (WAV)", None, False, _REMOVE),
    b"ACON": Kind("an animated Windows cursor (ANI)", None, True, _CONVERT),
}
_DIB_HEADERS: Final = (12, 16, 40, 52, 56, 64, 108, 124)
_HTML: Final = re.compile(
    r"(<!--.*?-->\s*|<\?xml.*?\?>\s*)*"
    r"<(!doctype html|html|head|body|title|script|style|meta|link|div|span|p|b|br|h[1-6]|pre|center|font|table|form)\b",
    re.DOTALL,
)
_BASE64: Final = ("/9j/", "iVBORw0KGgo", "R0lGODdh", "R0lGODlh", "UklGR")  # starts of JPEG, PNG, GIF and WebP files
_JSON: Final = re.compile(r"""\{\s*["}]|\[\s*[\[{"\d\]-]""")


def kind_of(data: bytes) -> Kind:
    """Identifies a file. `data` is the whole file or its first `HEAD_BYTES`.

    The rest of the file is not checked: a file that begins as a PNG image may be damaged further on.
    """
    head = data[:HEAD_BYTES]
    for offset, magic, name, remedy in (*_IMAGES, *_MANGLED):
        if head.startswith(magic, offset):
            return Kind(name, None, True, remedy)
    # The two bytes after the mark are the number of icons. A TGA image may begin with the same mark, but has zeros
    # there.
    if head[:4] in _ICONS and any(head[4:6]):
        return _ICONS[head[:4]]
    if head.startswith(b"\xff\xd8"):
        return Kind("a JPEG image", "JPEG", True, _CONVERT)
    for offset, magic, format, name in _DECODED:
        if head.startswith(magic, offset):
            return Kind(name, format, True, _CONVERT)
    if head.startswith(b"RIFF") and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[4:8] == b"ftyp":
        return _media(head)
    if re.match(rb"P[1-6][\s#]", head):
        return Kind("a PNM image", "PPM", True, _CONVERT)
    if head.startswith(b"BM") and 12 <= int.from_bytes(head[14:18], "little") <= 1024:
        return Kind("a BMP image", "BMP", True, _CONVERT)
    for offset, magic, name, remedy in _OTHERS:
        if head.startswith(magic, offset):
            return Kind(name, None, False, remedy)
    if head and not head.strip(b"\0"):
        return Kind("nothing but zero bytes", None, False, "copy or download it again")
    if _is_dib(head):
        return Kind("a BMP image without its file header", "DIB", True, _CONVERT)
    if data.endswith(b"TRUEVISION-XFILE.\0") or _is_targa(data):
        return Kind("a TGA image", None, True, _CONVERT)
    start = head[:8].hex(" ")
    return _text(head) or Kind(f"not an image of a known format (it begins with {start})", None, False, _REMOVE)


def _media(head: bytes) -> Kind:
    """Identifies an ISO base media file (AVIF, HEIF or a video) by its brands."""
    size = min(struct.unpack(">I", head[:4])[0], len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return Kind("an AVIF image", "AVIF", True, _CONVERT)
    if brands[0] == b"crx ":
        return Kind("a camera's raw image (CR3)", None, True, _DEVELOP)
    if brands[0] in (b"jp2 ", b"jpx "):
        return Kind("a JPEG 2000 image", "JPEG2000", True, _CONVERT)
    if any(brand in _HEIF_BRANDS for brand in brands):
        return Kind("a HEIC image (HEIF)", None, True, "convert it to JPEG or PNG")
    return Kind("a video (MP4 or QuickTime)", None, False, _FRAMES)


def _is_dib(header: bytes) -> bool:
    """Whether a file begins with a bitmap header: its size is a known one, and the number of planes is 1."""
    if len(header) < 16 or (size := struct.unpack("<I", header[:4])[0]) not in _DIB_HEADERS:
        return False
    return struct.unpack("<H", header[8:10] if size == 12 else header[12:14])[0] == 1


def _is_targa(data: bytes) -> bool:
    """Whether the header and the file size fit an uncompressed TGA image. The format has no magic bytes."""
    if len(data) < 18 or data[1] > 1 or data[2] not in (1, 2, 3) or data[16] not in (8, 15, 16, 24, 32):
        return False
    entries, entry_bits = struct.unpack("<HB", data[5:8])
    width, height = struct.unpack("<HH", data[12:16])
    size = 18 + data[0] + entries * ((entry_bits + 7) // 8) + width * height * ((data[16] + 7) // 8)
    return width * height > 0 and size <= len(data) <= size + 64


def _text(head: bytes) -> Kind | None:
    """Identifies a text file. Returns None if the bytes are not text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head[: len(head) & ~1].decode("utf-16", "replace")
    else:
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if error.start < len(head) - 3:  # otherwise the end of `head` cuts a character
                return None
            text = head[: error.start].decode("utf-8-sig")
    text = text.strip()
    if not text or any(character < " " and character not in "\t\n\r\f\x1b" for character in text):
        return None
    start = text[:1024].lower()
    if "<svg" in start and start.startswith("<"):
        return Kind("an SVG drawing", None, True, _RENDER)
    if _HTML.match(start):
        return Kind("an HTML page", None, False, _DOWNLOAD)
    if start.startswith("<"):
        return Kind("an XML text", None, False, _DOWNLOAD)
    if _JSON.match(start):
        return Kind("a JSON text", None, False, _DOWNLOAD)
    if start.startswith("data:image/"):
        return Kind("a data URI in a text", None, False, "decode its base64 text into a file")
    if text.startswith(_BASE64):
        return Kind("a base64 text", None, False, "decode it into a file")
    if re.match(r"(\.\./|\.git/|/)*annex/objects/", start):
        return Kind("a git-annex pointer", None, False, "run git annex get")
    if start.startswith("outs:") and "md5:" in start:
        return Kind("a DVC pointer", None, False, "run dvc pull")
    if re.match(r"#define \w+_width\b", start):
        return Kind("an XBM image", None, True, _CONVERT)
    excerpt = text.splitlines()[0][:40]
    return Kind(f"not an image but a text that begins {excerpt!r}", None, False, _REMOVE)
