"""preprocess: an image folder in, checked shards out; offline, once."""

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = ["adopt", "build_dali", "build_ffcv", "describe", "make_synthetic", "verify"]

_end_on_interrupt()
