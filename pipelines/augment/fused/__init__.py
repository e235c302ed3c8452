"""The device stage's operations in Triton: the reference's results in a few kernels."""

__all__ = ["launch"]
