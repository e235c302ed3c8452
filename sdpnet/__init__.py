"""sdpnet: shards from images, a fast data pipeline, the SdP-Net model and its training loop."""

import os as _os

if not _os.path.isdir(_os.path.join(__path__[0], "pipelines")):
    # In a checkout, symbolic links in this folder point to pipelines/, preprocess/ and configs/ beside it. torch.hub
    # downloads a .zip file of a checkout, and unpacking it loses the links, but the folders are still there.
    __path__.append(_os.path.dirname(__path__[0]))

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = ["__version__"]
__version__ = "0.1.0"

_end_on_interrupt()
