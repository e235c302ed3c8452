"""SdP-Net: its blocks, position embeddings, operation counts and registration in timm."""

import typing as _typing

from sdpnet.model.options import MODELS, ModelOptions, create_model_options

if _typing.TYPE_CHECKING:
    from sdpnet.model.sdpnet import SdPNet, create_model

__all__ = [
    "MODELS",
    "ModelOptions",
    "SdPNet",
    "create_model",
    "create_model_options",
    "dropout",
    "feed_forward",
    "flops",
    "options",
    "patch_dropout",
    "patch_product",
    "positions",
    "sdpnet",
    "stem",
    "timm_models",
]

if not _typing.TYPE_CHECKING:  # else any name of this module would count as known

    def __getattr__(name: str) -> object:
        """Imports the model and torch when they are first asked for: the configs need only the options."""
        if name not in ("SdPNet", "create_model"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module("sdpnet.model.sdpnet"), name)
