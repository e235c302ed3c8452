"""What a conversion is: all that decides a shard set, and by which one run recognises the work of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpnet.pipelines.shards.origin import Origin
from sdpnet.preprocess.conversion.journal import Begun

__all__ = ["Conversion"]


@dataclass(frozen=True)
class Conversion:
    """All that decides a shard set's bytes, but for the images' contents.

    Attributes:
        source: where the images came from, for the manifest.
        classes: in label order.
        encode: the encoder's settings.
        created_by: the libraries that decide the encoded bytes.
        num_images: of each split, in the order in which splits are converted.
        fingerprints: of each split: two listings of the same images have the same.
        val_draw: share and seed, where val was drawn from train.
        origin: what became which split and what was left out, for the manifest; decides no bytes of the images.
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
        """What two runs must have in common for one to continue the other; JSON."""
        raw = {**vars(self), "classes": list(self.classes)}
        del raw["origin"]
        if self.val_draw is None:  # as it was before there were draws
            del raw["val_draw"]
        return raw

    def begun(self, *, output: dict[str, Any] | None = None, part: str | None = None) -> Begun:
        """The first entry of a journal: of a whole shard set's conversion into `output`, or of one `part`'s."""
        origin = None if self.origin is None else self.origin.to_dict()
        return Begun(self.identity(), output, part, origin)

    @staticmethod
    def from_journal(begun: Begun) -> Conversion:
        """What `begun` was made of."""
        raw, origin = begun.conversion, begun.origin
        return Conversion(
            **{**raw, "classes": tuple(raw["classes"])}, origin=None if origin is None else Origin.from_dict(origin)
        )
