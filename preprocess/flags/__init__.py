"""The flags of the commands. Nothing slow is imported, so that --help and mistakes are answered at once."""

__all__ = ["adopt", "conversion", "convert", "describe", "sources", "verify"]
