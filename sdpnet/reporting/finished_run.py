"""The commands that come after a finished run: exporting its model, and loading what was exported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sdpnet.pipelines.terminal.next_step import fresh, python, sdpnet

__all__ = ["export_command", "load_command"]


def export_command(model: Path) -> tuple[str | Path, ...]:
    """Exports a run, a checkpoint or a `model.safetensors`: as ONNX where its packages are installed, else as
    PyTorch's program."""
    onnx = all(find_spec(name) for name in ("onnx", "onnxscript"))
    folder = model if model.is_dir() else model.parent
    out = fresh(folder / ("model.onnx" if onnx else "model.pt2"))
    return sdpnet("export", "--model", model, "--format", "onnx" if onnx else "torch-export", "--out", out)


def load_command(out: Path, format: str) -> tuple[str | Path, ...]:
    """Loads an exported file as another program would, and prints what it takes or holds."""
    path = str(out)
    if format != "onnx":
        code = f"import torch; print(torch.export.load({path!r}))"
    elif find_spec("onnxruntime"):
        code = f"import onnxruntime; print(onnxruntime.InferenceSession({path!r}).get_inputs()[0])"
    else:
        code = f"import onnx; print(onnx.load({path!r}).graph.input)"
    return (python(), "-c", code)
