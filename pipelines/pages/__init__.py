"""Self-contained HTML pages with interactive charts, used for the pages about runs and about shard sets."""

__all__ = ["chart", "document"]
