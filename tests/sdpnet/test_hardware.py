"""What is chosen for cards that are not here, against what NVIDIA and PyTorch say of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdpnet.config.load import load_config
from sdpnet.execution.hardware import Card, StepChoices, choose_step, look_at
from sdpnet.pipelines.errors import UserError

pytestmark = pytest.mark.gpu

P100 = Card("Tesla P100-SXM2-16GB", (6, 0), has_bf16=False, has_triton=True, has_compiler=True)
V100 = Card("Tesla V100-SXM2-16GB", (7, 0), has_bf16=False, has_triton=True, has_compiler=True)
T4 = Card("Tesla T4", (7, 5), has_bf16=False, has_triton=True, has_compiler=True)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), has_bf16=True, has_triton=True, has_compiler=True)
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), has_bf16=True, has_triton=True, has_compiler=True)
H200 = replace(H100, name="NVIDIA H200")
AMPERE_ON = StepChoices(torch.bfloat16, "flash", triton=True, compile=True, asynchronous=True)


@pytest.mark.parametrize(
    ("card", "choices"),
    [
        (V100, StepChoices(torch.float16, "memory-efficient", triton=False, compile=False, asynchronous=True)),
        (T4, StepChoices(torch.float16, "memory-efficient", triton=True, compile=False, asynchronous=True)),
        (A100, AMPERE_ON),
        (H100, AMPERE_ON),
        (H200, AMPERE_ON),
        (Card(), StepChoices(torch.float32, "CPU", triton=False, compile=False, asynchronous=False)),
    ],
    ids=lambda value: value.name if isinstance(value, Card) else "",
)
def test_the_choices(card: Card, choices: StepChoices) -> None:
    assert choose_step(card) == choices


def test_v100_in_one_line() -> None:
    line = "float16 with a gradient scaler, memory-efficient attention, no Triton kernels, not compiled"
    assert str(choose_step(V100)) == f"{line}, never waiting for the device"


def test_keys_are_obeyed() -> None:
    assert not choose_step(H200, compile=False).compile
    assert choose_step(Card(has_compiler=True), compile=True).compile and choose_step(T4, compile=True).compile
    assert choose_step(V100, compile=True) == replace(choose_step(V100), compile=True)
    assert choose_step(H200, amp="fp32").attention == "memory-efficient"  # FlashAttention takes half precision only
    assert choose_step(H200, amp="fp16").scaler and not choose_step(H200).scaler


def test_nothing_is_compiled_without_what_it_takes() -> None:
    for missing in ("has_triton", "has_compiler"):
        assert not choose_step(replace(H200, **{missing: False})).compile  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("card", "lacks"),
    [
        (P100, "a GPU of compute capability 7.0 or more"),
        (replace(H200, has_triton=False), "Triton"),
        (replace(H200, has_compiler=False), "a C compiler"),
        (Card(), "a C compiler"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_compiling_where_it_cannot_be_done(card: Card, lacks: str) -> None:
    with pytest.raises(UserError, match=f"train.compile = true: needs {lacks} on this machine"):
        choose_step(card, compile=True)


def test_compile_in_a_config() -> None:
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert load_config("debug", [f"train.compile={text}"]).train.compile == value
    assert load_config("debug").train.compile == "auto"


def test_a_cpu() -> None:
    card = look_at(torch.device("cpu"))
    assert replace(card, has_compiler=False) == Card() and not choose_step(card).compile


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_card_here() -> None:
    card = look_at(torch.device("cuda"))
    assert card.capability == torch.cuda.get_device_capability() and card.name
