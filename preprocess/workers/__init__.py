"""Processes that encode images. If one crashes or hangs, only one image is lost."""

__all__ = ["pool", "result"]
