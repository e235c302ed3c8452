"""The engine of a conversion: its journal, its parts, and how an interrupted run is continued."""

__all__ = ["command", "progress", "summary", "unfinished"]
