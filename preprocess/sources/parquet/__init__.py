"""Reads Parquet files of images, as Hugging Face writes them, in processes that may crash."""

__all__ = ["listing", "row"]
