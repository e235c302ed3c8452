"""Optimizers, losses, averaged weights, and the handling of steps that are not finite."""

__all__ = ["ema", "fused_update", "learning_rate", "loss", "muon", "nonfinite", "optimizer", "update", "update_kernel"]
