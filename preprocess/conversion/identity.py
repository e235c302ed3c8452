"""The identity of a conversion: everything that determines a shard set. A run recognises its unfinished work by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpnet.pipelines.shards.origin import Origin
from sdpnet.preprocess.conversion.journal import Begun

__all__ = ["Conversion"]


@dataclass(frozen=True)
class Conversion:
    """Everything that determines the bytes of a shard set, except the contents of the images.

    Attributes:
        source: the name of the source, for the manifest.
        classes: class names in label order.
        encode: the settings of the encoder.
        created_by: the libraries that determine the encoded bytes, with their versions.
        num_images: the number of images of each split, in the order in which splits are converted.
        fingerprints: the fingerprint of each split; it is the same for two listings of the same images.
        val_draw: the share and the seed, if val was drawn from train.
        origin: the folder or archive of each split and the files that are not converted, for the manifest. It does
            not affect the bytes of the images.
    """

    source: str
    classes: tuple[str, ...]
    encode: dict[str, Any]
    created_by: str
    num_images: dict[str, int]
    fingerprints: dict[str, str]
    val_draw: dict[str, float] | None = None
    origin: Origin | None = None

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for one run to continue another, as JSON."""
        raw = {**vars(self), "classes": list(self.classes)}
        del raw["origin"]
        if self.val_draw is None:  # journals from before val could be drawn do not have the key
            del raw["val_draw"]
        return raw

    def begun(self, *, output: dict[str, Any] | None = None, part: str | None = None) -> Begun:
        """The first entry of the journal of a conversion of a whole shard set into `output`, or of one `part`."""
        origin = None if self.origin is None else self.origin.to_dict()
        return Begun(self.identity(), output, part, origin)

    @staticmethod
    def from_journal(begun: Begun) -> Conversion:
        """The conversion from which `begun` was made."""
        raw, origin = begun.conversion, begun.origin
        return Conversion(
            **{**raw, "classes": tuple(raw["classes"])}, origin=None if origin is None else Origin.from_dict(origin)
        )
