"""Single files of a source: what one is, where its bytes lie, and links that lead nowhere."""

__all__ = ["file_kinds", "links", "location"]
