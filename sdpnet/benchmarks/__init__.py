"""Benchmarks of the training step, of the depthwise convolution and of `ImageLoader`."""

__all__ = ["depthwise", "loader_speed", "step", "throughput"]
