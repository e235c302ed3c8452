"""A finished model as a file for other programs: ONNX, or PyTorch's exported program.

The exported model takes normalised images and returns logits. FILE.json beside it has all else that a program needs:
the classes, and the steps from an image file to the input, in words (`steps`) and as values. The exported model is run
and compared with the original before the file gets its name.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Final

import torch

from sdpnet.checkpoints.model import ModelCard, load_model, write_atomically
from sdpnet.flags.export import Batch, Format, add_arguments
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.files.atomic_write import require_place
from sdpnet.pipelines.terminal.next_step import next_lines
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.reporting.finished_run import load_command
from sdpnet.reporting.output import say

__all__ = ["TOLERANCE", "Format", "add_arguments", "export", "run"]

Forward = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE: Final = 1e-4  # the largest allowed difference of a logit, relative to the largest logit or 1


def export(
    model: SdPNet, card: ModelCard, out: Path, format: Format, image_size: int, batch: Batch = "dynamic"
) -> float:
    """Writes `out` and `out`.json.

    The input of the exported model is `images`, float32 (batch, 3, image_size, image_size), and its output `logits`,
    float32 (batch, num_classes). It is compared with `model` on random images. ONNX files are run by onnxruntime if it
    is installed, else by the reference implementation of ONNX.

    Args:
        model: in eval mode, on the CPU.
        batch: a fixed batch size, or "dynamic" for any. The comparison uses this size, or several ones for "dynamic".

    Returns:
        The largest difference of the logits, on the scale of `TOLERANCE`.

    Raises:
        UserError: a package is missing, a size is not possible, or the difference is above `TOLERANCE`. No file is
            written.
    """
    assert not model.training
    patch = model.options.patch_size
    ok = image_size > 0 and image_size % patch == 0
    require(ok, "image_size", image_size, f"a multiple of the patch size {patch}")
    require(batch == "dynamic" or batch >= 1, "batch", batch, "'dynamic' or at least 1")
    require_place(out)
    if format == "onnx":
        _require_onnx()
    sizes = (2, 1, 5) if batch == "dynamic" else (batch,)  # the first is not 1: torch.export would fix it
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randn(size, 3, image_size, image_size, generator=generator) for size in sizes]
    dynamic = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    difference = float("nan")

    def write(path: Path) -> None:
        nonlocal difference
        try:
            save = _save_onnx if format == "onnx" else _save_torch
            save(model, examples[0], dynamic, path)
            forward = _load_onnx(path) if format == "onnx" else _load_torch(path)
            with torch.no_grad():
                difference = (
                    torch.stack([_difference(forward(images), model(images)) for images in examples]).max().item()
                )
            if not difference <= TOLERANCE:  # also true for NaN
                raise UserError(
                    f"{out}: not written: as {format} the logits differ by {difference:.2g} from the model's; "
                    f"the tolerance is {TOLERANCE:g}"
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    write_atomically(out, write)
    shape = f"({batch}, 3, {image_size}, {image_size})"
    card_facts = asdict(replace(card, image_size=image_size))
    del card_facts["weights_sha256"]  # it is the checksum of model.safetensors
    facts = {
        **card_facts,
        "format": format,
        "steps": _steps(card, image_size),
        "input": f"images: float32 {shape}, RGB in [0, 1], less mean, divided by std",
        "output": "logits: float32 (batch, classes)",
    }
    text = json.dumps(facts, indent=1) + "\n"
    write_atomically(out.with_name(f"{out.name}.json"), lambda path: path.write_text(text, encoding="utf-8"))
    return difference


def _steps(card: ModelCard, image_size: int) -> list[str]:
    """The steps that make an input from an image file, in their order, as `sdpnet predict` takes them."""
    exif, max_side = card.preprocessing.exif, card.preprocessing.max_side
    reduce = f"reduce the longer side to {max_side} pixels by area averaging, where it is longer"
    return [
        "decode to RGB, 8 bits; an alpha channel is dropped, 16 bits are scaled to 8",
        "turn upright as EXIF says" if exif == "apply" else "ignore the EXIF orientation",
        *([reduce] if max_side else []),
        f"crop the centre square whose side is {card.centre_fraction:g} of the shorter side",
        f"resize to {image_size} x {image_size} pixels, bilinear with antialiasing",
        "divide by 255, subtract mean, divide by std",
    ]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    if found.shape != expected.shape:
        return torch.tensor(float("inf"))
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1)


def _save_torch(model: SdPNet, example: torch.Tensor, dynamic: tuple[object, ...] | None, path: Path) -> None:
    # On a full disk, the destructor of torch's writer throws, which ends the process. So torch writes to memory.
    content = BytesIO()
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=dynamic), content)
    # Not getbuffer(): a view that is left over after an error crashes Python before 3.12.3 (gh-111049).
    path.write_bytes(content.getvalue())


def _load_torch(path: Path) -> Forward:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"export to onnx needs {name} ({error}): {install_extra('export')}") from None


def _save_onnx(model: SdPNet, example: torch.Tensor, dynamic: tuple[object, ...] | None, path: Path) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def _load_onnx(path: Path) -> Forward:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    else:
        evaluator = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0])


def run(arguments: argparse.Namespace) -> int:
    require_place(arguments.out, "--out")
    if arguments.format == "onnx":
        _require_onnx()
    model, card = load_model(arguments.model)
    image_size = card.image_size if arguments.image_size is None else arguments.image_size
    difference = export(model, card, arguments.out, arguments.format, image_size, arguments.batch)
    say(f"{arguments.out}: {image_size} px, batch {arguments.batch}; differs from the model by {difference:.1e}")
    say(*next_lines(*load_command(arguments.out, arguments.format)))
    return 0
