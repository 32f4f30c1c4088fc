"""Decoding as latents come equals decoding them at once, bit by bit."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming import StreamingDecoder

COMMON = {"base_dim": 3, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1, 0.2, -0.3, 0.4],
          "latents_std": [1.1, 0.7, 2.3, 1.9]}  # fmt: skip
KINDS = {
    "wan 2.1": {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]},
    "wan 2.2": {
        "dim_mult": [1, 1], "temperal_downsample": [True], "is_residual": True, "patch_size": 2, "in_channels": 12,
        "out_channels": 12, "scale_factor_temporal": 2, "scale_factor_spatial": 4,
    },
}  # fmt: skip


def vae_of(kind):
    torch.manual_seed(0)
    return AutoencoderKLWan(**COMMON, **KINDS[kind]).eval()


def whole(vae, latents):
    mean, std = (torch.tensor(COMMON[f"latents_{x}"]).view(1, 4, 1, 1, 1) for x in ("mean", "std"))
    with torch.no_grad():
        return vae.decode(latents / (1 / std) + mean).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("portions", [(1,) * 7, (3, 3, 1), (1, 3, 3), (7,)])
def test_equal_to_the_full_decode(kind, portions):
    vae = vae_of(kind)
    latents = torch.randn(2, 4, 7, 5, 6, generator=torch.Generator().manual_seed(1))
    decode = StreamingDecoder(vae)
    found = torch.cat([decode(part) for part in latents.split(portions, 2)], 2)
    assert torch.equal(found, whole(vae, latents))


def test_clips_in_turns_and_a_stock_decode_between():
    vae = vae_of("wan 2.1")
    a, b = torch.randn(2, 1, 4, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    found = []
    for x, y in zip(a.split(2, 2), b.split(2, 2), strict=True):
        found.append(first(x))
        second(y)
        whole(vae, b)
    assert torch.equal(torch.cat(found, 2), whole(vae, a))


def test_what_cannot_be_decoded_this_way():
    with pytest.raises(UnsupportedError, match="AutoencoderKLWan; got Identity"):
        StreamingDecoder(torch.nn.Identity())
    vae = vae_of("wan 2.1")
    vae.enable_tiling()
    with pytest.raises(UnsupportedError, match="disable_tiling"):
        StreamingDecoder(vae)
