"""The configs that come along, by the names that `--config` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sdpnet

__all__ = ["CONFIG_DIRECTORY", "config_names"]

CONFIG_DIRECTORY: Final = next(
    folder for place in sdpnet.__path__ if (folder := Path(place, "configs")).is_dir()
)  # see sdpnet/__init__.py


def config_names() -> list[str]:
    """The names of all configs, sorted."""
    return sorted(str(path.relative_to(CONFIG_DIRECTORY).with_suffix("")) for path in CONFIG_DIRECTORY.rglob("*.yaml"))
