"""Shows what a shard set contains: survey, contact sheet, charts and page."""

__all__ = ["contact_sheet", "in_place", "page", "recipe", "survey", "text", "undecodable", "words"]
