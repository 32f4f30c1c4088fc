import numpy as np
import torch

from dit_accel.pipelines.mini.vae import build_vae, clip_batch, to_tensor, to_video, vae_loss


def test_eight_fold_in_space_two_fold_in_time():
    vae = build_vae(16, 4).eval()
    with torch.no_grad():
        z = vae.encode(clip_batch(np.random.default_rng(0), 1, 9)).latent_dist.mode()
        assert z.shape == (1, 4, 5, 8, 10)
        assert vae.decode(z).sample.shape == (1, 3, 9, 64, 80)


def test_pixels_round_trip():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_video(to_tensor(video)), video)


def test_loss_is_differentiable_and_logs():
    vae = build_vae(16, 4)
    video = clip_batch(np.random.default_rng(0), 1, 5)
    loss, numbers = vae_loss(vae, video, torch.Generator().manual_seed(0), 1e-3)
    loss.backward()
    assert {"l1", "kl", "psnr"} <= numbers.keys()
    assert all(p.grad is not None for p in vae.encoder.parameters())
