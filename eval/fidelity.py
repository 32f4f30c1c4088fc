"""How close frames are to the dense ones: PSNR and SSIM, with their conventions fixed and named.

PSNR is the mean over frames of each frame's own dB, as most tools report it; a frame without error counts as
100 dB and is counted. SSIM is Wang's (2004) with an 11x11 Gaussian of sigma 1.5. What happens at the border is named:
``"valid"``, ours, pads nothing and equals pytorch-msssim and scikit-image's Gaussian variant; ``"reflect"`` is
torchmetrics', ``"zero"`` FastVideo's. All arithmetic is float64: uint8 differences wrap around.

``python -m dit_accel.eval.fidelity DENSE FAST`` compares two folders of renders, paired by prompt and seed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d, pad

from ..errors import UsageError

CAP = 100.0
PSNR_VARIANT = "mean of per-frame PSNR, capped at 100 dB"
# Border convention -> how it pads; None pads nothing.
BORDERS = {"valid": None, "reflect": "reflect", "zero": "constant"}
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Fidelity:
    """``psnr``: mean of ``psnr_frames`` in dB. ``psnr_global``: from the MSE pooled over frames. ``n_identical``:
    frames that hit the cap. ``ssim``: mean of ``ssim_frames``, or None where frames are smaller than the window.
    ``psnr_variant``, ``ssim_variant``: the conventions in words."""

    psnr: float
    psnr_global: float
    psnr_frames: tuple[float, ...]
    n_identical: int
    ssim: float | None
    ssim_frames: tuple[float, ...]
    psnr_variant: str = PSNR_VARIANT
    ssim_variant: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ssim_variant(border: str = "valid") -> str:
    """The SSIM convention in words."""
    return f"Gaussian 11x11, sigma 1.5, {border} border, per RGB channel"


def fidelity(a: Any, b: Any, border: str = "valid") -> Fidelity:
    """All of it for two clips. ``a`` and ``b`` as for :func:`psnr`, ``border`` as for :func:`ssim`."""
    _check_border(border)
    pairs = _pairs(a, b)
    errors = [_mse(x, y) for x, y in pairs]
    frames = tuple(_decibel(e) for e in errors)
    large = min(pairs[0][0].shape[:2]) >= _WINDOW
    similar = tuple(_ssim(x, y, border) for x, y in pairs) if large else ()
    return Fidelity(
        psnr=float(np.mean(frames)),
        psnr_global=_decibel(float(np.mean(errors))),
        psnr_frames=frames,
        n_identical=sum(f >= CAP for f in frames),
        ssim=float(np.mean(similar)) if similar else None,
        ssim_frames=similar,
        ssim_variant=ssim_variant(border),
    )


def psnr(a: Any, b: Any) -> float:
    """Mean over frames of the PSNR in dB, each at most 100.

    a, b: (T, H, W, 3) or (H, W, 3), arrays or tensors, uint8 or float in [0, 1]. Raises ``UsageError`` for
    unequal shapes, other dtypes, and floats outside [0, 1]: nothing is cut to fit.
    """
    return float(np.mean([_decibel(_mse(x, y)) for x, y in _pairs(a, b)]))


def psnr_global(a: Any, b: Any) -> float:
    """PSNR in dB from the squared error pooled over all frames; never above :func:`psnr`."""
    return _decibel(float(np.mean([_mse(x, y) for x, y in _pairs(a, b)])))


def ssim(a: Any, b: Any, border: str = "valid") -> float:
    """Mean SSIM over frames and channels. a, b as for :func:`psnr`, height and width at least 11.

    ``border``: one of ``BORDERS``, see the module. Figures of different conventions do not compare.
    """
    _check_border(border)
    return float(np.mean([_ssim(x, y, border) for x, y in _pairs(a, b)]))


def _check_border(border: str) -> None:
    if border not in BORDERS:
        raise UsageError(f"border convention {border!r} is unknown; choose one of {', '.join(BORDERS)}")


def _mse(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((x - y) ** 2))


def _decibel(mse: float) -> float:
    return CAP if mse <= 10 ** (-CAP / 10) else -10 * float(np.log10(mse))


def _ssim(x: np.ndarray, y: np.ndarray, border: str = "valid") -> float:
    """Mean over the SSIM map and channels of one (H, W, 3) pair."""
    if min(x.shape[:2]) < _WINDOW:
        raise UsageError(f"SSIM needs frames of at least {_WINDOW}x{_WINDOW}; got {x.shape[1]}x{x.shape[0]} (WxH)")
    offset = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    line /= line.sum()
    a, b = (torch.from_numpy(z).permute(2, 0, 1)[:, None] for z in (x, y))
    maps = torch.cat([a, b, a * a, b * b, a * b])
    if BORDERS[border]:
        maps = pad(maps, (_WINDOW // 2,) * 4, mode=BORDERS[border])
    maps = conv2d(conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5)
    c1, c2 = _K1**2, _K2**2
    value = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    value = value / ((mean_a**2 + mean_b**2 + c1) * (aa - mean_a**2 + bb - mean_b**2 + c2))
    return float(value.mean())


def _pairs(a: Any, b: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frame pairs as float64 (H, W, 3) in [0, 1]."""
    a, b = _clip(a, "a"), _clip(b, "b")
    if a.shape != b.shape:
        raise UsageError(
            f"the clips differ in shape: {a.shape} and {b.shape} (T, H, W, 3); "
            "fidelity needs equal frame counts and sizes"
        )
    return [(_unit(x, "a"), _unit(y, "b")) for x, y in zip(a, b, strict=True)]


def _clip(x: Any, name: str) -> np.ndarray:
    """``x`` as (T, H, W, 3), its own dtype."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x).numpy()
    x = np.asarray(x)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] != 3 or x.size == 0:
        raise UsageError(f"{name} must be (T, H, W, 3) or (H, W, 3), channels last; got shape {x.shape}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise UsageError(f"{name} must be uint8, or float in [0, 1]; got {x.dtype}")
    return x


def _unit(frame: np.ndarray, name: str) -> np.ndarray:
    if frame.dtype == np.uint8:
        return frame / 255.0
    frame = frame.astype(np.float64)
    if np.isnan(frame).any():
        raise UsageError(f"{name} holds NaN")
    if frame.min() < 0 or frame.max() > 1:
        raise UsageError(
            f"{name} is float and must lie in [0, 1]; it spans {frame.min():.4g} to {frame.max():.4g}. "
            "Divide by its range, or give uint8"
        )
    return frame


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["eval", "fidelity", *sys.argv[1:]]))
