"""FlexAttention's block sizes on a GPU, chosen without one: they divide the tiles beside every default of torch."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.kernels import BlockList, TilePlan
from dit_accel.kernels.block_sparse import flex, flex_options

TILES = [(128, 128), (64, 64), (128, 64), (64, 128), (192, 96), (16, 48), (256, 80)]


def defaults():
    """torch's own sizes: dtype, head dim, queries and keys per block."""
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton").CUDAConfigHeuristic()
    tables = [value for name, value in vars(heuristics).items() if name.endswith("default_flex_config")]
    assert len(tables) >= 3
    for table in tables:
        for (dtype, dim), config in table.items():
            yield dtype, dim, config.block_m, config.block_n


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_blocks_divide_the_tiles_on_every_gpu(tile):
    seen = 0
    for dtype, dim, block_q, block_k in defaults():
        made = {"BLOCK_M": block_q, "BLOCK_N": block_k} | flex_options.options(tile, dim, dtype)
        assert tile[0] % made["BLOCK_M"] == tile[1] % made["BLOCK_N"] == 0
        # No larger than torch's largest for a dtype and head dim, so that shared memory holds them.
        largest = [max(sizes) for kind, width, *sizes in defaults() if (kind, width) == (dtype, dim)]
        assert max(made["BLOCK_M"], made["BLOCK_N"]) <= max(largest)
        seen += 1
    assert seen >= 20


def test_torch_chooses_where_its_own_sizes_divide():
    for dim in (64, 128, 256):
        assert flex_options.options((128, 256), dim, torch.bfloat16) == {"BACKEND": "TRITON"}
    assert flex_options.options((128, 64), 128, torch.bfloat16) == {"BACKEND": "TRITON", "BLOCK_N": 64}
    assert flex_options.options((64, 128), 64, torch.float32) == {"BACKEND": "TRITON", "BLOCK_M": 32}


@pytest.mark.parametrize(("tile", "dim", "why"), [
    ((64, 64), 64, None), ((48, 16), 16, None), ((20, 64), 64, "tiles of 20 x 64"), ((64, 8), 64, "tiles of 64 x 8"),
    ((64, 64), 8, "head dim 8"),
])  # fmt: skip
def test_what_the_gpu_kernel_cannot_take_is_refused_on_gpus_alone(monkeypatch, tile, dim, why):
    monkeypatch.setattr(flex, "unavailable", lambda device: None)
    plan = TilePlan(*tile, 2 * tile[0], 2 * tile[1], BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool)))

    def asked(device):
        q = SimpleNamespace(device=torch.device(device), dtype=torch.float16, shape=(1, 1, plan.n_q, dim))
        return flex.refuses(q, plan, return_lse=False)

    found = asked("cuda")
    assert found is None if why is None else why in found
    assert asked("cpu") is None


def test_options_reach_the_kernel_on_gpus_alone(monkeypatch):
    given = []

    def call(q, k, v, *, kernel_options, **how):
        given.append(kernel_options)
        return q

    monkeypatch.setattr(flex.torch, "compile", lambda run, **how: run)
    monkeypatch.setattr(flex, "flex_attention", call)
    q = torch.zeros(1, 1, 128, 32)
    counts, index = torch.ones((1, 1, 2), dtype=torch.int32), torch.zeros((1, 1, 2, 2), dtype=torch.int32)
    for device in ("cuda", "cpu"):
        options = flex._options(device, (64, 64), 32, torch.bfloat16)
        run = flex._compile(flex.Kind(
            torch.bfloat16, (1, 1, 1, 32, 32), (False,) * 3, (1, 1), (64, 64), 1.0, None, False, options
        ))  # fmt: skip
        run(q, q, q, 0 * counts, index, counts, index, None, None, None)
    assert given == [{"BACKEND": "TRITON", "BLOCK_M": 64, "BLOCK_N": 64}, None]
