"""Methods inside the window: every block is dense, fewer blocks are not, and the context pass is left alone."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit_accel import AdaSpa, AllBlocks, Pisa, Radial
from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming import CacheConfig, Host, Rollout, Sparse, Steps
from tiny_models import WAN

CONFIG = CacheConfig("deep_sink", window_frames=9, sink_frames=4)


def stream(attention=None, chunks=4):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN).eval()
    text = {"cond": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))}
    rollout = Rollout(Host(model, attention), CONFIG, Steps(), text, size=(4, 8, 12), seed=4)
    with rollout.host.attached():
        return torch.cat([rollout.next() for _ in range(chunks)], 2)


def test_every_block_is_dense():
    attention = Sparse(AllBlocks(block_size=16), context=True, backend="reference")
    torch.testing.assert_close(stream(attention), stream(), atol=2e-5, rtol=2e-5)
    assert attention.counts == {"sparse": 3 * 3 * 5, "dense": 3 * 5}


@pytest.mark.parametrize(
    "method", [Pisa(density=0.3, block_size=16), AdaSpa(density=0.3, search_steps=(0,), block_size=16)], ids=str
)
def test_methods_that_search_do_so_in_every_chunk(method):
    attention = Sparse(method)
    found = stream(attention)
    assert attention.counts == {"sparse": 3 * 3 * 4, "dense": 3 * 5 + 3 * 3}
    assert bool(found.isfinite().all())
    assert not torch.allclose(found, stream(), atol=1e-4)


def test_a_mask_for_equal_queries_and_keys_is_refused():
    with pytest.raises(UnsupportedError, match="Radial needs keys in the queries' layout"):
        stream(Sparse(Radial(block_size=16)))
