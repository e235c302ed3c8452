"""Conversions that are killed inside the work, and go on to the same bytes."""

from __future__ import annotations

from trial import Kind

__all__ = ["KINDS"]

KINDS: list[Kind] = []
