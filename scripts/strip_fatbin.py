"""Empties the machine code for other GPUs in a CUDA library, in place: python scripts/strip_fatbin.py LIBRARY 90

A CUDA library has its kernels as machine code for each generation of GPUs, and as PTX. This program overwrites all of
it with zeros but the machine code for the given compute capabilities (90 is 9.0). The file keeps its length and its
layout, so it works as before on these GPUs, and it compresses well: DALI takes 58 MB instead of 199 MB.

The format of the sections .nv_fatbin is NVIDIA's and not documented. A section is a sequence of blobs: a header (magic
number, version, the header's size, the size of what follows), then entries: a header (kind, the header's size, the size
of the code, and at byte 28 the compute capability), then the code.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAGIC: Final = 0xBA55ED50
MACHINE_CODE: Final = 2  # the kind of an entry; 1 is PTX
SECTIONS: Final = (b".nv_fatbin", b"__nv_relfatbin")


def fatbin_sections(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """The offset and the size of each section with kernels in a 64-bit ELF file.

    Raises `ValueError` for other files.
    """
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", data, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        """(position of the name, offset, size)."""
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", data, table + index * entry)
        return name, offset, size

    _, names, _ = section(names_index)
    for index in range(count):
        name, offset, size = section(index)
        start = names + name
        if data[start : data.index(b"\0", start)] in SECTIONS:
            yield offset, size


def strip(data: bytearray, keep: set[int]) -> tuple[int, int]:
    """Empties the code of all other GPUs. Returns how many bytes of code were kept and emptied."""
    kept = emptied = 0
    for offset, size in list(fatbin_sections(data)):
        at = offset
        while at + 16 <= offset + size:
            magic, _, header, total = struct.unpack_from("<IHHQ", data, at)
            if magic != MAGIC:  # padding between blobs, which begin at multiples of 8
                at += 8
                continue
            entry, end = at + header, at + header + total
            while entry < end:
                kind, _, entry_header, code = struct.unpack_from("<HHIQ", data, entry)
                (capability,) = struct.unpack_from("<I", data, entry + 28)
                first = entry + entry_header
                if kind == MACHINE_CODE and capability in keep:
                    kept += code
                else:
                    data[first : first + code] = bytes(code)
                    emptied += code
                entry = first + code
            at = end
    return kept, emptied


def main(words: list[str]) -> int:
    path, keep = Path(words[0]), {int(word) for word in words[1].split(",")}
    data = bytearray(path.read_bytes())
    kept, emptied = strip(data, keep)
    path.write_bytes(data)
    print(f"{path}: kept {kept:,} bytes of code, emptied {emptied:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
