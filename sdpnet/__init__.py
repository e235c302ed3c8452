"""sdpnet: shards from images, a fast data pipeline, the SdP-Net model and its training loop."""

import os as _os
import typing as _typing

if not _os.path.isdir(__path__[0]):
    raise ImportError(
        f"sdpnet cannot be imported from an archive ({__path__[0]}), because its native libraries and configs are "
        "files: install it with pip, or unpack the archive"
    )
if not _os.path.isdir(_os.path.join(__path__[0], "pipelines")):
    # In a checkout, symbolic links in this folder point to pipelines/, preprocess/ and configs/ beside it. torch.hub
    # downloads a .zip file of a checkout, and unpacking it loses the links, but the folders are still there.
    __path__.append(_os.path.dirname(__path__[0]))

from sdpnet.pipelines.startup import end_on_interrupt as _end_on_interrupt

if _typing.TYPE_CHECKING:
    from sdpnet.loading.decode_batch import decode_batch
    from sdpnet.loading.device_augment import DeviceAugment
    from sdpnet.loading.image_loader import ImageLoader

__all__ = ["DeviceAugment", "ImageLoader", "__version__", "decode_batch"]
__version__ = "0.1.0"

_end_on_interrupt()

_MODULES = {"DeviceAugment": "device_augment", "ImageLoader": "image_loader", "decode_batch": "decode_batch"}

if not _typing.TYPE_CHECKING:  # else any name of this module would count as known

    def __getattr__(name: str) -> object:
        """Imports the loader and torch when they are first asked for, so that `import sdpnet` is cheap."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from sdpnet.pipelines.terminal.remedy import missing_package

        try:
            value = getattr(import_module(f"sdpnet.loading.{_MODULES[name]}"), name)
        except ModuleNotFoundError as error:
            reason = missing_package(error)
            if reason is None:
                raise
            raise ModuleNotFoundError(f"{name}: {reason}", name=error.name) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
