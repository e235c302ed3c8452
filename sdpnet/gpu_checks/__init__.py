"""`./dev gpu`: one command that checks and measures everything on a machine with an NVIDIA GPU."""

__all__: list[str] = []
