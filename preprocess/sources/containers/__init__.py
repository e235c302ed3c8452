"""Splits whose images lie in container files (tars, Parquet files) with their labels beside them."""

__all__ = ["labels", "split"]
