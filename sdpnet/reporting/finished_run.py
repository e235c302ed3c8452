"""The next commands after a finished run: the export of its model, and loading the exported file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sdpnet.pipelines.terminal.next_step import fresh, python, sdpnet

__all__ = ["export_command", "load_command"]


def export_command(model: Path) -> tuple[str | Path, ...]:
    """The command that exports a run, a checkpoint or a `model.safetensors`.

    The format is ONNX if its packages are installed, else PyTorch's exported program.
    """
    onnx = all(find_spec(name) for name in ("onnx", "onnxscript"))
    folder = model if model.is_dir() else model.parent
    out = fresh(folder / ("model.onnx" if onnx else "model.pt2"))
    return sdpnet("export", "--model", model, "--format", "onnx" if onnx else "torch-export", "--out", out)


def load_command(out: Path, format: str) -> tuple[str | Path, ...]:
    """The command that loads an exported file as another program would, and prints its input or its program."""
    path = str(out)
    if format != "onnx":
        code = f"import torch; print(torch.export.load({path!r}))"
    elif find_spec("onnxruntime"):
        code = f"import onnxruntime; print(onnxruntime.InferenceSession({path!r}).get_inputs()[0])"
    else:
        code = f"import onnx; print(onnx.load({path!r}).graph.input)"
    return (python(), "-c", code)
