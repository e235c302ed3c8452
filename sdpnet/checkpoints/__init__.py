"""Checkpoints and models on the disk, and the checks before a training continues from them."""

from sdpnet.checkpoints.model import load_model, save_model
from sdpnet.checkpoints.model_card import ModelCard

__all__ = ["ModelCard", "changes", "class_names", "file", "load_model", "model", "model_card", "save_model"]
