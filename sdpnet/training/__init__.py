"""The parts of a training: its set-up, one step, evaluation, checkpoints, and starting from another model."""

__all__ = ["continued_run", "evaluate", "launch", "run_state", "same_start", "scoring", "session", "step"]
