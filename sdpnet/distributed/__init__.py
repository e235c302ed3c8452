"""The processes of one training, their interruption and restart, and the directory they write to."""

__all__ = ["interrupt", "processes", "restart", "run_directory"]
