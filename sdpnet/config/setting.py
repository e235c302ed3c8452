"""A setting for `sdpnet.config.load.load_config` whose value is text, whatever YAML would make of it as it stands."""

from __future__ import annotations

__all__ = ["text_setting"]


def text_setting(key: str, text: str) -> str:
    """`key="text"`, in which YAML reads back exactly this text: of a folder named [x], 1 or ~ too."""
    escaped = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'{key}="{escaped}"'
