"""The flags of `sdpnet completion`."""

from __future__ import annotations

import argparse

__all__ = ["SHELLS", "add_arguments"]

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = (
        'For bash, put into ~/.bashrc: eval "$(sdpnet completion bash)". For zsh: sdpnet completion zsh > DIR/_sdpnet, '
        "where DIR is in fpath. For fish: sdpnet completion fish > ~/.config/fish/completions/sdpnet.fish."
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
