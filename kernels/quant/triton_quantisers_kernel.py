"""Triton kernels of the quantisers: statistics over tokens, integer codes of queries and keys, codes of values.

A row of queries or keys is read as two halves of its channels, as packed 4-bit codes pair them.
Largest magnitudes are taken over bit patterns, where NaN is above infinity: a fault is never lost in a maximum.
Quotients are rounded as IEEE asks (``div_rn``), so that codes and scales are those of the torch quantisers.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(x, strides, slot, live, column, D: tl.constexpr):
    """float32 rows ``slot`` of x (token, channel), 0 where dead or past the last channel."""
    mask = live[:, None] & (column < D)[None, :]
    return tl.load(x + slot.to(tl.int64)[:, None] * strides[2] + column[None, :] * strides[3], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _alive(live, alive, b, h, slot):
    """``live`` and not dead by the table ``alive``: (uint8, strides (batch, head)) or None."""
    if alive is not None:
        live = live & (tl.load(alive[0] + b * alive[1][0] + h * alive[1][1] + slot, mask=live, other=0) != 0)
    return live


@triton.jit
def _magnitude(x):
    """The bits of |x|: ordered as the magnitudes are, NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def statistics(
    x, alive, sums, low, high, peak, strides, n, heads,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks, batch x heads, columns / WIDTH). What each chunk of CHUNK live tokens comes to, per channel.

    x: strides (batch, head, token, channel). Outputs float32 (batch, heads, chunks, D), each may be None: ``sums``,
    ``low`` and ``high`` (the least and the largest value, infinite without a live token), ``peak`` (largest magnitude).
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    h = row % heads
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    x += b * strides[0] + h * strides[1]
    total = tl.zeros((WIDTH,), tl.float32)
    least = tl.full((WIDTH,), float("inf"), tl.float32)
    most = tl.full((WIDTH,), float("-inf"), tl.float32)
    largest = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        slot = chunk * CHUNK + start + tl.arange(0, BLOCK)
        live = _alive(slot < n, alive, b, h, slot)
        part = _rows(x, strides, slot, live, column, D)
        if sums is not None:
            total += tl.sum(part, 0)
        if low is not None:
            least = tl.minimum(least, tl.min(tl.where(live[:, None], part, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(live[:, None], part, float("-inf")), 0))
        if peak is not None:
            largest = tl.maximum(largest, tl.max(_magnitude(part), 0))
    at = (row * tl.num_programs(0) + chunk) * D + column
    mask = column < D
    if sums is not None:
        tl.store(sums + at, total, mask=mask)
    if low is not None:
        tl.store(low + at, least, mask=mask)
        tl.store(high + at, most, mask=mask)
    if peak is not None:
        tl.store(peak + at, largest.to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def _codes(x, scale):
    """x / scale rounded half away from zero, int8; 0 where the scale is no number."""
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return (ratio + tl.where(ratio >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit
def tokens(
    x, alive, mean, block_mean, smooth, codes, scales, token_scales, limits, strides, n, heads, total,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, PAIR: tl.constexpr,
    QMAX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, batch x heads). Codes and scales of one block of BLOCK tokens, which is read once.

    x: queries or keys, strides (batch, head, token, channel). ``mean``: float32 (batch, heads, D), taken out first, or
    None. ``block_mean``: output float32 (batch, heads, blocks, D) or None: the mean of the block's live tokens, taken
    out. ``smooth``: output float32 (batch, heads, n, D) or None, what was quantised. ``codes``: int8 (batch, heads, n,
    D), or D / 2 bytes a token where PACKED. ``scales``: float32 (batch, heads, total), one per group; ``token_scales``:
    (batch, heads, n). ``limits``: float32 (heads,), the largest code of each head in the place of QMAX, or None.

    GROUPS of a block, at most SLOTS; token r belongs to LANES (r / SPAN) + r % 8 / PAIR with LANES, else r / SPAN.
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    h = row % heads
    local = tl.arange(0, ROWS)
    slot = block * BLOCK + local
    inside = (local < BLOCK) & (slot < n)
    live = _alive(inside, alive, b, h, slot)
    first = tl.arange(0, WIDTH)
    second = HALF + first
    x += b * strides[0] + h * strides[1]
    low = _rows(x, strides, slot, live, first, HALF)
    high = _rows(x, strides, slot, live, second, D)
    if mean is not None:
        mean += row * D
        low -= tl.load(mean + first, mask=first < HALF, other=0.0)[None, :]
        high -= tl.load(mean + second, mask=second < D, other=0.0)[None, :]
    if block_mean is not None:
        block_mean += (row * tl.num_programs(0) + block) * D
        count = tl.maximum(tl.sum(live.to(tl.float32), 0), 1.0) + tl.zeros((WIDTH,), tl.float32)
        centre = tl.div_rn(tl.sum(low, 0), count)
        tl.store(block_mean + first, centre, mask=first < HALF)
        low -= centre[None, :]
        centre = tl.div_rn(tl.sum(high, 0), count)
        tl.store(block_mean + second, centre, mask=second < D)
        high -= centre[None, :]
    low = tl.where(live[:, None], low, 0.0)
    high = tl.where(live[:, None], high, 0.0)
    at = row * n + slot
    low_mask = inside[:, None] & (first < HALF)[None, :]
    high_mask = inside[:, None] & (second < D)[None, :]
    if smooth is not None:
        tl.store(smooth + at[:, None] * D + first[None, :], low, mask=low_mask)
        tl.store(smooth + at[:, None] * D + second[None, :], high, mask=high_mask)

    limit = tl.full((ROWS,), QMAX, tl.float32)
    if limits is not None:
        limit = tl.load(limits + h) + tl.zeros((ROWS,), tl.float32)
    largest = tl.maximum(tl.max(_magnitude(low), 1), tl.max(_magnitude(high), 1))
    if GROUPS == BLOCK:
        scale = tl.div_rn(largest.to(tl.float32, bitcast=True), limit) + 1e-7
        tl.store(scales + row * total + slot, scale, mask=(local < BLOCK) & (slot < total))
    else:
        group = local // SPAN
        if LANES:
            group = group * LANES + local % 8 // PAIR
        number = tl.arange(0, SLOTS)
        own = group[:, None] == number[None, :]
        largest = tl.max(tl.where(own, largest[:, None], 0), 0).to(tl.float32, bitcast=True)
        each = tl.div_rn(largest, tl.max(limit, 0) + tl.zeros((SLOTS,), tl.float32)) + 1e-7
        tl.store(scales + row * total + block * GROUPS + number, each, mask=number < GROUPS)
        scale = tl.sum(tl.where(own, each[None, :], 0.0), 1)
    scale = tl.where(inside, scale, 1.0)
    tl.store(token_scales + at, scale, mask=inside)

    if PACKED:
        both = (_codes(low, scale) & 15) | (_codes(high, scale) << 4)
        tl.store(codes + at[:, None] * HALF + first[None, :], both, mask=low_mask)
    else:
        tl.store(codes + at[:, None] * D + first[None, :], _codes(low, scale), mask=low_mask)
        tl.store(codes + at[:, None] * D + second[None, :], _codes(high, scale), mask=high_mask)


@triton.jit
def values(
    v, alive, mean, scales, codes, strides, code_strides, n, heads,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, batch x heads, columns / WIDTH). Codes of values at float32 ``scales`` per channel.

    v, codes: strides (batch, head, token, channel). ``mean``: float32 (batch, heads, D), taken out first, or None;
    ``scales``: (batch, heads, D). KIND: "fp8", "int8" or "fp16", the codes' type.
    """
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    h = row % heads
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    live = _alive(slot < n, alive, b, h, slot)
    part = _rows(v + b * strides[0] + h * strides[1], strides, slot, live, column, D)
    mask = column < D
    if mean is not None:
        part -= tl.load(mean + row * D + column, mask=mask, other=0.0)[None, :]
        part = tl.where(live[:, None], part, 0.0)
    scale = tl.load(scales + row * D + column, mask=mask, other=1.0)
    if KIND == "fp8":
        # The smallest float32 where a channel is all zero; its codes are zero.
        scale = tl.where(scale == 0, 1.1754943508222875e-38, scale)
    ratio = tl.div_rn(part, tl.broadcast_to(scale[None, :], part.shape))
    if KIND == "int8":
        ratio = tl.where(ratio == ratio, ratio, 0.0)
        ratio += tl.where(ratio >= 0, 0.5, -0.5)
        # Truncated towards zero by the cast.
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    elif KIND == "fp8":
        ratio = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, -448.0), 448.0), ratio)
        if EMULATED:
            # The interpreter loses carries when it casts to 8 bits: round to the grid first.
            exponent = (_magnitude(ratio) >> 23) - 127
            step = tl.exp2(tl.maximum(exponent, -6).to(tl.float32) - 3.0)
            rounded = ((tl.abs(ratio) / step + 8388608.0) - 8388608.0) * step
            ratio = tl.where(ratio < 0, -rounded, rounded)
    codes += b * code_strides[0] + h * code_strides[1]
    at = codes + slot.to(tl.int64)[:, None] * code_strides[2] + column.to(tl.int64)[None, :] * code_strides[3]
    tl.store(at, ratio.to(codes.dtype.element_ty), mask=(slot < n)[:, None] & mask[None, :])
