"""The device stage in a few Triton kernels, which give the results of the PyTorch reference."""

__all__ = ["launch"]
