"""Mutated shard sets: each kind of file in a set, changed in a seeded way, and read by every reader."""

from __future__ import annotations

from trial import Kind

__all__ = ["KINDS"]

KINDS: list[Kind] = []
