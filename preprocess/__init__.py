"""preprocess: an image folder in, checked shards out; offline, once."""

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

_end_on_interrupt()
