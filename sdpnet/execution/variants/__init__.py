"""The ways to compute a part of a step: which there are, and which is the fastest one on this GPU."""

__all__ = ["attention", "choice", "conv_block", "fp8", "mlp", "patch", "update"]
