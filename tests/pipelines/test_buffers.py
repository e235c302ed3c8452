"""Memory that is lent: valid as long as any tensor on it is held, then used again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sdpnet.pipelines.memory.buffers import Buffers


def test_a_buffer_returns_when_the_last_tensor_on_it_is_gone() -> None:
    buffers = Buffers(96, keep=2)
    tensor = buffers.lend((2, 3, 4), torch.float32)
    assert tensor.shape == (2, 3, 4) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    address, part, array, turned = tensor.data_ptr(), tensor[1:], tensor.numpy(), tensor.permute(2, 0, 1)
    turned.fill_(3)
    del tensor, turned
    assert (buffers.num_made, buffers.num_free) == (1, 0)
    del array
    assert buffers.num_free == 0 and part.eq(3).all()
    del part
    assert buffers.num_free == 1
    again = buffers.lend((96,), torch.uint8)
    assert again.data_ptr() == address and (buffers.num_made, buffers.num_free) == (1, 0)


def test_what_is_held_is_never_lent_again() -> None:
    buffers = Buffers(64, keep=3)
    held = [buffers.lend((8,), torch.int64).fill_(number) for number in range(10)]
    assert buffers.num_made == 10 and len({tensor.data_ptr() for tensor in held}) == 10
    assert [int(tensor[0]) for tensor in held] == list(range(10))
    del held
    assert buffers.num_free == 3, "the others are freed"
    for _ in range(100):
        buffers.lend((8,), torch.int64)
    assert buffers.num_made == 10


def test_a_buffer_serves_smaller_tensors_of_any_dtype() -> None:
    buffers = Buffers(100, keep=1)
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64):
        assert buffers.lend((3, 2), dtype).dtype == dtype
    assert buffers.lend((0, 7), torch.float32).shape == (0, 7)
    assert buffers.num_made == 1
    with pytest.raises(AssertionError):
        buffers.lend((26,), torch.float32)


def test_buffers_may_return_from_any_thread_and_outlive_their_pool() -> None:
    buffers = Buffers(1 << 12, keep=4)

    def work(pool: Buffers = buffers) -> None:
        for number in range(200):
            tensor = pool.lend((1 << 9,), torch.int64).fill_(number)
            assert (tensor == number).all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buffers.num_made <= 8
    kept = buffers.lend((4,), torch.int64).fill_(7)
    del buffers, threads, work
    assert np.array_equal(kept.numpy(), [7] * 4)
    del kept  # its memory is freed, as nobody else has it
