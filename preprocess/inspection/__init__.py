"""Shows what a shard set contains: survey, contact sheet, charts and page."""

__all__ = ["contact_sheet", "page", "survey", "text", "undecodable", "words"]
