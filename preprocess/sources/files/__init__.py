"""Single files of a source: their kinds, their locations, and symbolic links."""

__all__ = ["file_kinds", "links", "location", "sample_label", "tar_members"]
