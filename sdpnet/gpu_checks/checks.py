"""The parts of `./dev gpu` that check: what runs on the GPU is correct."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from sdpnet.gpu_checks.part import Part, Settings
from sdpnet.gpu_checks.programs.commands import ROOT
from sdpnet.pipelines.executors import registry
from sdpnet.pipelines.executors.registry import PIPELINES
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.machine import usable_cores

__all__ = ["CHECKS", "gpu_test_files", "installed"]

_LONG_TEST: Final = "tests/sdpnet/test_fast_step.py"  # 50 steps, several times; a part of its own
_TINY_TESTS: Final = ("tests/sdpnet/test_side_stream.py", "tests/sdpnet/test_data_wait.py")
# How pytest -v reports a test: alone as "NAME FAILED [ 50%]", with xdist as "[gw0] [ 50%] FAILED NAME".
_OUTCOME: Final = "(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
_TEST_ENDED: Final = (
    re.compile(rf"(?P<name>\S+::.+) {_OUTCOME}(?: \(.*\))?(?:\s+\[ *\d+%\])?\s*"),
    re.compile(rf"\[gw\d+\] (?:\[ *\d+%\] )?{_OUTCOME} (?P<name>\S+::.+)"),
)


def installed(*names: str) -> list[str]:
    """Those of these pipelines and packages that are here. `native` is kept, because a missing one must be seen."""

    def has(name: str) -> bool:
        if name in PIPELINES:
            return name == "native" or registry.installed(name)
        return importlib.util.find_spec(name) is not None

    return [name for name in names if has(name)]


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """The test files that have the mark `gpu`, relative to the checkout."""
    found = [path for path in sorted(root.glob("tests/*/test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")]
    return [path.relative_to(root).as_posix() for path in found]


def _pytest(settings: Settings, part: str, files: list[str], *more: str) -> list[str]:
    workers = min(8, len(usable_cores()))
    beside = ["-n", str(workers), "--dist", "loadfile"] if installed("xdist") and len(files) > 1 and workers > 1 else []
    # A line for each test, so that the log of a part that is cut off names the tests that have failed.
    words = ["-v", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "gpu", "-rfE", "--tb=short"]
    return ["-m", "pytest", *words, *beside, f"--junitxml={settings.file(part, '.xml')}", *files, *more]


def _gpu_tests(settings: Settings, seconds: float) -> list[str]:
    files = [name for name in gpu_test_files() if name != _LONG_TEST]
    return _pytest(settings, "gpu_tests", list(_TINY_TESTS) if settings.tiny else files)


def _fast_step(settings: Settings, seconds: float) -> list[str]:
    which = "cpu and fp32" if settings.tiny else "cuda" if settings.size == "long" else "cuda and fp32"
    return _pytest(settings, "fast_step", [_LONG_TEST], "-k", which)


def _junit(part: str) -> Callable[[Settings], Mapping[str, Any]]:
    """Counts tests in the report of pytest, or in its log if it did not come to its end. Writes the part's JSON."""

    def collect(settings: Settings) -> Mapping[str, Any]:
        if not settings.file(part, ".xml").exists():
            return keep(settings, _ended_tests(settings.file(part, ".log").read_text("utf-8", "replace")))
        suite = ElementTree.parse(settings.file(part, ".xml")).getroot().find("testsuite")
        assert suite is not None
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        bad = [
            f"{case.get('classname')}::{case.get('name')}" for case in suite if len(case) and case[0].tag != "skipped"
        ]
        skipped = [case[0].get("message") for case in suite if len(case) and case[0].tag == "skipped"]
        return keep(settings, {**count, "failed": bad, "reasons_of_skipped": sorted(set(map(str, skipped)))})

    def keep(settings: Settings, result: Mapping[str, Any]) -> Mapping[str, Any]:
        publish_bytes(settings.file(part), (json.dumps(result, indent=1) + "\n").encode())
        return result

    return collect


def _ended_tests(log: str) -> Mapping[str, Any]:
    """The tests that have ended, by the log of `pytest -v`.

    Raises:
        ValueError: none has ended.
    """
    found = [match for line in log.splitlines() for form in _TEST_ENDED if (match := form.fullmatch(line.rstrip()))]
    if not found:
        raise ValueError("no test has ended")
    names: dict[str, list[str]] = {}
    for match in found:
        names.setdefault(match["outcome"], []).append(match["name"].strip())
    failures, errors = names.get("FAILED", []), names.get("ERROR", [])
    return {
        "tests": len(found),
        "failures": len(failures),
        "errors": len(errors),
        "skipped": len(names.get("SKIPPED", [])) + len(names.get("XFAIL", [])),
        "failed": [*failures, *errors],
        "complete": False,
    }


def _tests_figures(result: Mapping[str, Any]) -> str:
    bad = result["failures"] + result["errors"]
    passed = result["tests"] - bad - result["skipped"]
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    return f"{passed} passed{skipped}" + (f", {bad} FAILED: {', '.join(result['failed'][:2])}" if bad else "")


def _no_tests(settings: Settings) -> str:
    if not (ROOT / "tests").is_dir():
        return "tests/ is not here: it comes with a checkout or a bundle"
    return "" if installed("pytest") else "pytest is not installed"


def _fused(settings: Settings, seconds: float) -> list[str]:
    size = ["--batch-size", "4" if settings.tiny else "64", "--image-size", str(settings.image_size)]
    seconds = 4 if settings.tiny else 0.7 * seconds
    return _module("fused", settings, *size, "--seconds", f"{seconds:.0f}", "--device", settings.device)


def _fused_figures(result: Mapping[str, Any]) -> str:
    if result["wrong"]:
        return f"{len(result['wrong'])} of {result['cases']} cases differ: {', '.join(result['wrong'][:2])}"
    here = "" if result["fused_kernels"] else "; no fused kernels here"
    here += f"; {result['left_out']} left out" if result["left_out"] else ""
    same = f"{result['same_to_the_bit']} of {result['cases']} cases the same bits"
    return f"{same}, others within {result['largest_levels']:.2g} levels{here}"


def _module(name: str, settings: Settings, *more: str) -> list[str]:
    """A module of this room: with the data, the file for the result, and `more`."""
    return [
        "-m",
        f"sdpnet.gpu_checks.programs.{name}",
        "--data",
        str(settings.data),
        "--json",
        str(settings.file(name)),
        *more,
    ]


def _pixels(settings: Settings, seconds: float) -> list[str]:
    ffcv = ["ffcv"] if (settings.data / "train.beton").is_file() else []  # it reads no other files
    names = installed(*(["native"] if settings.tiny else ["native", "dali", *ffcv]))
    words = ["--data", str(settings.data), "--pipelines", ",".join(names)]
    amount = ["--batches", "2", "--batch-size", "4"] if settings.tiny else ["--batches", "10"]
    words += ["--device", settings.device, *amount]
    return ["tests/support/agreement.py", *words, "--json", str(settings.file("pixels"))]


def _pixels_result(settings: Settings) -> Mapping[str, Any]:
    return {"results": json.loads(settings.file("pixels").read_text(encoding="utf-8"))}


def _pixels_figures(result: Mapping[str, Any]) -> str:
    worst: dict[str, float] = {}
    for row in result["results"]:
        worst[row["pipeline"]] = max(worst.get(row["pipeline"], 0.0), row["mean_difference"])
    return "mean difference " + ", ".join(f"{name} {levels:.2f}" for name, levels in worst.items()) + " levels"


def _resume(settings: Settings, seconds: float) -> list[str]:
    more = ["--batch-size", "4", "--epochs", "2"] if settings.tiny else []
    work = ["--work", str(settings.out / "resume-runs"), "--device", settings.device]
    return _module("resume", settings, *work, *more)


def _resume_figures(result: Mapping[str, Any]) -> str:
    if result["largest_difference"] is None:
        return "the resumed training has other steps"
    bits = "the same weights to the bit" if result["weights_same_to_the_bit"] else "other last bits of the weights"
    return f"killed after step {result['killed_after']} of {result['steps']}; largest difference " + (
        f"{result['largest_difference']:.1e}, {bits}"
    )


CHECKS: Final[tuple[Part, ...]] = (
    Part(
        name="fused",
        what="the fused augmentation equals its reference, on real batches: all operations, pairs, policies",
        is_check=True,
        rank=1,
        seconds=(25, 40, 60),
        command=_fused,
        figures=_fused_figures,
    ),
    Part(
        name="pixels",
        what="the pixels of native, dali and ffcv equal the reference's, up to their decoders",
        is_check=True,
        rank=2,
        seconds=(20, 30, 30),
        command=_pixels,
        figures=_pixels_figures,
        obstacle=_no_tests,
        collect=_pixels_result,
    ),
    Part(
        name="resume",
        what="a training that is killed and resumed ends like one that is not",
        is_check=True,
        rank=4,
        seconds=(30, 30, 30),
        command=_resume,
        figures=_resume_figures,
    ),
    Part(
        name="fast_step",
        what="50 steps, compiled and fused, have the losses of 50 plain ones",
        is_check=True,
        rank=6,
        seconds=(60, 60, 110),
        command=_fast_step,
        figures=_tests_figures,
        obstacle=_no_tests,
        collect=_junit("fast_step"),
    ),
    Part(
        name="gpu_tests",
        what="all tests of a GPU: pytest -m gpu",
        is_check=True,
        rank=7,
        seconds=(110, 110, 200),
        command=_gpu_tests,
        figures=_tests_figures,
        obstacle=_no_tests,
        collect=_junit("gpu_tests"),
    ),
)
