"""The Triton kernel of quantised block-sparse attention: integer logits, 8- or 16-bit weights and values.

The shape of ``block_sparse.triton_kernel``, on operands that were put into plan order when they were quantised. Scales
are one per token whatever the groups were, so one kernel serves every granularity.
"""

import triton
import triton.language as tl

from ..block_sparse.triton_kernel import (
    add_first_order,
    apply_row_factors,
    listed,
    load_columns,
    load_rows,
    pairs_visible,
    store_rows,
    visit_representatives,
)


@triton.jit
def forward(
    q, k, v, out, lse, q_scale, k_scale, v_scale, v_mean, delta, alive, raw,
    q_strides, k_strides, v_strides, out_strides,
    rows, full, partial, box, disc, band, always, gate, reps, first_order, row_factors,
    n_q, n_k, heads, groups, scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, FULL: tl.constexpr, PARTIAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTHS: tl.constexpr, SMOOTH: tl.constexpr,
    PV: tl.constexpr, UNIT: tl.constexpr, LIMIT: tl.constexpr, NARROW: tl.constexpr,
    REPS: tl.constexpr, REP_BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr, TESTED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks x batch x heads,).

    q, k: int8 codes, rows contiguous; v: codes or the input, with strides (batch, head, token, channel). q_scale:
    float32 (batch, heads, n_q), k_scale: (batch, key heads, n_k), v_scale, v_mean: (batch, key heads, DV) or None, all
    contiguous. delta: what smoothed queries add to the logits, (float32 (batch, heads, blocks, n_k), strides (batch,
    head)), SMOOTH queries per block, or None. alive: (uint8, strides (batch, head)) over key slots, or None. Logits are
    in base 2. lse: float32 (batch, heads, n_q) or None. raw: the queries as given, with strides (batch, head, token),
    for representatives, or None. rows, tables, representatives and what follows as in
    ``block_sparse.triton_kernel.forward``.

    PV: what weights are rounded to, "fp8", "int8", "fp16" or "" for v's own type; UNIT: what 8-bit weights are scaled
    by, "static", "tile" or "row" of the block of keys; LIMIT: the code of that unit. NARROW: FP16 sums within a block.
    """
    splits: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    # Triton 3.6 takes an entry of a compile-time tuple for a shape only by a name.
    wide: tl.constexpr = WIDTHS[2]
    tail: tl.constexpr = WIDTHS[3]
    tiles = tl.cdiv(n_q, TILE_Q)
    row = tl.program_id(0) // splits
    if rows is not None:
        row = tl.load(rows + row)
    b = (row // tiles // heads).to(tl.int64)
    h = (row // tiles % heads).to(tl.int64)
    tile = row % tiles
    start = tile * TILE_Q + tl.program_id(0) % splits * BLOCK_Q
    if start >= n_q:
        return

    slot = start + tl.arange(0, BLOCK_Q)
    live = slot < tl.minimum(tile * TILE_Q + TILE_Q, n_q)
    token = slot.to(tl.int64)
    kv = h // groups
    kv_heads = heads // groups
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + kv * k_strides[1]
    v += b * v_strides[0] + kv * v_strides[1]
    k_scale += (b * kv_heads + kv) * n_k
    query = load_rows(q, token, q_strides[2], live, WIDTHS[0], 0, D, True, False)
    query_tail = query
    if WIDTHS[1]:
        query_tail = load_rows(q, token, q_strides[2], live, WIDTHS[1], WIDTHS[0], D, True, False)
    row_scale = tl.load(q_scale + (b * heads + h) * n_q + slot, mask=live, other=0.0)
    if delta is not None:
        delta = delta[0] + b * delta[1][0] + h * delta[1][1]
    if alive is not None:
        alive = alive[0] + b * alive[1][0] + h * alive[1][1]

    acc = tl.zeros((BLOCK_Q, wide), tl.float32)
    acc_tail = acc
    if WIDTHS[3]:
        acc_tail = tl.zeros((BLOCK_Q, tail), tl.float32)
    # Finite, so that a row without a visible key so far has weights exp2(-inf - top) = 0 instead of NaN.
    top = tl.full((BLOCK_Q,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)

    index, count = listed(full, b, h, tile, True)
    steps: tl.constexpr = (TILE_K + FULL - 1) // FULL
    for i in range(count * steps):
        first = tl.load(index + i // steps) * TILE_K
        acc, acc_tail, top, total = _visit(
            acc, acc_tail, top, total, query, query_tail, row_scale, k, v, k_scale, delta, alive, k_strides[2],
            v_strides[2], v_strides[3], None, None, None, None, None, b, h, slot, live,
            first + i % steps * FULL, first + TILE_K, n_k,
            FULL, D, DV, WIDTHS, SMOOTH, PV, UNIT, LIMIT, NARROW, BOUNDED, False, False, EMULATED,
        )  # fmt: skip
    if partial is not None:
        index, count = listed(partial, b, h, tile, True)
        steps_partial: tl.constexpr = (TILE_K + PARTIAL - 1) // PARTIAL
        for i in range(count * steps_partial):
            first = tl.load(index + i // steps_partial) * TILE_K
            acc, acc_tail, top, total = _visit(
                acc, acc_tail, top, total, query, query_tail, row_scale, k, v, k_scale, delta, alive, k_strides[2],
                v_strides[2], v_strides[3], box, disc, band, always, gate, b, h, slot, live,
                first + i % steps_partial * PARTIAL, first + TILE_K, n_k,
                PARTIAL, D, DV, WIDTHS, SMOOTH, PV, UNIT, LIMIT, NARROW, BOUNDED, True, TESTED, EMULATED,
            )  # fmt: skip

    channels = (b * kv_heads + kv) * DV
    if v_scale is not None:
        acc = acc * (load_columns(v_scale + channels, WIDTHS[2], 0, DV) / LIMIT)[None, :]
        if WIDTHS[3]:
            acc_tail = acc_tail * (load_columns(v_scale + channels, WIDTHS[3], WIDTHS[2], DV) / LIMIT)[None, :]
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    if reps is not None:
        base = raw[0] + b * raw[1][0] + h * raw[1][1]
        query = load_rows(base, token, raw[1][2], live, WIDTHS[0], 0, D, True, EMULATED)
        query_tail = query
        if WIDTHS[1]:
            query_tail = load_rows(base, token, raw[1][2], live, WIDTHS[1], WIDTHS[0], D, True, EMULATED)
        for g in tl.static_range(len(reps)):
            part = reps[g]
            index, count = listed(part, b, h, tile, True)
            count = count * REPS[g]
            head = h // part[7]
            for i in range(tl.cdiv(count, REP_BLOCK)):
                acc, acc_tail, top, total, mass = visit_representatives(
                    acc, acc_tail, top, total, mass, query, query_tail, index,
                    part[4] + b * part[8][0] + head * part[8][1], part[5] + b * part[9][0] + head * part[9][1],
                    part[6] + b * part[10][0] + h * part[10][1], i * REP_BLOCK, count, scale,
                    REPS[g], REP_BLOCK, D, DV, WIDTHS, first_order is not None, EMULATED,
                )  # fmt: skip
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    if WIDTHS[3]:
        acc_tail = acc_tail / total[:, None]
    if v_mean is not None:
        back = tl.where(empty, 0.0, 1.0)[:, None]
        acc += back * load_columns(v_mean + channels, WIDTHS[2], 0, DV)[None, :]
        if WIDTHS[3]:
            acc_tail += back * load_columns(v_mean + channels, WIDTHS[3], WIDTHS[2], DV)[None, :]
    if first_order is not None:
        share = (mass / total * (scale * 0.6931471805599453))[:, None]
        base = raw[0] + b * raw[1][0] + h * raw[1][1]
        acc, acc_tail = add_first_order(
            acc, acc_tail, base, token, raw[1][2], live, share, first_order, b, h, D, DV, WIDTHS, EMULATED
        )
    if row_factors is not None:
        acc, acc_tail = apply_row_factors(acc, acc_tail, row_factors, row.to(tl.int64), DV, WIDTHS)
    out += b * out_strides[0] + h * out_strides[1]
    store_rows(out, token, out_strides[2], live, acc, WIDTHS[2], 0, DV)
    if WIDTHS[3]:
        store_rows(out, token, out_strides[2], live, acc_tail, WIDTHS[3], WIDTHS[2], DV)
    if lse is not None:
        log = tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + (b * heads + h) * n_q + slot, log, mask=live)


@triton.jit
def _visit(
    acc, acc_tail, top, total, query, query_tail, row_scale, k, v, k_scale, delta, alive, k_stride,
    v_stride, v_channel, box, disc, band, always, gate, b, h, q_slot, q_live, start, stop, n_k,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTHS: tl.constexpr, SMOOTH: tl.constexpr,
    PV: tl.constexpr, UNIT: tl.constexpr, LIMIT: tl.constexpr, NARROW: tl.constexpr,
    BOUNDED: tl.constexpr, PARTIAL: tl.constexpr, TESTED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """One block of keys, of slots start .. min(start + BLOCK, stop, n_k)."""
    lane = tl.arange(0, BLOCK)
    slot = start + lane
    live = slot < tl.minimum(stop, n_k)
    if alive is not None:
        live = live & (tl.load(alive + slot, mask=live, other=0) != 0)
    row = lane.to(tl.int64)
    k += start.to(tl.int64) * k_stride
    v += start.to(tl.int64) * v_stride

    keys = load_rows(k, row, k_stride, live, WIDTHS[0], 0, D, BOUNDED, False)
    product = tl.dot(query, tl.trans(keys), out_dtype=tl.int32)
    if WIDTHS[1]:
        keys_tail = load_rows(k, row, k_stride, live, WIDTHS[1], WIDTHS[0], D, BOUNDED, False)
        product = tl.dot(query_tail, tl.trans(keys_tail), product, out_dtype=tl.int32)
    score = product.to(tl.float32) * row_scale[:, None] * tl.load(k_scale + slot, mask=live, other=0.0)[None, :]
    if delta is not None:
        seen = q_live[:, None] & live[None, :]
        score += tl.load(delta + (q_slot // SMOOTH).to(tl.int64)[:, None] * n_k + slot[None, :], mask=seen, other=0.0)
    if PARTIAL:
        seen = pairs_visible(box, disc, band, always, gate, b, h, q_slot, slot, q_live, slot < n_k, TESTED)
        if BOUNDED:
            seen = seen & live[None, :]
        score = tl.where(seen, score, float("-inf"))
    elif BOUNDED:
        score = tl.where(live[None, :], score, float("-inf"))

    peak = tl.max(score, 1)
    top_new = tl.maximum(top, peak)
    weight = tl.exp2(score - top_new[:, None])
    fade = tl.exp2(top - top_new)
    total = total * fade + tl.sum(weight, 1)
    unit = tl.full(top.shape, 1.0, tl.float32)
    if UNIT == "row":
        unit = tl.max(weight, 1)
    elif UNIT == "tile":
        unit = tl.max(tl.max(weight, 1), 0) + tl.zeros_like(top)
    unit = tl.where(unit == 0, 1.0, unit)
    if PV == "fp8" or PV == "int8":
        weight = weight * (LIMIT / unit)[:, None]
    acc = _weigh(
        acc * fade[:, None], weight, unit, v, row, v_stride, v_channel, live, WIDTHS[2], 0, DV,
        BLOCK, PV, UNIT, NARROW, BOUNDED, EMULATED,
    )  # fmt: skip
    if WIDTHS[3]:
        acc_tail = _weigh(
            acc_tail * fade[:, None], weight, unit, v, row, v_stride, v_channel, live, WIDTHS[3], WIDTHS[2], DV,
            BLOCK, PV, UNIT, NARROW, BOUNDED, EMULATED,
        )  # fmt: skip
    else:
        acc_tail = acc
    return acc, acc_tail, top_new, total


@triton.jit
def _weigh(
    acc, weight, unit, v, row, stride, channel, live, WIDTH: tl.constexpr, FROM: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, PV: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, BOUNDED: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """acc plus the weighted values in columns FROM .. FROM + WIDTH, summed on their own first."""
    column = FROM + tl.arange(0, WIDTH)
    pointer = v + row[:, None] * stride + column[None, :] * channel
    if BOUNDED or FROM + WIDTH > DV:
        values = tl.load(pointer, mask=live[:, None] & (column < DV)[None, :], other=0.0)
    else:
        values = tl.load(pointer)
    if PV == "fp8" and not NARROW and not EMULATED:
        # Bounded, or the compiler adds into the accumulator of the matrix unit, which keeps 13 bits.
        part = tl.dot(weight.to(values.dtype), values, max_num_imprecise_acc=BLOCK)
    elif PV == "int8":
        part = tl.dot((weight + 0.5).to(tl.int8), values, out_dtype=tl.int32).to(tl.float32)
    elif EMULATED:
        # The interpreter computes on the bits of 16-bit floats and loses carries when it casts to 8 bits.
        if PV == "fp8":
            weight = _on_grid(weight)
        elif PV == "fp16":
            weight = weight.to(tl.float16).to(tl.float32)
        part = tl.dot(weight, values.to(tl.float32), input_precision="ieee")
        if NARROW:
            part = part.to(tl.float16).to(tl.float32)
    elif NARROW:
        part = tl.dot(weight.to(values.dtype), values, out_dtype=tl.float16).to(tl.float32)
    else:
        part = tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    if UNIT != "static":
        part = part * unit[:, None]
    return acc + part


@triton.jit
def _on_grid(x):
    """Non-negative x rounded to nearest even on the grid of e4m3, in float32."""
    x = tl.minimum(x, 448.0)
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    step = tl.exp2(tl.maximum(exponent, -6).to(tl.float32) - 3.0)
    return ((x / step + 8388608.0) - 8388608.0) * step
