"""The crop decoder in C++, and how Python calls it."""

__all__ = ["decoder", "library", "status"]
