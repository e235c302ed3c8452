"""Compiles Triton kernels for GPUs that are not here. Only programs that `triton_programs.run` starts import it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

__all__ = ["compiled_for", "resources"]


def compiled_for(
    capability: int,
    kernel: Any,
    static: Mapping[str, Any],
    types: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    other: str = "i32",
    aligned: bool = True,
) -> Any:
    """A kernel, compiled for a compute capability such as 90.

    Args:
        static: the values of arguments that are constants of the compiler.
        types: Triton's types of arguments.
        other: the type of all other arguments.
        aligned: whether addresses are multiples of 16, as Triton finds at a launch.
    """
    signature = {name: "constexpr" if name in static else types.get(name, other) for name in kernel.arg_names}
    pointers = [n for n, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(n,): [["tt.divisibility", 16]] for n in pointers} if aligned else None
    source = ASTSource(kernel, signature, dict(static), attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def resources(compiled: Any, folder: str) -> list[str]:
    """What a compiled kernel uses, as cuobjdump's words: "REG:72", "STACK:0", "LOCAL:0"."""
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout.split()
