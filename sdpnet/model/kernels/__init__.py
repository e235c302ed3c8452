"""Our own kernels for parts of the model: faster forms of what PyTorch also computes."""

__all__ = ["attention", "attention_kernel", "depthwise", "depthwise_kernel"]
