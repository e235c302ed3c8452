"""Benchmarks of the training step and of the depthwise convolution."""

__all__ = ["depthwise", "step", "throughput"]
