from __future__ import annotations

from pathlib import Path

from forked import run_group

from sdpnet.distributed import join, least, leave


def least_of_two() -> int:
    processes = join("cpu")
    number = least([48, 12][processes.shard.rank], processes)
    leave()
    return number


def test_the_least_of_all_processes(tmp_path: Path) -> None:
    assert run_group(least_of_two, world_size=2, scratch=tmp_path) == [12, 12]
