"""Any image file to the JPEG, or the pixels, that a shard holds."""

__all__ = ["encode", "jpeg"]
