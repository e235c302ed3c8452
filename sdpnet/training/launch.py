"""The launch of a training from a command line: its config, its group of processes, and its directory."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sdpnet.config.load import PATH_KEYS, absolute_paths, flat_values, load_config
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes, from_main, join_group, leave_group, report_lost_process
from sdpnet.distributed.restart import is_restart_of_own_run
from sdpnet.distributed.run_directory import no_run_in, run_directory
from sdpnet.flags.train import PROFILED_STEPS
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.lasting_output import lasting_output
from sdpnet.training.continued_run import resume_command
from sdpnet.training.same_start import code_facts, require_same_start, shard_facts

__all__ = ["Launch", "config_from", "launched"]


def config_from(arguments: argparse.Namespace) -> Config:
    """The config that the arguments ask for. Raises `UserError` where they ask for none, or for an impossible one."""
    settings = list(arguments.set)
    settings += [f"data.path={json.dumps(arguments.data)}"] if arguments.data else []
    settings += [f"data.pipeline={arguments.pipeline}"] if arguments.pipeline else []
    settings += [f"log.profile={list(PROFILED_STEPS)}"] if arguments.profile else []
    own = arguments.out / "config.yaml"
    if not arguments.config and not (arguments.resume and own.is_file()):
        if arguments.resume:
            raise UserError(no_run_in(arguments.out))
        alternative = f", or continue the run that is there: {resume_command(arguments.out)}" if own.is_file() else ""
        raise UserError(f"no config given: pass --config NAME (see configs/){alternative}")
    return absolute_paths(load_config(arguments.config or str(own), settings))


@dataclass(frozen=True)
class Launch:
    """This process's place in a training: `require_own` raises when another process has taken over the directory."""

    processes: Processes
    resume: bool
    require_own: Callable[[], object]


@contextlib.contextmanager
def launched(config: Config, out: Path, *, resume: bool) -> Iterator[Launch]:
    """Joins the other processes and takes hold of the run's directory until the training ends.

    Raises:
        UserError: another training uses the directory, the processes differ in config, code or data, or another
            process has ended or keeps silent.
    """
    with (
        lasting_output(f"training goes on; {out / 'metrics.jsonl'} has its figures"),
        report_lost_process(config.train.timeout_seconds),
    ):
        processes = join_group(config.train.device, config.train.timeout_seconds)
        try:
            with run_directory(out) if processes.is_main else contextlib.nullcontext() as held:
                require_same_start(lambda: _facts(config), processes)
                resume = resume or from_main(is_restart_of_own_run(out), processes) == 1
                yield Launch(processes, resume, held.require_own if held else lambda: None)
        finally:
            leave_group()


def _facts(config: Config) -> dict[str, str]:
    """The facts that must be equal in all processes. Paths are not included: they may differ."""
    values = {key: str(value) for key, value in flat_values(asdict(config)) if key not in PATH_KEYS}
    data = config.data
    shards = shard_facts(data.path, (data.train_split, data.val_split)) if data.path else {}
    return {**values, **code_facts(), **shards}
