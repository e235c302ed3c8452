"""SdP-Net: its blocks, position embeddings, operation counts and registration in timm."""

from sdpnet.model.sdpnet import MODELS, ModelOptions, SdPNet, create_model, create_model_options

__all__ = [
    "MODELS",
    "ModelOptions",
    "SdPNet",
    "create_model",
    "create_model_options",
    "flops",
    "patch_dropout",
    "positions",
    "sdpnet",
    "stem",
    "timm_models",
]
