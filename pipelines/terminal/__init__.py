"""What every command line shares: flags, advice on the next step and on what is missing, lasting output."""

__all__ = ["command_line", "next_step", "readable_names", "remedy", "status_line"]
