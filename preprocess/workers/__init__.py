"""Processes that encode images; one that crashes or hangs costs one image."""

__all__ = ["pool", "result"]
