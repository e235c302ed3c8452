"""The programs of `./dev gpu` for what no other command does; each runs in a process of its own."""

__all__ = ["accuracy", "commands"]
