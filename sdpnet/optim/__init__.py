"""Optimizers, losses, averaged weights, and the handling of steps that are not finite."""

__all__ = ["ema", "learning_rate", "loss", "muon", "nonfinite", "optimizer"]
