"""Settings ("section.key=value") for `sdpnet.config.load.load_config`, on a command line or made from a text."""

from __future__ import annotations

import argparse
import re

from sdpnet.pipelines.terminal.command_line import LooseWords

__all__ = ["add_settings", "text_setting"]


class _Setting(LooseWords):
    pattern = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)
    as_flag = re.compile(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)

    def advice(self, flag: str) -> str:
        from sdpnet.config.load import similar_keys  # slow to import, and needed only after a mistake

        keys = similar_keys(flag.strip("-").replace("-", "_"))
        return f"a config key is written as {' or '.join(f'{key}=VALUE' for key in keys)}" if keys else ""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds `--set KEY=VALUE` to a command's parser, which must be a `CommandParser`.

    A KEY=VALUE without a flag is treated as if `--set` preceded it, and so are `--section.key=VALUE` and `--section.key
    VALUE`. The parsed namespace has the settings in `set`, a list in the order of the command line.
    """
    help = "any config key, such as optim.lr=1e-3; --set may be left out"
    parser.add_argument("--set", action=_Setting, default=[], metavar="KEY=VALUE", help=help)


def text_setting(key: str, text: str) -> str:
    """The setting `key="text"`, quoted so that YAML parses exactly this text, even for a folder named [x], 1 or ~."""
    escaped = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'{key}="{escaped}"'
