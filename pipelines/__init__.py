"""Turns shards into batches on the device; every random decision comes from one plan."""

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = [
    "bench",
    "contract",
    "errors",
    "lasting_output",
    "loader",
    "machine",
    "options",
    "plan",
    "startup",
    "triton_support",
]

_end_on_interrupt()
