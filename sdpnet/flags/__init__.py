"""The flags of the commands. torch is not imported, so that --help and mistakes are answered at once."""

__all__ = [
    "bench_step",
    "completion",
    "config",
    "doctor",
    "evaluate",
    "export",
    "lab",
    "predict",
    "report",
    "sheet",
    "train",
]
