"""What is in a shard set: survey, contact sheet, charts and page."""
