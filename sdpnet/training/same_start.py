"""Before the first step: all processes of a run must have the same config, code and shard set.

torchrun gives all processes one command line, but each machine has its own files: an older checkout, another copy of
the shards, a config of the same name. Gradients of different settings would be averaged without an error, or the
processes would wait for each other until they give up.
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
    """Compares what `gather` finds in this process with what it finds in the main process; every process must call it.
    A process that stands alone has nothing to compare.

    Raises `UserError` in all of them where any differs: a process that differs names what does.
    """
    if processes.world_size == 1:
        return
    facts = gather()
    of_main = [dict(facts)]
    dist.broadcast_object_list(of_main, src=0, device=processes.device)
    (theirs,) = of_main
    differing = [name for name in {**theirs, **facts} if theirs.get(name) != facts.get(name)]
    others = count_over_processes(int(bool(differing)), processes)
    rank = processes.shard.rank
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        was, own = (_shown(of.get(name, "not there")) for of in (theirs, facts))
        raise UserError(
            f"process {rank}: {name} is {own}, and in process 0 {was}{more}: all processes of a run need the same "
            "config, code and shard set"
        )
    if others:
        which = "1 other process has" if others == 1 else f"{others} other processes have"
        raise UserError(f"process {rank}: {which} another config, code or shard set than process 0, and says which")


def code_facts() -> dict[str, str]:
    """What this process runs: the versions, and a checksum of this project's modules."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__}
    return {**versions, "sdpnet's code (SHA-256)": _code_sha256()}


def shard_facts(path: str | Path, splits: Iterable[str]) -> dict[str, str]:
    """The classes and images of a shard set. Raises `ShardError` where there is none."""
    manifest = read_manifest(path)
    classes = hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()
    found = {name: manifest.splits[name].fingerprint for name in splits if name in manifest.splits}
    return {"the shard set's classes": classes, **{f"split {name!r}": text for name, text in found.items()}}


@cache
def _code_sha256() -> str:
    found: dict[str, Path] = {}
    for package, prefix in ((sdpnet, ""), (sdpnet.pipelines, "pipelines/")):
        folder = Path(package.__path__[0])  # a checkout's sdpnet/ has a link to pipelines/, which rglob does not follow
        found |= {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(found.items()):
        if not name.startswith("preprocess/"):  # does not run in a training
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]}..."
