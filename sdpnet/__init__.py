"""sdpnet: the SdP-Net model and its training loop."""

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = ["__version__"]
__version__ = "0.1.0"

_end_on_interrupt()
