"""Writers of shard files: `.beton` and tar."""

__all__ = ["beton", "records", "spool", "tar"]
