"""The engine of a conversion: what it is, its journal, its parts, and how it is continued."""

__all__ = ["command", "progress"]
