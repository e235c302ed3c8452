"""Optimizers, losses, averaged weights, and what happens at a step that is not finite."""

__all__ = ["ema", "loss", "muon", "nonfinite", "optimizer"]
