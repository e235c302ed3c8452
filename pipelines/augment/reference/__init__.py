"""The device stage's operations in PyTorch: what every other implementation is compared with."""

__all__ = ["box_masks", "filters", "geometry", "mix", "noise", "operations"]
