"""The differences between a run that continues and its checkpoint: in its classes, its images and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpnet.checkpoints.class_names import first_difference
from sdpnet.config.load import PATH_KEYS, flat_values
from sdpnet.config.renamed_keys import current_key
from sdpnet.pipelines.errors import UserError

__all__ = ["changed_images", "changed_keys", "require_same_classes"]


def require_same_classes(
    path: Path, state: Mapping[str, Any], classes: Sequence[str], data: str, *, allow: bool
) -> str | None:
    """Checks that the `classes` of the shard set at `data` are those of the run that saved `state` at `path`.

    Checkpoints of version 1 do not contain the class names and are not checked.

    Args:
        allow: whether the classes may differ.

    Returns:
        A line that names the first difference, or None where there is none.

    Raises:
        UserError: the classes differ and `allow` is False. The message names the first difference.
    """
    difference = first_difference(state["card"]["classes"], classes) if "card" in state else None
    if difference is None:
        return None
    if not allow:
        raise UserError(
            f"{path}: was trained on other classes than those of {data}: {difference}; pass the --data of that run, or "
            "set train.other_classes=keep if these numbers still mean the same"
        )
    return f"{data}: other classes than before, under the same numbers: {difference}"


def changed_images(state: Mapping[str, Any], fingerprints: Mapping[str, str], data: str) -> str | None:
    """Compares the splits of the shard set at `data` with those that the run has used so far.

    Older checkpoints do not contain fingerprints and are not compared.

    Args:
        fingerprints: `sdpnet.pipelines.shards.manifest.Split.fingerprint` by the name of the split.

    Returns:
        A line that names the splits whose files have changed, or None where none has.
    """
    before = state.get("data", {})
    changed = [repr(name) for name, value in fingerprints.items() if before.get(name, value) != value]
    if not changed:
        return None
    splits = f"split{'s' if len(changed) > 1 else ''} {' and '.join(changed)}"
    return f"{data}: the images of {splits} are not those that the run has used so far (other checksums)"


def changed_keys(state: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> list[str]:
    """Compares `config` (nested, resolved) with the config of the run that saved `state`.

    Relative paths in an older checkpoint are taken as relative to `where`. Keys that the checkpoint does not have are
    skipped. Keys that it has under an old name are compared under their present name.

    Returns:
        A line for each key whose value differs.
    """
    before = {current_key(key): value for key, value in flat_values(state.get("config", {}))}
    lines = []
    for key, value in flat_values(config):
        if key not in before:
            continue
        was = before[key]
        if key in PATH_KEYS and isinstance(was, str) and isinstance(value, str) and Path(value) == where / was:
            continue
        if _plain(was) != _plain(value):
            lines.append(f"config: {key} was {_shown(was)}, is {_shown(value)} from here on")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    """The value as it is written in a config file."""
    words: dict[Any, str] = {True: "true", False: "false", None: "null", "": "empty"}
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return words[value] if isinstance(value, (bool, str, type(None))) and value in words else str(value)
