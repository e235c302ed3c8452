"""AdamW, clipping and the average of the weights in Triton: one pass over all tensors of a model.

The kernels find their tensors in a table of addresses, because a model has hundreds of them and a launch for each would
take longer than the arithmetic. A program computes one chunk of one tensor. The chunks are listed in `chunks`, int32
(number of chunks, 2): the row of the table, and the number of the chunk within the tensor. All tensors are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["prepare_kernel", "square_sum_kernel", "update_kernel"]


@triton.jit
def at_address(table, row, start, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to BLOCK values of the tensor at `table[row]`, from value `start` on.

    With ALIGNED, addresses are multiples of 16 bytes and a thread loads 16 bytes at once.
    """
    pointers = tl.load(table + row).to(tl.pointer_type(tl.float32)) + start + tl.arange(0, BLOCK)
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers


@triton.jit
def square_sum_kernel(
    chunks, gradients, sizes, partial, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Sums the squares of one chunk of the gradients.

    Args:
        gradients: int64, the address of each tensor's gradient, or 0 for none.
        sizes: int64, the number of values of each tensor.
        partial: float32, the sum of each chunk.
        BLOCKS: the number of blocks of BLOCK values in a chunk.
    """
    chunk = tl.program_id(0)
    row = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * (BLOCK * BLOCKS)
    left = tl.load(sizes + row) - start
    sums = tl.zeros([BLOCK], tl.float32)
    if tl.load(gradients + row) != 0:
        if left >= BLOCK * BLOCKS:  # without masks, because a mask would split the loads into single values
            for block in tl.static_range(BLOCKS):
                value = tl.load(at_address(gradients, row, start + block * BLOCK, BLOCK, ALIGNED))
                sums += value * value
        else:
            for block in range(tl.cdiv(left, BLOCK)):
                inside = tl.arange(0, BLOCK) < left - block * BLOCK
                value = tl.load(at_address(gradients, row, start + block * BLOCK, BLOCK, False), mask=inside, other=0.0)
                sums += value * value
    tl.store(partial + chunk, tl.sum(sums))


@triton.jit(do_not_specialize=["count"])
def prepare_kernel(steps, numbers, rates, bad, count, BLOCK: tl.constexpr):
    """Counts the step and computes the rates of each tensor, in float64 as PyTorch's fused AdamW does.

    Args:
        steps: int64 (count,), the addresses of the step counts, which are float32 scalars. A bad step does not count.
        numbers: float64 (2 + 2 * count,): the binary logarithms of both betas, the learning rate of each tensor, and
            its learning rate times its weight decay.
        rates: float32 (3, count), the results: the learning rate by the first moment's bias correction, the square root
            of the second moment's bias correction, and the learning rate times the weight decay.
        bad: float32, 1 for a step that is skipped, else 0.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < count
    address = tl.load(steps + row, mask=live, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(address, mask=live, other=0.0) + (1.0 - tl.load(bad))
    tl.store(address, step, mask=live)
    step = step.to(tl.float64)
    first = 1.0 - tl.exp2(step * tl.load(numbers))
    second = 1.0 - tl.exp2(step * tl.load(numbers + 1))
    rate = tl.load(numbers + 2 + row, mask=live, other=0.0)
    tl.store(rates + row, (rate / first).to(tl.float32), mask=live)
    tl.store(rates + count + row, tl.sqrt(second).to(tl.float32), mask=live)
    decay = tl.load(numbers + 2 + count + row, mask=live, other=0.0)
    tl.store(rates + 2 * count + row, decay.to(tl.float32), mask=live)


@triton.jit
def load(table, row, start, inside, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at_address(table, row, start, BLOCK, ALIGNED), mask=inside, other=0.0)
    else:
        return tl.load(at_address(table, row, start, BLOCK, ALIGNED))


@triton.jit
def store(table, row, start, value, inside, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at_address(table, row, start, BLOCK, True), value, mask=inside)
    else:
        tl.store(at_address(table, row, start, BLOCK, True), value)


@triton.jit
def update_block(
    row,
    start,
    inside,
    parameters,
    gradients,
    firsts,
    seconds,
    averages,
    rate,
    root,
    decay,
    clip,
    weight,
    beta1,
    other1,
    beta2,
    other2,
    eps,
    BLOCK: tl.constexpr,
    ADAMW: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    value = load(parameters, row, start, inside, BLOCK, True, MASKED)
    if AVERAGE:  # loaded before the arithmetic, so that all loads are under way together
        average = load(averages, row, start, inside, BLOCK, True, MASKED)
    if ADAMW:
        gradient = load(gradients, row, start, inside, BLOCK, ALIGNED, MASKED) * clip
        first = load(firsts, row, start, inside, BLOCK, True, MASKED)
        second = load(seconds, row, start, inside, BLOCK, True, MASKED)
        value -= decay * value
        first = beta1 * first + other1 * gradient
        second = beta2 * second + other2 * gradient * gradient
        value -= tl.div_rn(rate * first, tl.div_rn(tl.sqrt_rn(second), tl.zeros([BLOCK], tl.float32) + root) + eps)
        store(parameters, row, start, value, inside, BLOCK, MASKED)
        store(firsts, row, start, first, inside, BLOCK, MASKED)
        store(seconds, row, start, second, inside, BLOCK, MASKED)
    if AVERAGE:
        store(averages, row, start, average + (value - average) * weight, inside, BLOCK, MASKED)


@triton.jit(do_not_specialize=["count"])
def update_kernel(
    chunks,
    sizes,
    parameters,
    gradients,
    firsts,
    seconds,
    averages,
    rates,
    clip_factor,
    average_weight,
    bad,
    count,
    beta1,
    other1,
    beta2,
    other2,
    eps,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ADAMW: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates one chunk: a step of AdamW (with ADAMW), then its average (with AVERAGE). A bad step changes nothing.

    Args:
        parameters, gradients, firsts, seconds, averages: int64, the addresses of each tensor's values, gradient, first
            and second moment and average.
        rates: see `prepare_kernel`.
        clip_factor: float32, multiplies the gradients.
        average_weight: float32, the weight of the new values in the average.
        other1, other2: 1 - beta1 and 1 - beta2. They are computed in float64, because 1 - 0.999 in float32 is wrong by
            5e-5.
        ALIGNED: whether the addresses of all gradients are multiples of 16. Those of the other tensors are.
    """
    chunk = tl.program_id(0)
    row = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * (BLOCK * BLOCKS)
    left = tl.load(sizes + row) - start
    rate, root, decay, clip, weight = 0.0, 0.0, 0.0, 0.0, 0.0
    if ADAMW:
        rate = tl.load(rates + row)
        root = tl.load(rates + count + row)
        decay = tl.load(rates + 2 * count + row)
        clip = tl.load(clip_factor)
    if AVERAGE:
        weight = tl.load(average_weight)
    if tl.load(bad) == 0.0:
        if left >= BLOCK * BLOCKS:
            for block in tl.static_range(BLOCKS):
                update_block(
                    row,
                    start + block * BLOCK,
                    left,
                    parameters,
                    gradients,
                    firsts,
                    seconds,
                    averages,
                    rate,
                    root,
                    decay,
                    clip,
                    weight,
                    beta1,
                    other1,
                    beta2,
                    other2,
                    eps,
                    BLOCK,
                    ADAMW,
                    AVERAGE,
                    ALIGNED,
                    False,
                )
        else:
            for block in range(tl.cdiv(left, BLOCK)):
                update_block(
                    row,
                    start + block * BLOCK,
                    tl.arange(0, BLOCK) < left - block * BLOCK,
                    parameters,
                    gradients,
                    firsts,
                    seconds,
                    averages,
                    rate,
                    root,
                    decay,
                    clip,
                    weight,
                    beta1,
                    other1,
                    beta2,
                    other2,
                    eps,
                    BLOCK,
                    ADAMW,
                    AVERAGE,
                    ALIGNED,
                    True,
                )
