"""Mutated run directories: checkpoints, weights, model cards, metrics and settings, changed in a seeded way."""

from __future__ import annotations

from trial import Kind

__all__ = ["KINDS"]

KINDS: list[Kind] = []
