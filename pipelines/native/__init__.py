"""The crop decoder in C++, and its Python interface."""

__all__ = ["decoder", "library", "status"]
