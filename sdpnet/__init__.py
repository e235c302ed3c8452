"""sdpnet: shards from images, a fast data pipeline, the SdP-Net model and its training loop."""

import os as _os

if not _os.path.isdir(_os.path.join(__path__[0], "pipelines")):
    # In a checkout, links in this folder lead to the folders beside it. A .zip file of a checkout, which torch.hub
    # downloads, is unpacked without its links but still has the folders.
    __path__.append(_os.path.dirname(__path__[0]))

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

__all__ = ["__version__"]
__version__ = "0.1.0"

_end_on_interrupt()
