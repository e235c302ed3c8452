"""Parquet files and WebDataset tars of images, made by pyarrow and by tarfile."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["features", "image_bytes", "images_of", "parquet_bytes", "tar_bytes", "write_parquet"]


def image_bytes(seed: int, format: str = "JPEG") -> bytes:
    """A small image in a file of this format, another one for each seed."""
    rng = np.random.default_rng(seed)
    size = rng.integers(9, 40, 2).tolist()
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


def images_of(count: int, first: int = 0) -> list[bytes]:
    """Images in JPEG, PNG and WebP files, in turn."""
    formats = ("JPEG", "PNG", "WEBP")
    return [image_bytes(first + number, formats[number % 3]) for number in range(count)]


def features(names: Sequence[object] | None, image: str = "image", label: str = "label") -> dict[str, Any]:
    """The metadata that Hugging Face's `datasets` writes into a schema."""
    kind = {"dtype": "int64", "_type": "Value"} if names is None else {"names": list(names), "_type": "ClassLabel"}
    return {"info": {"features": {image: {"_type": "Image"}, label: kind}}}


def parquet_bytes(
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    names: Sequence[object] | None = None,
    *,
    image: str = "image",
    label: str = "label",
    is_struct: bool = True,
    large: bool = False,
    rows: int = 4,
    metadata: Mapping[str, Any] | str | None = None,
    label_type: Any = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> bytes:
    """The bytes of a Parquet file.

    Args:
        images: the bytes of each image, or None.
        labels: the labels: integers, texts or None.
        names: the names of the classes; None writes no features of `datasets`.
        image, label: the names of the columns.
        is_struct: whether the images are in a struct of bytes and path.
        large: whether the bytes are large_binary.
        rows: the number of rows of a row group.
        metadata: the features in the place of those of `names`.
        label_type: the type of the labels.
        extra: further columns.
        options: those of pyarrow's `ParquetWriter`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    binary = pa.large_binary() if large else pa.binary()
    if is_struct:
        kind = pa.struct([("bytes", binary), ("path", pa.string())])
        values = [None if data is None else {"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(images)]
        column = pa.array(values, kind)
    else:
        column = pa.array(list(images), binary)
    columns = {image: column, label: pa.array(list(labels), label_type)}
    columns |= {name: pa.array(list(values)) for name, values in (extra or {}).items()}
    table = pa.table(columns)
    raw = metadata if metadata is not None else features(names, image, label) if names is not None else None
    if raw is not None:
        table = table.replace_schema_metadata({"huggingface": raw if isinstance(raw, str) else json.dumps(raw)})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows, **options)
    return file.getvalue()


def write_parquet(path: Path, *arguments: Any, **options: Any) -> Path:
    """Writes `parquet_bytes` to a file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet_bytes(*arguments, **options))
    return path


def tar_bytes(files: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of a tar of these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
