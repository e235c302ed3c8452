"""Shards for tests, made from a folder in this process, or from any bytes as samples."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpnet.pipelines.shards.manifest import Manifest, ShardFile
from sdpnet.preprocess.conversion.command import encoded_images, plan_conversion
from sdpnet.preprocess.conversion.convert import MakeWriter, OnBad, convert
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.records import Records
from sdpnet.preprocess.encoding.encode import EncodedImage, EncodeSettings
from sdpnet.preprocess.sources.scan import Scan, scan
from sdpnet.preprocess.workers.pool import Workers
from sdpnet.preprocess.workers.result import ImageState


def convert_folder(
    source: Path | Scan,
    out: Path,
    make_writer: Any = BetonWriter,
    settings: EncodeSettings | None = None,
    num_workers: int = 0,
    on_bad: OnBad = "fail",
) -> Manifest:
    """Converts a folder in this process, as the build commands do. The manifest names the folder as its source."""
    found = scan(source) if isinstance(source, Path) else source
    settings = settings or EncodeSettings()
    conversion = plan_conversion(found, source.name if isinstance(source, Path) else "source", settings)
    with Workers(settings, num_workers) as workers:
        images = encoded_images(found, workers)
        return convert(conversion, images, make_writer, {"writer": str(make_writer)}, out, on_bad)


def write_manifest(directory: Path, raw: dict[str, Any]) -> None:
    """Writes a manifest with this content and the right checksum."""
    body = {key: value for key, value in raw.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**body, "checksum": checksum}, indent=1, sort_keys=True) + "\n"
    (directory / "manifest.json").write_text(text)


def write_samples(
    make_writer: MakeWriter, directory: Path, split: str, images: Sequence[EncodedImage]
) -> tuple[ShardFile, ...]:
    """Writes images with the labels 0, 1, ..., without a manifest."""
    records = Records(directory / f"{split}.records", 0, 0)
    with make_writer(directory, split, len(images)) as writer:
        writer.resume([])
        for label, image in enumerate(images):
            writer.add(image.data, label)
            record = (len(image.data), zlib.crc32(image.data), label, image.height, image.width, ImageState.REENCODED)
            records.append(record)
        files = writer.finish(records)
    records.close()
    records.path.unlink()
    return files
