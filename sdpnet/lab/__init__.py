"""Experiments: variants of a config, trained with paired seeds at equal compute and compared with their errors."""

__all__ = ["compute", "experiment", "process", "results", "runner", "table", "variants"]
