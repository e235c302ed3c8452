"""The processes of one training, their interruption and restart, and the directory that they write to."""

__all__ = ["interrupt", "processes", "restart", "run_directory"]
