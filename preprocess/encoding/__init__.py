"""Converts any image file to the JPEG that a shard stores."""

__all__ = ["encode", "jpeg", "settings"]
