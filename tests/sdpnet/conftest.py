"""The trainings that several modules of tests look at."""

from __future__ import annotations

from trainings import interrupt, uninterrupted

__all__ = ["interrupt", "uninterrupted"]
