"""Benchmarks of the training step and of the depthwise convolution."""
