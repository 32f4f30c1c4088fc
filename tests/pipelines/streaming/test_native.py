"""diffusers' own models that go by chunks: the one that streams here, and why each of the others does not."""

import diffusers
import numpy as np
import pytest
import torch

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming import CacheConfig, Host, Rollout, Steps, StreamingPipeline
from dit_accel.pipelines.streaming.attention import Pass
from dit_accel.pipelines.streaming.native import PIPELINES, refusal
from tiny_models import WAN, tiny_pipeline

WINDOW = CacheConfig("window", window_frames=9)


def sky(**settings):
    torch.manual_seed(0)
    config = {**WAN, "inject_sample_info": True, **settings}
    return diffusers.SkyReelsV2Transformer3DModel(**config).eval().requires_grad_(False)


@pytest.mark.parametrize("fps", [16, 24])
def test_skyreels_stream_is_its_own_block_causal_pass(fps):
    """Finished chunks at time 0 behind the model's own block mask (diffusion forcing) or remembered: the same."""
    model = sky()
    torch.manual_seed(1)
    clean, noisy, text = torch.randn(1, 4, 6, 4, 6), torch.randn(1, 4, 3, 4, 6), torch.randn(1, 7, 16)
    model._set_ar_attention(3)
    times = torch.tensor([[0.0] * 6 + [700.0] * 3])
    exact = model(
        torch.cat([clean, noisy], 2), times, text, enable_diffusion_forcing=True, fps=[int(fps != 16)],
        return_dict=False,
    )[0][:, :, -3:]  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"_set_ar_attention\(1\)"):
        Host(model)
    model._set_ar_attention(1)
    host = Host(model, fps=fps)
    stream = Rollout(host, WINDOW, Steps(), {"cond": text}, size=(4, 4, 6))
    cache = stream.caches["cond"]
    with host.attached():
        stream.absorb(clean)
        cache.begin()
        found = host.forward(noisy, 700.0, text, Pass(cache, "cond", 2, 0, 4, 0.7))
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)


def test_skyreels_pipeline_streams():
    parts = {**tiny_pipeline().components, "transformer": sky(inject_sample_info=False)}
    parts.pop("transformer_2")
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**parts)
    settings = PIPELINES["SkyReelsV2DiffusionForcingPipeline"]
    steps = Steps.even(2, shift=settings["shift"], renoise=settings["renoise"])
    streaming = StreamingPipeline(pipe, WINDOW, steps=steps, guidance_scale=settings["guidance_scale"], fps=24)
    stream = streaming.stream("a red ball runs", frames=21, height=32, width=48, max_sequence_length=8)
    assert len(np.concatenate(list(stream))) == 21
    assert stream.stats.forwards == 2 * 2 * 3  # two branches, two chunks, two steps and the context pass


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AnyFlowFARPipeline", "grows with the clip"),
        ("AnyFlowFARTransformer3DModel", "use_kv_cache=True"),
        ("AnyFlowPipeline", "AnyFlowFARPipeline"),
        ("SanaWMPipeline", "sink_size, kv_max_frames"),
        ("SanaWMLTX2RefinerTransformer3DModel", "refines a given video"),
        ("HeliosPipeline", "as input tokens, not keys"),
        ("HeliosPyramidPipeline", "as input tokens, not keys"),
        ("HunyuanVideoFramepackPipeline", "compressed latents of earlier sections"),
        ("SkyReelsV2Pipeline", "only SkyReelsV2DiffusionForcingPipeline"),
        ("WanImageToVideoPipeline", "their first frames"),
        ("CogVideoXPipeline", "makes no video by chunks"),
    ],
)
def test_the_others_are_refused_with_their_reason(name, reason):
    assert hasattr(diffusers, name)
    text = refusal(name)
    assert text.startswith(name)
    assert reason in text
    assert "streams run on WanPipeline or SkyReelsV2DiffusionForcingPipeline" in text
