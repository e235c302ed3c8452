"""Small JPEG files of many kinds, from which hostile ones are made.

`python tests/support/decoder_seeds.py FOLDER` writes them, each followed by the bytes of a request for
`decoder_fuzz.cpp`.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from jpeg_files import make_image, pillow_jpeg, planes_in_scans, replace_segment, segments

__all__ = ["request", "seeds", "write_seeds"]


def seeds() -> dict[str, bytes]:
    """JPEG files by name."""
    found = {}
    sizes = {"large": (80, 100), "small": (33, 47), "tiny": (5, 3)}
    for name, (height, width) in sizes.items():
        pixels = make_image(height, height, width)
        for restarts, options in {
            "plain": {},
            "rows": {"restart_marker_rows": 1},
            "odd": {"restart_marker_blocks": 3},
        }.items():
            for sampling in ("4:4:4", "4:2:2", "4:2:0"):
                found[f"{sampling} {restarts} {name}"] = pillow_jpeg(pixels, subsampling=sampling, **options)
            found[f"4:4:0 {restarts} {name}"] = turned(found[f"4:2:2 {restarts} {name}"])
            found[f"grey {restarts} {name}"] = pillow_jpeg(pixels, "L", **options)
        found[f"progressive {name}"] = pillow_jpeg(pixels, progressive=True)
        found[f"progressive rows {name}"] = pillow_jpeg(pixels, progressive=True, restart_marker_rows=1)
        found[f"own tables {name}"] = pillow_jpeg(pixels, optimize=True, restart_marker_rows=1, quality=100)
    pixels = make_image(1, 40, 50)
    found["RGB"] = pillow_jpeg(pixels, keep_rgb=True, restart_marker_rows=1)
    found["CMYK"] = pillow_jpeg(pixels, "CMYK")
    found["three scans"] = planes_in_scans(pixels, [1, 2, 3])
    return found


def turned(jpeg: bytes) -> bytes:
    """Makes a 4:4:0 file from a 4:2:2 file with as many MCUs. Its pixels are different, but the file is valid."""
    frame = dict(segments(jpeg)[0])[0xC0]
    height, width = struct.unpack(">HH", frame[1:5])
    across, down = -(-width // 16), -(-height // 8)
    turned_size = struct.pack(">HH", 16 * down - height % 8, 8 * across - width % 8)
    return replace_segment(jpeg, 0xC0, 0xC0, frame[:1] + turned_size + frame[5:7] + b"\x12" + frame[8:])


def request(top: int, left: int, height: int, width: int, out_height: int, out_width: int) -> bytes:
    """The bytes of a request after a file: a box in the image, and an output size of at most 48."""
    return struct.pack("=4H4B", top, left, height - 1, width - 1, out_height - 1, out_width - 1, 0, 1)


def write_seeds(folder: Path) -> list[Path]:
    """Writes the files, each with a request for a small box, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, jpeg in seeds().items():
        paths.append(folder / name.replace(" ", "-").replace(":", ""))
        paths[-1].write_bytes(jpeg + request(0, 0, 5, 3, 8, 8))
    return paths


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
