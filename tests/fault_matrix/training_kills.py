"""Trainings that are killed inside the work, on one rank and on two, and go on to the same weights."""

from __future__ import annotations

from trial import Kind

__all__ = ["KINDS"]

KINDS: list[Kind] = []
