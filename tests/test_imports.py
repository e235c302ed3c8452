"""The dependency arrows of the design: preprocess -> pipelines <- sdpnet, and backends only inside their pipeline."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"sdpnet": {"sdpnet", "pipelines"}, "pipelines": {"pipelines"}, "preprocess": {"preprocess", "pipelines"}}
BACKENDS = {
    "ffcv": ("ffcv_pipeline.py",),
    "numba": ("ffcv_pipeline.py",),
    "nvidia": ("dali_pipeline.py",),
    "triton": (
        "depthwise_kernel.py",
        "fused_kernel.py",
        "fused_neighbours.py",
        "fused_operations.py",
        "fused_statistics.py",
    ),
}
TORCH_WHEN_CALLED = ROOT / "preprocess" / "contact_sheet.py"  # imports the real pipeline in one function, if it can
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# On loading, while there are no other threads: in Python 3.11, ast.parse fails now and then beside them (gh-106905).
PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(PARSED[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & set(PACKAGES) <= PACKAGES[package]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_stay_in_their_pipeline(path: Path) -> None:
    for backend in imported(path) & set(BACKENDS):
        assert path.name in BACKENDS[backend]


def test_the_layout_needs_no_torch() -> None:
    """preprocess runs where torch need not be: nothing that it imports may import torch."""
    reachable, todo = set(), [p for p in FILES if p.relative_to(ROOT).parts[0] == "preprocess"]
    while todo:
        path = todo.pop()
        reachable.add(path)
        tree = PARSED[path]
        for node in tree.body if path == TORCH_WHEN_CALLED else ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                target = ROOT / (node.module.replace(".", "/") + ".py")
                if target.is_file() and target not in reachable:
                    todo.append(target)
    assert {p for p in reachable if "torch" in imported(p)} == {TORCH_WHEN_CALLED}
    modules = ", ".join(f"preprocess.{p.stem}" for p in FILES if p.relative_to(ROOT).parts[0] == "preprocess")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "module",
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.name not in sum(BACKENDS.values(), ())
    ],
)
def test_all_is_explicit_and_true(module: str) -> None:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        assert loaded.__file__ is not None and loaded.__file__.endswith("__init__.py")
        return
    assert sorted(set(names)) == sorted(names)
    assert all(hasattr(loaded, name) for name in names)
