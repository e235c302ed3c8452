"""Any image file, as people have them, to pixels."""

__all__ = ["area", "file", "jpeg_frame", "kinds", "preprocessing", "reasons", "strict_jpeg"]
