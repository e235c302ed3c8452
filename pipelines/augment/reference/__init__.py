"""The device stage's operations in PyTorch: what every other implementation is compared with."""
