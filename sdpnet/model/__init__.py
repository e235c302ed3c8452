"""SdP-Net: its blocks, position embeddings, operation counts and registration in timm."""

from sdpnet.model.sdpnet import MODELS, ModelOptions, SdPNet, create_model, create_model_options

__all__ = [
    "MODELS",
    "ModelOptions",
    "SdPNet",
    "create_model",
    "create_model_options",
    "dropout",
    "feed_forward",
    "flops",
    "patch_dropout",
    "patch_product",
    "positions",
    "sdpnet",
    "stem",
    "timm_models",
]
