"""Random block-sparse cases with their visible pairs written out by definition, not by the code under test."""

import os
from dataclasses import dataclass

import emulator
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.kernels import Band, BlockList, Box, Disc, Gate, Predicate, TilePlan

if os.environ.get("TRITON_INTERPRET") == "1":
    emulator.speed_up()

KINDS = {"box1": 1, "box2": 2, "box3": 3}


@dataclass
class Case:
    """One call, and ``mask``: bool (B, H, Nq, Nk) in token order, from python loops over the definition."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: TilePlan
    kv_valid: torch.Tensor | None
    mask: torch.Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 out and LSE, a softmax over the visible keys alone, one row at a time."""
        (b, h, n, _), dv, groups = self.q.shape, self.v.shape[-1], self.q.shape[1] // self.k.shape[1]
        out = torch.zeros(b, h, n, dv, dtype=torch.float64)
        lse = torch.full((b, h, n), -torch.inf, dtype=torch.float64)
        for bi in range(b):
            for hi in range(h):
                keys, values = (x[bi, hi // groups].double() for x in (self.k, self.v))
                for row in range(n):
                    seen = self.mask[bi, hi, row]
                    if seen.any():
                        logits = keys[seen] @ self.q[bi, hi, row].double() * self.scale
                        lse[bi, hi, row] = logits.logsumexp(0)
                        out[bi, hi, row] = torch.exp(logits - lse[bi, hi, row]) @ values[seen]
        return out, lse

    def plain(self) -> torch.Tensor:
        """Dense masked attention by torch, in the precision of the inputs."""
        gqa = self.q.shape[1] != self.k.shape[1]
        out = scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self.mask, scale=self.scale, enable_gqa=gqa
        )
        return out.masked_fill(~self.mask.any(-1, keepdim=True), 0)

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> float:
        """The house rule: at most twice plain torch's error against float64, and one rounding. Returns the ratio."""
        truth, truth_lse = self.truth()
        assert out.shape == truth.shape
        assert out.dtype == self.q.dtype
        assert torch.isfinite(out).all()
        error, plain = ((x.double() - truth).abs().max().item() for x in (out, self.plain()))
        assert error <= 2 * plain + torch.finfo(self.q.dtype).eps / 2 * truth.abs().max().item(), (error, plain)
        empty = ~self.mask.any(-1)
        assert (out[empty] == 0).all()
        if lse is not None:
            assert (lse[empty] == -torch.inf).all()
            torch.testing.assert_close(lse[~empty].double(), truth_lse[~empty], rtol=1e-6, atol=2e-6)
        return error / max(plain, 1e-30)


def _predicate(kind, n_q, n_k, integers):
    """A Predicate, and the same test as a python function of two ints."""
    if kind is None:
        return None, None
    always = integers(0, 4, n_k) == 0 if kind.endswith("+always") else None
    shown = None if always is None else always.tolist()
    kind = kind.removesuffix("+always")
    if kind in KINDS:
        axes = range(KINDS[kind])
        lo = tuple(integers(0, 6, n_q) for _ in axes)
        hi = tuple(x + integers(3, 9, n_q) for x in lo)
        coord = tuple(integers(0, 10, n_k) for _ in axes)
        part = {"box": Box(lo, hi, coord)}
        first, last, at = ([x.tolist() for x in tables] for tables in (lo, hi, coord))

        def test(i, j):
            return all(first[a][i] <= at[a][j] < last[a][i] for a in axes)

    elif kind == "disc":
        centre, coord = ((integers(0, 9, n), integers(0, 9, n)) for n in (n_q, n_k))
        r2 = integers(4, 60, n_q)
        part = {"disc": Disc(centre, coord, r2)}
        (cy, cx), (ky, kx), limit = ([x.tolist() for x in tables] for tables in (centre, coord, [r2]))

        def test(i, j):
            return (cy[i] - ky[j]) ** 2 + (cx[i] - kx[j]) ** 2 < limit[0][i]

    elif kind == "band":
        q_pos, k_pos, q_row, k_col = integers(0, 9, n_q), integers(0, 9, n_k), integers(0, 3, n_q), integers(0, 4, n_k)
        reach = integers(-1, 7, 3, 4)
        part = {"band": Band(q_pos, k_pos, q_row, k_col, reach)}
        at, key_at, row, column, limit = (x.tolist() for x in (q_pos, k_pos, q_row, k_col, reach))

        def test(i, j):
            return abs(at[i] - key_at[j]) <= limit[row[i]][column[j]]

    else:
        part = {}

        def test(i, j):
            return True

    if always is None:
        return Predicate(**part), test
    return Predicate(**part, always=always), lambda i, j: shown[j] or test(i, j)


@pytest.fixture
def checked():
    """In the interpreter, integers that pass their width raise."""
    with emulator.checked():
        yield


@pytest.fixture(scope="session")
def make_case():
    """``make_case(seed, **features)`` -> Case."""

    def make(
        seed=0, *, n_q=53, n_k=70, b=1, heads=2, kv_heads=None, dim=16, dim_v=None, dtype=torch.float32, tile=(16, 32),
        predicate=None, gate=None, order=None, kv_order=None, per_head=True, per_sample=False, alive=None, empty=False,
        bshd=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def integers(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

        def data(h, n, d):
            if bshd:
                return torch.randn(b, n, h, d, generator=generator).to(dtype).transpose(1, 2)
            return torch.randn(b, h, n, d, generator=generator).to(dtype)

        def permutation(kind, n):
            if kind is None:
                return None
            if kind == "shared":
                return torch.randperm(n, generator=generator)
            return torch.stack([torch.randperm(n, generator=generator) for _ in range(heads)])

        b1, h1 = b if per_sample else 1, heads if per_head else 1
        tile_q, tile_k = tile
        nq, nk = -(-n_q // tile_q), -(-n_k // tile_k)
        # 0 skipped, 1 partial, 2 full; without any test there are no partial tiles.
        tested = predicate is not None or gate is not None
        kinds = integers(0, 3, b1, h1, nq, nk) if tested else integers(0, 2, b1, h1, nq, nk) * 2
        if empty:
            kinds[:, :, nq // 2] = 0
        else:
            kinds[..., 0] = 2
        rule, test = _predicate(predicate, n_q, n_k, integers)
        table = q_row = k_col = None
        if gate is not None:
            q_row, k_col = integers(0, 5, n_q), integers(0, 6, n_k)
            table = integers(0, 3, b if "b" in gate else 1, heads if "h" in gate else 1, 5, 6).to(torch.uint8)
        partial = BlockList.from_mask(kinds == 1) if tested else None
        plan = TilePlan(
            tile_q, tile_k, n_q, n_k, BlockList.from_mask(kinds == 2), partial, rule,
            None if table is None else Gate(table, q_row, k_col), permutation(order, n_q), permutation(kv_order, n_k),
        )  # fmt: skip
        kv_valid = None if alive is None else torch.tensor(alive, dtype=torch.int32)

        seen = [[test is not None and bool(test(i, j)) for j in range(n_k)] for i in range(n_q)]
        rows_of, columns_of = (
            [list(range(n))] * heads if o is None else (o.tolist() if o.ndim == 2 else [o.tolist()] * heads)
            for o, n in ((plan.order, n_q), (plan.kv_order, n_k))
        )
        group = None if table is None else (q_row.tolist(), k_col.tolist())
        mask = [[[[False] * n_k for _ in range(n_q)] for _ in range(heads)] for _ in range(b)]
        for bi in range(b):
            limit = n_k if alive is None else alive[bi]
            for hi in range(heads):
                kind = kinds[min(bi, b1 - 1), min(hi, h1 - 1)].tolist()
                cell = None if table is None else table[min(bi, len(table) - 1), min(hi, table.shape[1] - 1)].tolist()
                for i in range(n_q):
                    row = mask[bi][hi][rows_of[hi][i]]
                    for j in range(n_k):
                        state = kind[i // tile_q][j // tile_k]
                        if state == 1:
                            value = 1 if cell is None else cell[group[0][i]][group[1][j]]
                            state = 2 if value == 2 or (value == 1 and seen[i][j]) else 0
                        row[columns_of[hi][j]] = state == 2 and columns_of[hi][j] < limit
        mask = torch.tensor(mask)
        q, k = data(heads, n_q, dim), data(kv_heads or heads, n_k, dim)
        return Case(q, k, data(kv_heads or heads, n_k, dim_v or dim), plan, kv_valid, mask)

    return make
