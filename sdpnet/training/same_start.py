"""The check before the first step that all processes of a run have the same config, code and shard set.

torchrun starts all processes with one command line, but each machine has its own files: it may have an older checkout,
another copy of the shards, or another config of the same name. Without the check, gradients of different settings would
be averaged without an error, or the processes would wait for each other until they time out.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

import sdpnet
import sdpnet.pipelines
from sdpnet.distributed.processes import Processes, count_over_processes
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import read_manifest

__all__ = ["code_facts", "require_same_start", "shard_facts"]


def require_same_start(gather: Callable[[], Mapping[str, str]], processes: Processes) -> None:
    """Compares facts of this process with those of the main process. Every process must call it.

    Args:
        gather: returns the facts, by name. It is not called if there is only one process.

    Raises:
        UserError: some process has other facts than the main process. It is raised in all processes; one that differs
            names the difference.
    """
    if processes.world_size == 1:
        return
    facts = gather()
    main_facts = [dict(facts)]
    dist.broadcast_object_list(main_facts, src=0, device=processes.device)
    (theirs,) = main_facts
    differing = [name for name in {**theirs, **facts} if theirs.get(name) != facts.get(name)]
    others = count_over_processes(int(bool(differing)), processes)
    rank = processes.shard.rank
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        was, own = (_shown(values.get(name, "not there")) for values in (theirs, facts))
        raise UserError(
            f"process {rank}: {name} is {own}, and in process 0 {was}{more}: all processes of a run need the same "
            "config, code and shard set"
        )
    if others:
        which = "1 other process has" if others == 1 else f"{others} other processes have"
        raise UserError(f"process {rank}: {which} another config, code or shard set than process 0, and says which")


def code_facts() -> dict[str, str]:
    """The versions of Python and torch, and a checksum of the modules of sdpnet."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__}
    return {**versions, "sdpnet's code (SHA-256)": _code_sha256()}


def shard_facts(path: str | Path, splits: Iterable[str]) -> dict[str, str]:
    """Checksums of the classes and of the splits of a shard set. Raises `ShardError` if there is none at `path`."""
    manifest = read_manifest(path)
    classes = hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()
    found = {name: manifest.splits[name].fingerprint for name in splits if name in manifest.splits}
    return {"the shard set's classes": classes, **{f"split {name!r}": text for name, text in found.items()}}


@cache
def _code_sha256() -> str:
    found: dict[str, Path] = {}
    for package, prefix in ((sdpnet, ""), (sdpnet.pipelines, "pipelines/")):
        folder = Path(package.__path__[0])  # rglob does not follow the link to pipelines/ in a checkout
        found |= {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(found.items()):
        if not name.startswith("preprocess/"):  # these modules do not run in a training
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]}..."
