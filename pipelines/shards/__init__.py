"""Shard sets on disk: the manifest, and validators and readers of `.beton` files and tars."""

__all__ = ["beton", "file", "layout", "manifest", "origin", "tar"]
