"""Processes of one run that were started with another config, code or shard set than the main one's."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_group

from sdpnet.distributed.processes import Processes, join_group, leave_group
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions
from sdpnet.training.same_start import code_facts, require_same_start, shard_facts

SAME = {"optim.lr": "0.001", "sdpnet's code (SHA-256)": "a" * 64}


def compared(facts: list[dict[str, str]]) -> str:
    """What a process is told."""
    processes = join_group("cpu", 60)
    try:
        require_same_start(lambda: facts[processes.shard.rank], processes)
        return ""
    except UserError as error:
        return str(error)
    finally:
        leave_group()


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (SAME, ""),
        ({**SAME, "optim.lr": "0.002"}, "process 1: optim.lr is 0.002, and in process 0 0.001: all processes of a run"),
        ({"optim.lr": "0.001"}, "process 1: sdpnet's code (SHA-256) is not there, and in process 0 aaaa"),
        ({**SAME, "a": "1", "optim.lr": "1"}, "process 1: optim.lr is 1, and in process 0 0.001 (and 1 more): all"),
    ],
)
def test_a_difference_ends_all_processes(theirs: dict[str, str], told: str, tmp_path: Path) -> None:
    main, other = run_group(compared, [SAME, theirs], world_size=2, scratch=tmp_path / "scratch")
    assert other.startswith(told) and (other == "") == (told == "")
    assert main == (
        told and "process 0: 1 other process has another config, code or shard set than process 0, and says which"
    )


def test_a_process_alone_compares_nothing() -> None:
    def refuse() -> dict[str, str]:
        raise AssertionError

    require_same_start(refuse, Processes(ShardOptions(), "cpu"))  # type: ignore[arg-type]


def test_what_is_compared(shard_set: Path, tar_set: Path) -> None:
    assert code_facts() == code_facts() and len(code_facts()["sdpnet's code (SHA-256)"]) == 64
    one, other = (shard_facts(path, ("train", "val", "none")) for path in (shard_set, tar_set))
    assert one.keys() == other.keys() == {"the shard set's classes", "split 'train'", "split 'val'"}
    assert one["the shard set's classes"] == other["the shard set's classes"]
    assert one["split 'train'"] != other["split 'train'"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK = 'x': must be a number from 0 on, as torchrun sets it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0': must be a number from 1 on"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1': must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2, WORLD_SIZE = 2: must be 0 <= RANK < WORLD_SIZE"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_group("cpu")
