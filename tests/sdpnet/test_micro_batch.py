from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdpnet.benchmarks.throughput import noise
from sdpnet.config.load import load_config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.micro_batch import (
    _PREPARED_BYTES,
    Fit,
    choose_micro_batch,
    out_of_memory,
    parts,
    probe,
    training_pass,
)
from sdpnet.model.sdpnet import SdPNet, create_model
from sdpnet.optim.loss import soft_cross_entropy
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

pytestmark = pytest.mark.gpu

ON_CPU = Processes(ShardOptions(0, 1), torch.device("cpu"))


class Cramped(nn.Module):
    """A model on a device that holds the activations of at most `limit` images; notes what it was given."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.inner = create_model("sdpnet_tiny", 10, dropout=0.5)
        self.limit = limit
        self.given: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.given.append(len(images))
        logits = self.inner(images)
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits


def blank_pass(model: nn.Module) -> Any:
    return training_pass(model, soft_cross_entropy, image_size=16, num_classes=10, dtype=torch.float32)


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 12, 99])
def test_halving_finds_what_fits(limit: int) -> None:
    model = Cramped(limit)
    fitting = next(n for n in (25, 13, 7, 4, 2, 1) if n <= limit)
    assert probe(model, blank_pass(model), 25).images == fitting
    assert model.given == [1, *(n for n in (25, 13, 7, 4, 2) if n >= fitting)]


def test_probing_leaves_no_trace() -> None:
    model = Cramped(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    probe(model, blank_pass(model), 8)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_not_even_one_image() -> None:
    model = Cramped(0)
    with pytest.raises(UserError, match=r"with a single image; use a smaller model or data\.image_size$") as caught:
        probe(model, blank_pass(model), 8)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_it() -> None:
    model = Cramped(9)
    with pytest.raises(RuntimeError, match="channels"):
        probe(model, lambda n: model(torch.zeros(n, 1, 16, 16)).sum().backward(), 8)


@pytest.mark.parametrize(("choice", "expected"), [(None, 8), (3, 3), (64, 8), ("auto", 8)])
def test_choices_need_no_tries_on_a_cpu(choice: Any, expected: int) -> None:
    model = Cramped(0)
    assert choose_micro_batch(choice, 8, model, blank_pass(model), ON_CPU) == expected
    assert not model.given


def test_a_batch_that_is_made_ready_meanwhile_has_its_memory() -> None:
    """Bytes that are held during the pass, 26 for each value of 100 images."""
    held = []

    class Watching(Cramped):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
            held.append(sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.uint8))
            return super().forward(images)

    for beside in (0, 100):
        shape = {"image_size": 16, "num_classes": 10, "dtype": torch.float32}
        training_pass(Watching(99), soft_cross_entropy, **shape, beside=beside)(2)  # type: ignore[arg-type]
    assert held[1] - held[0] == 26 * 100 * 3 * 16 * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_on_a_gpu_that_memory_is_enough(fused: str) -> None:
    config = load_config("sdpnet_xl", ["data.batch_size_per_gpu=64", f"augment.fused={fused}"])
    device = torch.device("cuda")
    stage = DeviceStage(config.augment, 10, torch.float16, train=True)
    ready = (stage(batch) for batch in noise(config, 10, device))
    before = [next(ready) for _ in range(2)]  # the one in use, and the next
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    next(ready)
    peak = torch.cuda.max_memory_allocated(device) - held + sum(images.nbytes for images, _ in before)
    assert peak + 2 * 64 * 3 * 224**2 <= _PREPARED_BYTES * 64 * 3 * 224**2  # two more as loaded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_was_found_fits() -> None:
    device = torch.device("cuda")
    model = create_model("sdpnet_l", 10).to(device)
    attempt = training_pass(model, soft_cross_entropy, image_size=224, num_classes=10, dtype=torch.float32)
    batch_size = 1 << 16
    size = choose_micro_batch("auto", batch_size, model, attempt, Processes(ShardOptions(0, 1), device))
    assert 1 <= size < batch_size
    attempt(size)


def test_the_error_says_what_fits() -> None:
    model = Cramped(12)
    error = out_of_memory(model, blank_pass(model), 32, batch_size=64)
    assert str(error) == (
        "out of GPU memory with 32 images at a time: 8 fit; set train.micro_batch=auto to keep batches of 64, or "
        "data.batch_size_per_gpu=8"
    )
    error = out_of_memory(model, blank_pass(model), 9, batch_size=9)
    assert "9 images at a time, though they fit by themselves" in str(error) and "micro_batch=5" in str(error)


def test_the_estimate_takes_every_image_for_the_same() -> None:
    """1,000 bytes and 100 for each image: 4,000 hold 30."""
    assert Fit(images=16, base=1000, peak=2600, limit=4000).estimate == 30
    assert Fit(images=16, base=1000, peak=2600, limit=2000).estimate == 16  # what has fitted, fits
    assert Fit(images=16, base=0, peak=0, limit=0).estimate == 16


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(8, 8), (8, 3), (7, 2), (5, 1), (96, 50), (4, 9)])
def test_parts_are_numpys(batch_size: int, micro_batch: int) -> None:
    whole = np.arange(batch_size)
    ours = [whole[part] for part in parts(batch_size, micro_batch)]
    assert np.array_equal(np.concatenate(ours), whole)
    sizes = sorted(len(p) for p in np.array_split(whole, -(-batch_size // micro_batch)))
    assert sorted(len(part) for part in ours) == sizes and sizes[-1] <= micro_batch


def test_weighted_parts_add_up_to_the_batch() -> None:
    """But for batch norm, which is in eval mode here; the batch's gradients in float64 are the oracle."""
    torch.manual_seed(0)
    model: SdPNet = create_model("sdpnet_tiny", 10).double().eval()
    images, targets = torch.randn(7, 3, 16, 16).double(), torch.rand(7, 10)
    torch.nn.functional.cross_entropy(model(images), targets.double()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for part in parts(7, 3):
        share = (part.stop - part.start) / 7
        (torch.nn.functional.cross_entropy(model(images[part]), targets[part].double()) * share).backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
