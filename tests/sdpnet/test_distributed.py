from __future__ import annotations

from pathlib import Path

from forked import run_group
from launches import ranks

from sdpnet.distributed.processes import join_group, leave_group, min_over_processes

# What compiles a model comes late, when the group is there: it must not hold on to the group.
LEAVES = """
from pathlib import Path
from sdpnet.distributed.processes import count_over_processes, join_group, leave_group
processes = join_group("cpu")
import torch._dynamo
assert count_over_processes(1, processes) == 2
def num_threads(): return len(list(Path("/proc/self/task").iterdir()))
with_group = num_threads()
leave_group()
print(with_group - num_threads())
"""
GLOO_THREADS = 3  # one for the connections, and two that work


def least_of_two() -> int:
    processes = join_group("cpu")
    number = min_over_processes([48, 12][processes.shard.rank], processes)
    leave_group()
    return number


def test_the_least_of_all_processes(tmp_path: Path) -> None:
    assert run_group(least_of_two, world_size=2, scratch=tmp_path) == [12, 12]


def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """A thread of gloo's that is still there when the interpreter ends may end the process with SIGABRT."""
    with ranks([], 2, tmp_path, ("-c", LEAVES)) as started:
        for status, out, err in [rank.ended(120) for rank in started]:
            assert status == 0, err
            assert int(out.splitlines()[-1]) >= GLOO_THREADS  # gloo's own lines come first
