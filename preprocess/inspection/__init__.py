"""Shows what a shard set contains: survey, contact sheet, charts and page."""

__all__ = ["contact_sheet", "in_place", "page", "survey", "text", "undecodable", "words"]
