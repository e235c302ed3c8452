"""Tools that all command lines share: the parser, the next command to type, remedies, and the status line."""

__all__ = ["command_line", "next_step", "quiet", "readable_names", "remedy", "status_line"]
