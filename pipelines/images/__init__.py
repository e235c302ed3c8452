"""Decodes image files of many formats to pixels."""

__all__ = ["area", "file", "jpeg_frame", "kinds", "preprocessing", "reasons", "strict_jpeg"]
