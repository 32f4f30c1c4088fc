"""The merge is exact, reuse is off where it must be, and what it reuses is what it says."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UsageError
from dit_accel.pipelines.streaming import CacheConfig, FlashBlock, Host, Rollout, Similarity, Steps, merge
from tiny_models import WAN

SIZE = (4, 4, 6)
CONFIG = CacheConfig("sink", window_frames=9, sink_frames=3)


def part(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("split", [1, 7, 18])
def test_merging_two_parts_is_the_whole_softmax(split):
    q, k, v = torch.randn(3, 2, 3, 19, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = 20 * k  # sharp: sums of exponentials far apart
    out, lse = merge(part(q, k[:, :, :split], v[:, :, :split]), part(q, k[:, :, split:], v[:, :, split:]))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, part(q, k, v)[1], atol=1e-12, rtol=0)


def stream(attention=None, chunks=5, steps=None, config=CONFIG):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN).eval()
    text = {"cond": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))}
    rollout = Rollout(Host(model, attention), config, steps or Steps(), text, size=SIZE, seed=4)
    with rollout.host.attached():
        return torch.cat([rollout.next() for _ in range(chunks)], 2)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_always_computing_is_dense():
    dense = stream()
    measuring = FlashBlock(measure=True)
    close(stream(measuring), dense)
    always = FlashBlock(measuring.similarity, min_cosine=1.5)
    close(stream(always), dense)
    assert always.reused == 0
    assert always.computed == 4 * 3 * 5 * 2  # chunks with history, layers, forwards, heads


def test_reuse_shows_and_is_counted():
    block = FlashBlock()
    found = stream(block)
    assert (block.computed, block.reused) == (4 * 3 * 2 * 2, 4 * 3 * 3 * 2)  # steps 0 and context; steps 1 to 3
    assert not torch.allclose(found, stream(), atol=1e-4)
    assert torch.equal(found[:, :, :3], stream(FlashBlock(measure=True), chunks=1))  # nothing to reuse yet
    everywhere = FlashBlock(context=True)
    stream(everywhere)
    assert (everywhere.computed, everywhere.reused) == (4 * 3 * 2, 4 * 3 * 4 * 2)
    assert everywhere.bytes() == 3 * 2 * 2 * 18 * (12 + 1) * 4


def test_a_chunk_with_one_step_has_nothing_to_approximate():
    one = Steps((1000,))
    close(stream(FlashBlock(), steps=one), stream(steps=one))


def test_an_unchanged_query_loses_nothing():
    """Two steps at nearly one level with the noise just predicted: the second asks what the first asked."""
    steps = Steps((1000, 999.999), renoise="predicted")
    close(stream(FlashBlock(), steps=steps, chunks=3), stream(steps=steps, chunks=3))


def test_heads_are_chosen_by_what_was_measured():
    measuring = FlashBlock(measure=True)
    stream(measuring)
    found = measuring.similarity
    assert set(found.cosine) == {(layer, step) for layer in range(3) for step in (1, 2, 3, 4)}
    assert all(0 < float(c) <= 1 for cosine in found.cosine.values() for c in cosine)
    table = Similarity(cosine={key: torch.tensor([1.0, 0.5]) for key in found.cosine},
                       lse={key: torch.zeros(2) for key in found.lse})  # fmt: skip
    block = FlashBlock(table)
    stream(block)
    assert (block.computed, block.reused) == (4 * 3 * (2 * 2 + 3), 4 * 3 * 3)
    table.lse[0, 2] = torch.tensor([1.0, 0.0])
    block = FlashBlock(table)
    stream(block)
    assert block.reused == 4 * 3 * 3 - 4


def test_a_table_of_another_model_is_refused():
    with pytest.raises(UsageError, match="nothing was measured for layer 0, step 1"):
        stream(FlashBlock(Similarity()))


def test_compressed_windows_too():
    config = CacheConfig("deep_sink+pc", window_frames=9, sink_frames=2, pc_budget=6, pc_recent=3)
    close(stream(FlashBlock(measure=True), config=config), stream(config=config))
