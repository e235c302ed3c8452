"""Our own kernels for parts of the model: faster forms of what PyTorch also computes."""

__all__ = [
    "attention",
    "attention_kernel",
    "batch_norm",
    "batch_norm_kernel",
    "conv_block",
    "depthwise",
    "depthwise_kernel",
    "feed_forward",
    "feed_forward_kernel",
    "gelu_kernel",
]
