"""Our own kernels for parts of the model: faster forms of what PyTorch also computes."""

__all__ = ["depthwise", "depthwise_kernel"]
