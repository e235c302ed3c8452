"""preprocess: converts a folder of images into checked shards, once and offline."""

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = ["adopt", "build_dali", "build_ffcv", "convert", "describe", "make_synthetic", "verify"]

_end_on_interrupt()
