"""Variants: named changes of a config, from a YAML file or the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdpnet.config.load import flat_values, load_config
from sdpnet.config.options import Config
from sdpnet.config.yaml_text import read_yaml
from sdpnet.pipelines.errors import UserError

__all__ = ["CONFIG_KEY", "Variant", "load_variant", "read_variants", "variant_from_words", "with_unique_names"]

CONFIG_KEY: Final = "config"  # in the place of a config key: the variant starts from another config
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[\w .+-]{0,58}[\w+])?", re.ASCII)
_RULE: Final = "a name starts with a letter or digit and has at most 60 letters, digits, spaces and . + - _"


@dataclass(frozen=True)
class Variant:
    """A named change of a config.

    Attributes:
        name: its name in tables; letters, digits, spaces and `.`, `+`, `-`, `_`.
        settings: texts "section.key=value", which are applied in their order.
        config: the config that it starts from; None starts from the baseline's.
    """

    name: str
    settings: tuple[str, ...] = ()
    config: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"variant {self.name[:80]!r}: {_RULE}")

    @property
    def folder(self) -> str:
        """The name as part of a folder's name."""
        return self.name.replace(" ", "-")


def read_variants(path: Path) -> list[Variant]:
    """Reads variants from a YAML file.

    The file maps the name of each variant to its changes: dotted keys or nested sections, as in a config file. The key
    `config` names another config to start from.

        qk norm: {model.qk_norm: true}
        modern: {config: tiny_imagenet/cpu_modern}

    Raises `UserError` if the file does not look like this.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: must map names of variants to settings, as in qk norm: {{model.qk_norm: true}}")
    return [_from_yaml(path, name, changes) for name, changes in content.items()]


def _from_yaml(path: Path, name: Any, changes: Any) -> Variant:
    if not isinstance(changes, Mapping):
        raise UserError(f"{path}: variant {str(name)[:80]!r}: must be keys and values, as in {{model.qk_norm: true}}")
    changes = {str(key): value for key, value in changes.items()}
    config = changes.pop(CONFIG_KEY, None)
    if not (config is None or isinstance(config, str)):
        raise UserError(f"{path}: variant {str(name)[:80]!r}: config must be the name or path of a config")
    try:
        settings = tuple(f"{key}={json.dumps(value)}" for key, value in flat_values(changes))
    except (TypeError, ValueError):  # dates and the like
        raise UserError(f"{path}: variant {str(name)[:80]!r}: a value is no number, text or list") from None
    return Variant(str(name), settings, config)


def variant_from_words(words: Sequence[str]) -> Variant:
    """Makes a variant of the words NAME KEY=VALUE ... Raises `UserError` if they do not look like that."""
    name, *rest = words
    settings, config = [], None
    for word in rest:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise UserError(
                f"--variant {name[:80]} {word[:80]}: must look like NAME KEY=VALUE ...; quote a name's spaces"
            )
        if key == CONFIG_KEY:
            config = value
        else:
            settings.append(word)
    if "=" in name:
        raise UserError(f"--variant {name[:80]}: the first word is the variant's name: --variant NAME {name[:80]}")
    if not settings and config is None:
        raise UserError(f"--variant {name[:80]}: changes nothing; give KEY=VALUE, such as model.qk_norm=true")
    return Variant(name, tuple(settings), config)


def with_unique_names(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """The variants. Raises `UserError` if two of them have the same name, or the same folder."""
    found: dict[str, Variant] = {}
    for variant in variants:
        other = found.setdefault(variant.folder, variant)
        if other is not variant:
            raise UserError(f"variant {variant.name!r}: there is {other.name!r} already; give it another name")
    return tuple(found.values())


def load_variant(variant: Variant, config: str, settings: Sequence[str]) -> Config:
    """The config of a variant.

    Args:
        config: the baseline's config.
        settings: those of all variants, which are applied before the variant's own.

    Raises:
        UserError: as `load_config`; the message names the variant.
    """
    try:
        return load_config(variant.config or config, [*settings, *variant.settings])
    except UserError as error:
        raise UserError(f"variant {variant.name!r}: {error}") from None
