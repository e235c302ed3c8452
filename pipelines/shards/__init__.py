"""Shard sets on the disk: the manifest, and readers of `.beton` files and tars that check what they read."""

__all__ = ["beton", "file", "layout", "manifest", "origin", "tar"]
