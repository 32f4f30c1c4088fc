"""The Triton kernel of block-sparse attention: one program per block of queries, flash-style online softmax.

Arguments that are None are features left out: each combination compiles to its own kernel, since one kernel with
everything on spills registers. Tuples keep a feature's tables together. Capital names are compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    q, k, v, out, lse, k_full, v_full, k_partial, v_partial,
    q_strides, k_strides, v_strides, out_strides,
    rows, full, partial, order, kv_order,
    box, disc, band, always, gate,
    reps, first_order, row_factors,
    kv_valid, n_q, n_k, queries, heads, groups, items, scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, FULL: tl.constexpr, PARTIAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTHS: tl.constexpr, UNIT: tl.constexpr,
    REPS: tl.constexpr, REP_BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr, TESTED: tl.constexpr, IN_ORDER: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs up to ``items`` (query blocks x batch x heads); each takes every grid-th of them.

    q, k, v, out: pointers with strides (batch, head, token) in units of UNIT elements, which tells the compiler how
    wide it may load where a head dim is no multiple of 16; the last dimension is contiguous. lse: float32
    (batch, head, queries) contiguous, or None. k_full, v_full, k_partial, v_partial: the same keys and values as
    tensor descriptors of (1, 1, FULL or PARTIAL, D or DV) blocks, read instead of k and v, or None; rows past their
    end read as 0. rows: int32 (batch x head x query tile,), the order in which tiles are worked on, or None. full,
    partial: (count, index, count strides, index strides), strides
    (batch, head, query tile). order, kv_order: (slot -> token or -1 for a hole, head stride). box: (lo, hi, coord);
    disc: (centre, coord, r2); band: (q_pos, k_pos, q_row, k_col, reach, reach's row stride); gate: (table, q_row,
    k_col, strides (batch, head, row)). reps: per group (count, index, count strides, index strides, keys, values,
    bias, query heads per key head, strides (batch, head) of keys, values and bias), rows contiguous. first_order:
    (matrix, what its rounding to 16 bits lost or None where it is float32, strides (batch, head), query heads per
    head). row_factors: (scale, add), float32 contiguous.
    scale contains log2(e).

    A plan's tile may hold several blocks. REPS: representatives per listed block, of each group. WIDTHS: D as a power
    of two plus a tail (0 for none), then DV likewise.
    BOUNDED: a key block may reach past its tile or its live keys. TESTED: cells of 1 in the gate go by the predicate.
    IN_ORDER: k and v lie in plan order already, 0 for slots without a live key; kv_order then says which these are.
    """
    splits: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    # Triton 3.6 takes an entry of a compile-time tuple for a shape only by a name.
    wide: tl.constexpr = WIDTHS[2]
    tail: tl.constexpr = WIDTHS[3]
    tiles = tl.cdiv(n_q, TILE_Q)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = item // splits
        if rows is not None:
            row = tl.load(rows + row)
        tile = row % tiles
        start = tile * TILE_Q + item % splits * BLOCK_Q
        slot = start + tl.arange(0, BLOCK_Q)
        live = slot < tl.minimum(tile * TILE_Q + TILE_Q, n_q)
        # Offsets pass 2^31 elements on long videos with many heads.
        b = (row // tiles // heads).to(tl.int64)
        h = (row // tiles % heads).to(tl.int64)
        kv = h // groups
        token = slot.to(tl.int64)
        if order is not None:
            token = tl.load(order[0] + h * order[1] + slot, mask=live, other=-1)
            live = live & (token >= 0)
            token = tl.maximum(token, 0)
        queries_at = q + (b * q_strides[0] + h * q_strides[1]) * UNIT
        keys_at = k + (b * k_strides[0] + kv * k_strides[1]) * UNIT
        values_at = v + (b * v_strides[0] + kv * v_strides[1]) * UNIT
        query = load_rows(queries_at, token, q_strides[2] * UNIT, live, WIDTHS[0], 0, D, True, EMULATED)
        query_tail = query
        if WIDTHS[1]:
            query_tail = load_rows(
                queries_at, token, q_strides[2] * UNIT, live, WIDTHS[1], WIDTHS[0], D, True, EMULATED
            )

        acc = tl.zeros((BLOCK_Q, wide), tl.float32)
        acc_tail = acc
        if WIDTHS[3]:
            acc_tail = tl.zeros((BLOCK_Q, tail), tl.float32)
        # Finite, so that a row without a visible key so far has weights exp2(-inf - top) = 0 instead of NaN.
        top = tl.full((BLOCK_Q,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        valid = n_k
        if kv_valid is not None:
            valid = tl.minimum(tl.load(kv_valid + b).to(tl.int32), n_k)
        slots = kv_order
        if kv_order is not None:
            slots = kv_order[0] + h * kv_order[1]
        k_stride = k_strides[2] * UNIT
        v_stride = v_strides[2] * UNIT

        index, count = listed(full, b, h, tile, start < n_q)
        steps: tl.constexpr = (TILE_K + FULL - 1) // FULL
        following = tl.load(index)
        for i in range(count * steps):
            # The next entry is read a step ahead: the copy of its keys would wait for it.
            first = following * TILE_K
            following = tl.load(index + (i + 1) // steps, mask=i + 1 < count * steps, other=0)
            acc, acc_tail, top, total = _visit(
                acc, acc_tail, top, total, query, query_tail, keys_at, values_at, k_full, v_full, k_stride, v_stride,
                slots, None, None, None, None, None, b, h, kv, slot, live, first + i % steps * FULL, first + TILE_K,
                valid, n_k, scale, FULL, D, DV, WIDTHS, BOUNDED, False, False, IN_ORDER, EMULATED,
            )  # fmt: skip
        if partial is not None:
            index, count = listed(partial, b, h, tile, start < n_q)
            steps_partial: tl.constexpr = (TILE_K + PARTIAL - 1) // PARTIAL
            following = tl.load(index)
            for i in range(count * steps_partial):
                first = following * TILE_K
                following = tl.load(index + (i + 1) // steps_partial, mask=i + 1 < count * steps_partial, other=0)
                acc, acc_tail, top, total = _visit(
                    acc, acc_tail, top, total, query, query_tail, keys_at, values_at, k_partial, v_partial,
                    k_stride, v_stride, slots, box, disc, band, always, gate, b, h, kv, slot, live,
                    first + i % steps_partial * PARTIAL, first + TILE_K, valid, n_k, scale,
                    PARTIAL, D, DV, WIDTHS, BOUNDED, True, TESTED, IN_ORDER, EMULATED,
                )  # fmt: skip

        mass = tl.zeros((BLOCK_Q,), tl.float32)
        if reps is not None:
            for g in tl.static_range(len(reps)):
                part = reps[g]
                index, count = listed(part, b, h, tile, start < n_q)
                count = count * REPS[g]
                head = h // part[7]
                for i in range(tl.cdiv(count, REP_BLOCK)):
                    acc, acc_tail, top, total, mass = visit_representatives(
                        acc, acc_tail, top, total, mass, query, query_tail, index,
                        part[4] + b * part[8][0] + head * part[8][1], part[5] + b * part[9][0] + head * part[9][1],
                        part[6] + b * part[10][0] + h * part[10][1], i * REP_BLOCK, count, scale,
                        REPS[g], REP_BLOCK, D, DV, WIDTHS, first_order is not None, EMULATED,
                    )  # fmt: skip
        if first_order is not None:
            # acc, total and mass share one running maximum, so the term joins before the division.
            share = (mass * (scale * 0.6931471805599453))[:, None]
            acc, acc_tail = add_first_order(
                acc, acc_tail, queries_at, token, q_strides[2] * UNIT, live, share, first_order, b, h, D, DV, WIDTHS,
                EMULATED,
            )  # fmt: skip

        empty = total == 0
        total = tl.where(empty, 1.0, total)
        acc = acc / total[:, None]
        if WIDTHS[3]:
            acc_tail = acc_tail / total[:, None]
        if row_factors is not None:
            acc, acc_tail = apply_row_factors(acc, acc_tail, row_factors, row.to(tl.int64), DV, WIDTHS)
        out_at = out + (b * out_strides[0] + h * out_strides[1]) * UNIT
        store_rows(out_at, token, out_strides[2] * UNIT, live, acc, WIDTHS[2], 0, DV)
        if WIDTHS[3]:
            store_rows(out_at, token, out_strides[2] * UNIT, live, acc_tail, WIDTHS[3], WIDTHS[2], DV)
        if lse is not None:
            log = tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
            tl.store(lse + (b * heads + h) * queries + token, log, mask=live)


@triton.jit
def listed(part, b, h, tile, some):
    """Where the entries of a query tile begin, and how many there are; none unless ``some``."""
    count = tl.load(part[0] + b * part[2][0] + h * part[2][1] + tile * part[2][2])
    index = part[1] + b * part[3][0] + h * part[3][1] + tile.to(tl.int64) * part[3][2]
    return index, tl.where(some, count, 0)


@triton.jit
def _visit(
    acc, acc_tail, top, total, query, query_tail, k, v, k_tile, v_tile, k_stride, v_stride, kv_order,
    box, disc, band, always, gate, b, h, kv, q_slot, q_live, start, stop, valid, n_k, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTHS: tl.constexpr,
    BOUNDED: tl.constexpr, PARTIAL: tl.constexpr, TESTED: tl.constexpr, IN_ORDER: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """One block of keys: the keys of slots start .. min(start + BLOCK, stop), of which tokens below ``valid`` live."""
    lane = tl.arange(0, BLOCK)
    slot = start + lane
    stop = tl.minimum(stop, n_k)
    live = slot < stop
    cut = start + BLOCK > stop
    # The block's origin is a scalar, so the per-lane offsets stay loop-invariant.
    token = lane.to(tl.int64)
    if kv_order is not None:
        place = tl.load(kv_order + slot, mask=live, other=-1)
        live = live & (place >= 0) & (place < valid)
        cut = cut | (valid < n_k)
        if not IN_ORDER:
            token = tl.maximum(place, 0)
    else:
        live = slot < tl.minimum(stop, valid)
        cut = cut | (start + BLOCK > valid)
    if kv_order is None or IN_ORDER:
        k += start.to(tl.int64) * k_stride
        v += start.to(tl.int64) * v_stride

    keys = _load(k, k_tile, b, kv, start, token, k_stride, live, BLOCK, WIDTHS[0], D, BOUNDED, EMULATED)
    score = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if WIDTHS[1]:
        keys_tail = load_rows(k, token, k_stride, live, WIDTHS[1], WIDTHS[0], D, BOUNDED, EMULATED)
        score = tl.dot(query_tail, tl.trans(keys_tail), score, input_precision="ieee")
    if PARTIAL:
        seen = pairs_visible(box, disc, band, always, gate, b, h, q_slot, slot, q_live, slot < n_k, TESTED)
        if BOUNDED:
            seen = seen & live[None, :]
        score = tl.where(seen, score, float("-inf"))
    elif BOUNDED:  # noqa: SIM102 (known while compiling, which the next test is not)
        if cut:
            score = tl.where(live[None, :], score, float("-inf"))

    top_new = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - top_new[:, None])
    fade = tl.exp2(top - top_new)
    total = total * fade + tl.sum(weight, 1)
    values = _load(v, v_tile, b, kv, start, token, v_stride, live, BLOCK, WIDTHS[2], DV, BOUNDED, EMULATED)
    weight = weight.to(values.dtype)
    acc = tl.dot(weight, values, acc * fade[:, None], input_precision="ieee")
    if WIDTHS[3]:
        values_tail = load_rows(v, token, v_stride, live, WIDTHS[3], WIDTHS[2], DV, BOUNDED, EMULATED)
        acc_tail = tl.dot(weight, values_tail, acc_tail * fade[:, None], input_precision="ieee")
    else:
        acc_tail = acc
    return acc, acc_tail, top_new, total


@triton.jit
def _load(
    base, tile, b, head, start, token, stride, live, BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    BOUNDED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """(BLOCK, WIDTH): a block by its descriptor where there is one, else row by row."""
    if tile is not None:
        x = tl.reshape(tile.load([b.to(tl.int32), head.to(tl.int32), start, 0]), (BLOCK, WIDTH))
        x = x.to(tl.float32) if EMULATED else x
    else:
        x = load_rows(base, token, stride, live, WIDTH, 0, D, BOUNDED, EMULATED)
    return x


@triton.jit
def visit_representatives(
    acc, acc_tail, top, total, mass, query, query_tail, index, k, v, bias, first, count, scale,
    PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTHS: tl.constexpr,
    WEIGHED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The representatives first .. first + BLOCK of the ``count`` that a tile lists. WEIGHED: sum their mass."""
    lane = first + tl.arange(0, BLOCK)
    live = lane < count
    row = tl.load(index + lane // PER_BLOCK, mask=live, other=0).to(tl.int64) * PER_BLOCK + lane % PER_BLOCK
    log = tl.load(bias + row, mask=live, other=float("-inf"))
    keys = load_rows(k, row, D, live, WIDTHS[0], 0, D, True, EMULATED)
    score = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if WIDTHS[1]:
        keys_tail = load_rows(k, row, D, live, WIDTHS[1], WIDTHS[0], D, True, EMULATED)
        score = tl.dot(query_tail, tl.trans(keys_tail), score, input_precision="ieee")
    score = score * scale + (log * 1.4426950408889634)[None, :]
    top_new = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - top_new[:, None])
    fade = tl.exp2(top - top_new)
    gained = tl.sum(weight, 1)
    total = total * fade + gained
    if WEIGHED:
        mass = mass * fade + gained
    values = load_rows(v, row, DV, live, WIDTHS[2], 0, DV, True, EMULATED)
    weight = weight.to(values.dtype)
    acc = tl.dot(weight, values, acc * fade[:, None], input_precision="ieee")
    if WIDTHS[3]:
        values_tail = load_rows(v, row, DV, live, WIDTHS[3], WIDTHS[2], DV, True, EMULATED)
        acc_tail = tl.dot(weight, values_tail, acc_tail * fade[:, None], input_precision="ieee")
    else:
        acc_tail = acc
    return acc, acc_tail, top_new, total, mass


@triton.jit
def add_first_order(
    acc, acc_tail, queries, token, stride, live, share, first_order, b, h, D: tl.constexpr, DV: tl.constexpr,
    WIDTHS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc plus (queries x share) @ matrix. A few columns of the queries at a time: a second accumulator would spill."""
    at = b * first_order[2][0] + (h // first_order[3]) * first_order[2][1]
    upper = first_order[0] + at
    for line in range(0, D, 16):
        column = line + tl.arange(0, 16)
        part = tl.load(
            queries + token[:, None] * stride + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0
        )
        part = part.to(tl.float32) * share
        if first_order[1] is None:
            acc = tl.dot(part, load_block(upper, line, WIDTHS[2], 0, D, DV, EMULATED), acc, input_precision="tf32x3")
            if WIDTHS[3]:
                block = load_block(upper, line, WIDTHS[3], WIDTHS[2], D, DV, EMULATED)
                acc_tail = tl.dot(part, block, acc_tail, input_precision="tf32x3")
        else:
            # Both factors in two halves of 16 bits; the product of their lower halves is beyond what is kept.
            lower = first_order[1] + at
            large = part.to(tl.bfloat16)
            small = (part - large.to(tl.float32)).to(tl.bfloat16)
            if EMULATED:
                large, small = large.to(tl.float32), small.to(tl.float32)
            acc = _add_halves(acc, large, small, upper, lower, line, WIDTHS[2], 0, D, DV, EMULATED)
            if WIDTHS[3]:
                acc_tail = _add_halves(
                    acc_tail, large, small, upper, lower, line, WIDTHS[3], WIDTHS[2], D, DV, EMULATED
                )  # fmt: skip
    return acc, acc_tail


@triton.jit
def _add_halves(
    acc, large, small, upper, lower, line, COLUMNS: tl.constexpr, FROM: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    block = load_block(upper, line, COLUMNS, FROM, D, DV, EMULATED)
    acc = tl.dot(small, block, tl.dot(large, block, acc))
    return tl.dot(large, load_block(lower, line, COLUMNS, FROM, D, DV, EMULATED), acc)


@triton.jit
def apply_row_factors(acc, acc_tail, row_factors, row, DV: tl.constexpr, WIDTHS: tl.constexpr):
    """acc times the scale of a query tile plus what is added to each of its rows. ``row``: int64, the tile's number."""
    factor = tl.load(row_factors[0] + row)
    add = row_factors[1] + row * DV
    acc = acc * factor + load_columns(add, WIDTHS[2], 0, DV)[None, :]
    if WIDTHS[3]:
        acc_tail = acc_tail * factor + load_columns(add, WIDTHS[3], WIDTHS[2], DV)[None, :]
    return acc, acc_tail


@triton.jit
def load_block(
    matrix, first, COLUMNS: tl.constexpr, FROM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, EMULATED: tl.constexpr
):  # fmt: skip
    """Rows first .. first + 16 and columns FROM .. FROM + COLUMNS of a contiguous (D, DV) matrix."""
    row, column = first + tl.arange(0, 16), FROM + tl.arange(0, COLUMNS)
    mask = (row < D)[:, None] & (column < DV)[None, :]
    x = tl.load(matrix + row[:, None] * DV + column[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if EMULATED else x


@triton.jit
def load_columns(base, WIDTH: tl.constexpr, FROM: tl.constexpr, DV: tl.constexpr):
    column = FROM + tl.arange(0, WIDTH)
    return tl.load(base + column, mask=column < DV, other=0.0)


@triton.jit
def pairs_visible(box, disc, band, always, gate, b, h, q, k, q_live, k_live, TESTED: tl.constexpr):
    """Which pairs of a partial tile are visible: ``TilePlan.pair_visible`` for slots q x k."""
    seen = q_live[:, None]
    if box is not None:
        for axis in tl.static_range(len(box[2])):
            coord = tl.load(box[2][axis] + k, mask=k_live, other=0)[None, :]
            lo = tl.load(box[0][axis] + q, mask=q_live, other=0)[:, None]
            hi = tl.load(box[1][axis] + q, mask=q_live, other=0)[:, None]
            seen = seen & (lo <= coord) & (coord < hi)
    if disc is not None:
        r2 = tl.load(disc[2] + q, mask=q_live, other=0)[:, None]
        distance = tl.zeros_like(r2)
        for axis in tl.static_range(len(disc[1])):
            coord = tl.load(disc[1][axis] + k, mask=k_live, other=0)[None, :]
            delta = tl.load(disc[0][axis] + q, mask=q_live, other=0)[:, None] - coord
            distance = distance + delta * delta
        seen = seen & (distance < r2)
    if band is not None:
        position = tl.load(band[0] + q, mask=q_live, other=0)[:, None]
        delta = position - tl.load(band[1] + k, mask=k_live, other=0)[None, :]
        row = tl.load(band[2] + q, mask=q_live, other=0)[:, None]
        col = tl.load(band[3] + k, mask=k_live, other=0)[None, :]
        seen = seen & (tl.abs(delta) <= tl.load(band[4] + row * band[5] + col))
    if always is not None:
        seen = seen | (tl.load(always + k, mask=k_live, other=0) != 0)[None, :]
    if gate is not None:
        row = tl.load(gate[1] + q, mask=q_live, other=0)[:, None]
        col = tl.load(gate[2] + k, mask=k_live, other=0)[None, :]
        cell = tl.load(gate[0] + b * gate[3][0] + h * gate[3][1] + row * gate[3][2] + col)
        if TESTED:
            seen = (cell == 2) | ((cell == 1) & seen)
        else:
            seen = cell == 2
    return seen & k_live[None, :]


@triton.jit
def load_rows(
    base, token, stride, live, WIDTH: tl.constexpr, FROM: tl.constexpr, D: tl.constexpr,
    BOUNDED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Columns FROM .. FROM + WIDTH of the tokens' rows; 0 past D and, where BOUNDED, for dead rows."""
    column = FROM + tl.arange(0, WIDTH)
    pointer = base + token[:, None] * stride + column[None, :]
    if FROM + WIDTH > D:
        mask = (column < D)[None, :]
        if BOUNDED:
            mask = mask & live[:, None]
        x = tl.load(pointer, mask=mask, other=0.0)
    elif BOUNDED:
        x = tl.load(pointer, mask=live[:, None], other=0.0)
    else:
        x = tl.load(pointer)
    # The interpreter computes on the bits of 16-bit floats.
    return x.to(tl.float32) if EMULATED else x


@triton.jit
def store_rows(base, token, stride, live, x, WIDTH: tl.constexpr, FROM: tl.constexpr, D: tl.constexpr):
    column = FROM + tl.arange(0, WIDTH)
    pointer = base + token[:, None] * stride + column[None, :]
    mask = live[:, None] & (column < D)[None, :]
    tl.store(pointer, x.to(base.dtype.element_ty), mask=mask)
