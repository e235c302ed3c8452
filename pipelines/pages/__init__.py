"""HTML pages in one file, with interactive charts: what the pages about runs and about shard sets share."""

__all__ = ["chart", "document"]
