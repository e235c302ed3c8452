"""Build commands in which one system call fails or the process is killed at it, each in a child process.

This module is both sides: `Commands` runs it as a process that has imported everything and forks for each request.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdpnet.preprocess.verify import verify

ROOT = Path(__file__).resolve().parents[2]
# The system calls with which a conversion changes files, and some of its functions.
CALLS = ("open", "pwrite", "fsync", "ftruncate", "replace", "unlink", "mkdir", "rmdir", "io.open")
FUNCTIONS = ("add", "sha256_of", "finish")


@dataclass(frozen=True)
class Fault:
    """A fault at one call.

    Attributes:
        call: the name of the call; "*" for any of `CALLS`.
        path: a pattern; only calls for a path that it is found in count.
        nth: the number of the call, from 1.
        action: "kill" sends SIGKILL before the call, "kill after" after it, and "kill half" after the first half of a
            write. "ENOSPC" and "EIO" make the system refuse the call. With "short", a write takes only 7 bytes.
        lasting: whether every later call that matches fails too.
        lost: a pattern; the files whose path it is found in lose everything that was not synced, as by a power failure.
    """

    call: str
    path: str = ""
    nth: int = 1
    action: str = "kill"
    lasting: bool = False
    lost: str = ""


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit status (negative for a signal), its stderr, and the number of calls by name."""

    status: int
    stderr: str
    calls: dict[str, int] = field(default_factory=dict)


class Commands:
    """Runs build commands, one at a time, with or without a fault. It is a context manager.

    Args:
        script: the program that runs the commands by `serve`.
        limit: the number of seconds after which SIGALRM ends a command; 0 for no limit.
    """

    def __init__(self, script: str = __file__, limit: int = 0) -> None:
        self._script, self._limit = script, limit

    def __enter__(self) -> Commands:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
        }  # one thread, because it forks
        self._process = subprocess.Popen(
            [sys.executable, self._script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def run(self, format: str, arguments: list[str], fault: Fault | None = None, processes: bool = False) -> Ended:
        """Runs `build_ffcv` ("beton") or `build_dali` ("tar").

        Each image is committed separately. With `processes`, the command has the same worker processes and thread as
        outside of tests. By default it has neither, so that its calls always come in the same order.
        """
        request = {"format": format, "arguments": arguments, "processes": processes}
        return self.request({**request, "fault": fault and asdict(fault)})

    def request(self, request: dict[str, Any]) -> Ended:
        """Sends a request to the script. If it has the key "seconds", the command is killed after that time."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps({**request, "limit": self._limit}), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))


class _Inline:
    """A thread pool without threads: it runs a function when it is submitted."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


class Injector:
    """Replaces system calls and functions, counts them, and makes one of them fail."""

    def __init__(self, out: str, fault: Fault | None) -> None:
        self.out, self.fault = out, fault
        self.counts: Counter[str] = Counter()
        self.matching = 0
        self.unsynced: list[tuple[str, int, bytes, int]] = []  # path, offset, previous content, previous file size
        self.real = {call: getattr(os, call) for call in CALLS[:-1]}

    def install(self) -> None:
        """Replaces all of `CALLS` in this process permanently."""
        for call in CALLS[:-1]:
            setattr(os, call, self.wrap(call, getattr(os, call)))
        io.open = self.wrap("io.open", io.open)  # Path.open calls it
        if accessor := getattr(
            pathlib, "_NormalAccessor", None
        ):  # in Python 3.10, pathlib keeps references to the calls
            for call in ("mkdir", "rmdir", "unlink", "replace"):
                setattr(accessor, call, staticmethod(getattr(os, call)))
            accessor.open = staticmethod(io.open)

    def wrap(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            path = _path(call, arguments, options)
            ours = call in FUNCTIONS or path == self.out or path.startswith(self.out + "/")
            if call == "io.open" and not set("wax+") & set((*arguments, "r")[1]):
                ours = False
            if not ours:
                return real(*arguments, **options)
            self.counts[call] += 1
            fault = self.fault
            meant = fault is not None and self._is_meant(fault, call, path)
            if fault is None or not meant:
                return self._call(call, path, real, arguments, options)
            if fault.action == "short":
                return self._call(call, path, real, (arguments[0], arguments[1][:7], arguments[2]), options)
            if not fault.action.startswith("kill"):
                number = getattr(errno, fault.action)
                names = () if call in ("pwrite", "fsync", "ftruncate") else (path,)
                raise OSError(number, os.strerror(number), *names)
            if fault.action == "kill half" and call == "pwrite":
                half = arguments[1][: len(arguments[1]) // 2]
                self._call(call, path, real, (arguments[0], half, arguments[2]), options)
            elif fault.action == "kill after":
                with contextlib.suppress(FileNotFoundError):  # the first call of mkdir(parents=True) may fail
                    self._call(call, path, real, arguments, options)
            if fault.lost:
                self._lose(fault.lost)
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def _call(self, call: str, path: str, real: Callable[..., Any], arguments: Any, options: Any) -> Any:
        if call == "fsync":  # it is slow, and makes no difference to what a killed process leaves behind
            self.unsynced = [change for change in self.unsynced if change[0] != path]
            return None
        if call in ("pwrite", "ftruncate"):
            content = Path(path).read_bytes() if os.path.isfile(path) else b""
            start = arguments[2 if call == "pwrite" else 1]
            self.unsynced.append((path, start, content[start:], len(content)))
        return real(*arguments, **options)

    def _lose(self, pattern: str) -> None:
        for path, start, content, size in reversed(self.unsynced):
            if re.search(pattern, path):
                descriptor = self.real["open"](path, os.O_RDWR)
                self.real["pwrite"](descriptor, content, start)
                self.real["ftruncate"](descriptor, size)

    def _is_meant(self, fault: Fault, call: str, path: str) -> bool:
        if fault.call not in (call, "*") or (fault.call == "*" and call in FUNCTIONS):
            return False
        if not re.search(fault.path, path):
            return False
        self.matching += 1
        return self.matching == fault.nth or (self.matching > fault.nth and fault.lasting)


def command_line(source: Path, out: Path, *more: str) -> list[str]:
    """The flags of a build command."""
    return ["--source", str(source), "--out", str(out), "--on-bad", "skip", *more]


def contents(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder, by name; b"folder" for a folder in it."""
    return {path.name: path.read_bytes() if path.is_file() else b"folder" for path in sorted(folder.iterdir())}


def require_absent_or_complete(out: Path, whole: Path) -> None:
    """After a conversion that ended early, only complete files have their final names, and the manifest has it last."""
    found = contents(out) if out.exists() else {}
    files = {name: content for name, content in found.items() if not re.fullmatch(r"\.unfinished|\..*\.partial", name)}
    expected = contents(whole)
    assert {name: content == expected.get(name) for name, content in files.items()} == dict.fromkeys(files, True)
    if "manifest.json" in files:
        assert set(files) == set(expected)
        assert list(verify(out)) == []


def require_finished(ended: Ended, out: Path, whole: Path) -> None:
    """The command has finished the set that `whole` is a copy of, or has found it finished."""
    last = ended.stderr.rstrip().rpartition("\n")[2]
    assert ended.status == 0 or "already holds a shard set" in last, ended.stderr
    assert contents(out) == contents(whole)


def _path(call: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The path of the file that a call changes; for a rename, the new path."""
    if call in FUNCTIONS:
        return ""
    target = arguments[1 if call == "replace" else 0]
    if isinstance(target, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{target}")
        return ""
    text = os.fsdecode(target)
    if options.get("dir_fd") is not None:
        text = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), text)
    return os.path.abspath(text)


def _convert(request: dict[str, Any], report: int) -> int:
    """Runs the command in the forked child, with small pages and tars, a commit after each image, and the fault."""
    from sdpnet.preprocess import build_dali, build_ffcv
    from sdpnet.preprocess.conversion import command as build
    from sdpnet.preprocess.conversion import committer
    from sdpnet.preprocess.conversion.writers import beton
    from sdpnet.preprocess.conversion.writers import tar as tar_shards

    class SmallPages(beton.BetonWriter):
        def __init__(self, directory: Path, split: str, num_images: int) -> None:
            super().__init__(directory, split, num_images, page_size=2048)

    class SmallTars(tar_shards.TarWriter):
        def __init__(self, directory: Path, split: str, num_images: int, shard_bytes: int) -> None:
            super().__init__(directory, split, num_images, shard_bytes=12_000)

    build_ffcv.BetonWriter = SmallPages
    build_dali.TarWriter = SmallTars
    committer.COMMIT_SECONDS = 0.0
    if not request["processes"]:
        committer.ThreadPoolExecutor = _Inline
        build._workers = lambda arguments: 0
    arguments = request["arguments"]
    out = os.path.abspath(arguments[arguments.index("--out") + 1])
    injector = Injector(out, request["fault"] and Fault(**request["fault"]))
    injector.install()
    for writer in (SmallPages, SmallTars):
        for name in ("add", "finish"):
            setattr(writer, name, injector.wrap(name, getattr(writer, name)))
    for module in (beton, tar_shards):
        module.sha256_of = injector.wrap("sha256_of", module.sha256_of)
    command = build_ffcv if request["format"] == "beton" else build_dali
    try:
        return command.main(arguments)
    finally:
        os.write(report, json.dumps(injector.counts).encode())


def serve(run: Callable[[dict[str, Any], int], int]) -> None:
    """Answers the requests of `Commands`. A forked child calls `run(request, descriptor for counts)` for the status."""
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as stderr, tempfile.TemporaryFile() as report:
            process = os.fork()
            if process == 0:
                status = 70
                try:
                    signal.alarm(request["limit"])
                    os.dup2(stderr.fileno(), 2)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    status = run(request, report.fileno())
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            if "seconds" in request:
                time.sleep(request["seconds"])
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            stderr.seek(0)
            report.seek(0)
            counts = json.loads(report.read() or b"{}")
            ended = Ended(os.waitstatus_to_exitcode(status), stderr.read(), counts)
            print(json.dumps(asdict(ended)), flush=True)


def _main() -> None:
    import numpy  # noqa: F401
    import PIL.Image

    from sdpnet.preprocess import build_dali, build_ffcv  # noqa: F401

    PIL.Image.init()
    serve(_convert)


if __name__ == "__main__":
    _main()
