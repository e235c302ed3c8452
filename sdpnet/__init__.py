"""sdpnet: the SdP-Net model and its training loop."""

__all__ = ["__version__"]
__version__ = "0.1.0"
