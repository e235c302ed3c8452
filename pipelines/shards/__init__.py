"""Shard sets on disk: the manifest, and validators and readers of `.beton` files, tars and indexes."""

__all__ = ["beton", "file", "in_place", "index_file", "layout", "manifest", "missing", "origin", "places", "tar"]
