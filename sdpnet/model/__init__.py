"""SdP-Net: blocks, positions, depthwise convolution, counts of operations, and its entry into timm."""

from sdpnet.model.sdpnet import MODELS, ModelOptions, SdPNet, create_model, create_model_options

__all__ = [
    "MODELS",
    "ModelOptions",
    "SdPNet",
    "create_model",
    "create_model_options",
    "depthwise",
    "flops",
    "positions",
    "sdpnet",
    "timm_models",
]
