"""Our own kernels for parts of the model: faster forms of what PyTorch also computes."""

__all__ = ["cublaslt", "depthwise", "depthwise_kernel", "feed_forward", "feed_forward_kernel", "gelu_kernel"]
