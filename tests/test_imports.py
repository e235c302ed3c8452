"""The dependency arrows of the design: preprocess -> pipelines <- sdpnet, and backends only inside their pipeline."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("preprocess", "pipelines", "sdpnet")
# Room by room, what each may import of the others: preprocess -> pipelines <- sdpnet, and no circle inside of them.
# "sdpnet" and "sdpnet.pipelines" alone are the packages, which say where they lie; every room may know them.
BASE = (
    "pipelines/errors",
    "pipelines/files",
    "pipelines/lasting_output",
    "pipelines/machine",
    "pipelines/startup",
    "pipelines/triton_support",
)
NATIVE = (*BASE, "pipelines/native")
IMAGES = (*NATIVE, "pipelines/images")
SHARDS = (*IMAGES, "pipelines/shards")
TERMINAL = (*SHARDS, "pipelines/terminal")
PAGES = (*TERMINAL, "pipelines/pages")  # which names the command for a missing package
PLAN = (*BASE, "pipelines/planning", "pipelines/plan")
OPTIONS = (*PLAN, "pipelines/options")
CONTRACT = (*OPTIONS, *SHARDS, "pipelines/memory", "pipelines/contract")
AUGMENT = (*CONTRACT, "pipelines/augment", "pipelines/augment/reference", "pipelines/augment/fused")
EXECUTORS = (*CONTRACT, *TERMINAL, "pipelines/executors")
LOADER = (*EXECUTORS, "pipelines/loader")
FILES_OF_SOURCES = (*SHARDS, "preprocess/sources/files")
PARQUET = (*TERMINAL, *FILES_OF_SOURCES, "preprocess/sources/parquet")
CONTAINERS = (*PARQUET, "preprocess/sources/containers")
SOURCES = (*CONTAINERS, "preprocess/sources")
ENCODING = (*TERMINAL, *FILES_OF_SOURCES, "preprocess/encoding")
WORKERS = (*ENCODING, "preprocess/sources/parquet", "preprocess/workers")
WRITERS = (*WORKERS, "preprocess/conversion/writers")
CONVERSION = (*SOURCES, *WRITERS, "preprocess/conversion")
ADOPTION = (*CONVERSION, "preprocess/adoption")
INSPECTION = (*AUGMENT, *LOADER, *PAGES, "preprocess/inspection")
PREPROCESS_FLAGS = (*ENCODING, "preprocess/inspection", "preprocess/flags")
MODEL = (*OPTIONS, *TERMINAL, "sdpnet/model", "sdpnet/model/kernels")
CONFIG = (*MODEL, "sdpnet/config")
DISTRIBUTED = (*OPTIONS, *TERMINAL, "sdpnet/distributed")
OPTIM = (*CONFIG, *DISTRIBUTED, "sdpnet/optim")
CHECKPOINTS = (*OPTIM, "sdpnet/checkpoints")
EXECUTION = (*CHECKPOINTS, "sdpnet/execution", "sdpnet/execution/variants")
REPORTING = (*CHECKPOINTS, *PAGES, "sdpnet/reporting")
FLAGS = (*CONFIG, "sdpnet/flags")
LAB = (*REPORTING, "sdpnet/flags", "sdpnet/lab")
LOADING = (*CONFIG, *AUGMENT, *LOADER, "sdpnet/loading")
TRAINING = (*LOADING, *EXECUTION, *REPORTING, "pipelines", "sdpnet/flags", "sdpnet/training")
BENCHMARKS = (*AUGMENT, *LOADER, "pipelines", "pipelines/benchmarks")
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "pipelines": BASE,
    "pipelines/native": NATIVE,
    "pipelines/images": IMAGES,
    "pipelines/shards": SHARDS,
    "pipelines/terminal": TERMINAL,
    "pipelines/pages": PAGES,
    "pipelines/planning": PLAN,
    "pipelines/plan": PLAN,
    "pipelines/options": OPTIONS,
    "pipelines/memory": BASE,
    "pipelines/contract": CONTRACT,
    "pipelines/augment/reference": AUGMENT,
    "pipelines/augment/fused": AUGMENT,
    "pipelines/augment": AUGMENT,
    "pipelines/executors": EXECUTORS,
    "pipelines/loader": LOADER,
    "pipelines/benchmarks": BENCHMARKS,
    "pipelines/bench": BENCHMARKS,
    "preprocess/sources/files": FILES_OF_SOURCES,
    "preprocess/sources/parquet": PARQUET,
    "preprocess/sources/containers": CONTAINERS,
    "preprocess/sources": SOURCES,
    "preprocess/encoding": ENCODING,
    "preprocess/workers": WORKERS,
    "preprocess/conversion": CONVERSION,
    "preprocess/conversion/writers": WRITERS,
    "preprocess/inspection": INSPECTION,
    "preprocess/adoption": ADOPTION,
    "preprocess/flags": PREPROCESS_FLAGS,
    "preprocess": (*ADOPTION, *INSPECTION, "preprocess/flags", "preprocess"),
    "sdpnet": (*BASE, "pipelines/terminal", "sdpnet/loading"),  # see LAZY
    "sdpnet/model": MODEL,
    "sdpnet/model/kernels": (*OPTIONS, "sdpnet/model/kernels"),
    "sdpnet/config": CONFIG,
    "sdpnet/distributed": DISTRIBUTED,
    "sdpnet/optim": OPTIM,
    "sdpnet/checkpoints": CHECKPOINTS,
    "sdpnet/execution": EXECUTION,
    "sdpnet/execution/variants": EXECUTION,
    "sdpnet/reporting": REPORTING,
    "sdpnet/loading": LOADING,
    "sdpnet/flags": FLAGS,
    "sdpnet/lab": LAB,
    "sdpnet/training": TRAINING,
    "sdpnet/train": TRAINING,
    "sdpnet/benchmarks": (*TRAINING, *BENCHMARKS, "sdpnet/benchmarks"),
    "sdpnet/commands": (*TRAINING, *BENCHMARKS, *LAB, "sdpnet/benchmarks", "sdpnet/commands"),
    "sdpnet/gpu_checks/programs": (*TRAINING, *BENCHMARKS, *LAB, "sdpnet/benchmarks", "sdpnet/gpu_checks/programs"),
    "sdpnet/gpu_checks": (*EXECUTORS, "sdpnet/gpu_checks", "sdpnet/gpu_checks/programs"),
    "sdpnet/completion": (*REPORTING, "sdpnet/cli", "sdpnet/flags"),
    "sdpnet/__main__": ("sdpnet/cli",),
    "sdpnet/cli": TERMINAL,  # the commands are imported by name, each when it is asked for
}
BACKENDS = {
    "ffcv": ("pipelines/executors/ffcv.py", "pipelines/benchmarks/half_raw.py"),
    "numba": ("pipelines/executors/ffcv.py",),
    "nvidia": ("pipelines/executors/dali.py",),
    "pyarrow": (
        "preprocess/sources/parquet/child.py",
        "preprocess/sources/parquet/columns.py",
        "preprocess/sources/parquet/row.py",
    ),
    "torchao": ("sdpnet/execution/variants/fp8.py",),
    "triton": (
        "sdpnet/model/kernels/batch_norm_kernel.py",
        "sdpnet/model/kernels/attention_kernel.py",
        "sdpnet/model/kernels/depthwise_kernel.py",
        "sdpnet/model/kernels/feed_forward_kernel.py",
        "sdpnet/model/kernels/gelu_kernel.py",
        "sdpnet/optim/update_kernel.py",
        "pipelines/augment/fused/finish.py",
        "pipelines/augment/fused/neighbours.py",
        "pipelines/augment/fused/operations.py",
        "pipelines/augment/fused/statistics.py",
    ),
}
TORCH_WHEN_CALLED = (
    ROOT / "preprocess/inspection/contact_sheet.py"
)  # imports the real pipeline in a function, if it can
LAZY = ROOT / "sdpnet/__init__.py"  # imports the public names when they are asked for, and for type checkers
# The links sdpnet/pipelines, sdpnet/preprocess and sdpnet/configs are left out: what they lead to is listed by itself.
FILES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.parent.resolve() == path.parent
)
# On loading, while there are no other threads: in Python 3.11, ast.parse fails now and then beside them (gh-106905).
PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    """The name that a file is imported under."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "sdpnet" else ("sdpnet", *parts))
    return name.removesuffix(".__init__")


PATHS = {module_of(path): path for path in FILES}


def room_of(path: Path) -> str:
    """The folder of a module; of one that lies in `pipelines` or `sdpnet` itself, its own path without the suffix."""
    inside = path.relative_to(ROOT)
    folder = inside.parent.as_posix()
    alone = folder in ("pipelines", "sdpnet") and path.name != "__init__.py"
    return inside.with_suffix("").as_posix() if alone else folder


def imported(path: Path, tree: ast.Module | None = None) -> set[str]:
    """The names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(tree or PARSED[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & set(PATHS)) or {node.module}
    return names


def forbidden(path: Path, tree: ast.Module | None = None) -> set[str]:
    """The rooms that a file imports from, and must not."""
    ours = {name for name in imported(path, tree) if name in PATHS and name not in ("sdpnet", "sdpnet.pipelines")}
    return {room_of(PATHS[name]) for name in ours} - set(ALLOWED[room_of(path)])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    assert not forbidden(path)
    assert not {name.split(".")[0] for name in imported(path)} & {"pipelines", "preprocess", "configs"}


@pytest.mark.parametrize(
    ("path", "line", "room"),
    [
        ("pipelines/contract.py", "import sdpnet.model.sdpnet", "sdpnet/model"),
        ("pipelines/options.py", "from sdpnet.pipelines.contract import Batch", "pipelines/contract"),
        ("pipelines/executors/native.py", "from sdpnet.pipelines.loader import make_loader", "pipelines/loader"),
        ("preprocess/sources/scan.py", "from sdpnet.preprocess.workers import pool", "preprocess/workers"),
        ("sdpnet/training/setup.py", "from sdpnet.benchmarks.step import main", "sdpnet/benchmarks"),
        ("sdpnet/model/sdpnet.py", "def f():\n    from sdpnet.config.options import Config", "sdpnet/config"),
        ("preprocess/verify.py", "from sdpnet.train import main", "sdpnet/train"),
        ("pipelines/images/file.py", "from sdpnet.pipelines.shards.layout import open_split", "pipelines/shards"),
    ],
)
def test_a_planted_violation_is_found(path: str, line: str, room: str) -> None:
    assert forbidden(ROOT / path, ast.parse(line)) == {room}


def test_no_circle_between_rooms() -> None:
    graph = {room: set() for room in ALLOWED}
    for path in FILES:
        ours = {name for name in imported(path) if name in PATHS and name not in ("sdpnet", "sdpnet.pipelines")}
        graph.setdefault(room_of(path), set()).update({room_of(PATHS[name]) for name in ours} - {room_of(path)})
    while free := {room for room, targets in graph.items() if not targets & set(graph)}:
        graph = {room: targets for room, targets in graph.items() if room not in free}
    assert not graph


def test_no_room_has_more_than_twelve_files() -> None:
    rooms = Counter(path.parent for path in FILES)
    assert max(rooms.values()) <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_stay_in_their_pipeline(path: Path) -> None:
    for backend in {name.split(".")[0] for name in imported(path)} & set(BACKENDS):
        assert path.relative_to(ROOT).as_posix() in BACKENDS[backend]


def test_conversion_needs_no_torch() -> None:
    """preprocess runs where torch need not be: nothing that it imports may import torch."""
    reachable, todo = set(), [p for p in FILES if p.relative_to(ROOT).parts[0] == "preprocess"]
    while todo:
        path = todo.pop()
        reachable.add(path)
        outside = (
            ast.Module(PARSED[path].body, [])
            if path not in (TORCH_WHEN_CALLED, LAZY)
            else ast.Module([node for node in PARSED[path].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        )
        for name in imported(path, outside):
            parts = name.split(".")
            packages = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            todo += [PATHS[package] for package in packages & set(PATHS) if PATHS[package] not in reachable]
    assert {p for p in reachable if "torch" in {n.split(".")[0] for n in imported(p)}} == {TORCH_WHEN_CALLED}
    modules = ", ".join(name for name in PATHS if name.startswith("sdpnet.preprocess"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "module",
    [module_of(path) for path in FILES if path.relative_to(ROOT).as_posix() not in sum(BACKENDS.values(), ())],
)
def test_all_is_explicit_and_true(module: str) -> None:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if module == "sdpnet.model.timm_models":
        names = sorted(set(names))  # timm appends the name of each model that it registers, listed or not
    assert names is not None
    assert sorted(set(names)) == sorted(names)
    assert all(hasattr(loaded, name) or f"{module}.{name}" in PATHS for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_entered_by_their_face(path: Path) -> None:
    """What a room imports of another one is in that room's `__all__`."""
    for name in imported(path) & set(PATHS):
        room, _, module = name.rpartition(".")
        if PATHS[name].name != "__init__.py" and room != "sdpnet" and PATHS[name].parent != path.parent:
            assert module in importlib.import_module(room).__all__, name


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_test_module_imports_another(path: Path) -> None:
    """Tests share what lies in tests/support/ and conftest.py."""
    assert not {name for name in imported(path, ast.parse(path.read_text())) if name.startswith("test_")}
