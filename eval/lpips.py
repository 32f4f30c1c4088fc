"""LPIPS through the optional ``lpips`` package: Zhang et al., arXiv 1801.03924, heads v0.1."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UnsupportedError, UsageError

NETS = ("alex", "vgg", "squeeze")


def unavailable() -> str | None:
    """Why LPIPS cannot be computed here, or None. Nothing is downloaded."""
    try:
        import lpips  # noqa: F401
    except Exception as error:  # a torchvision that does not fit torch fails with more than ImportError
        return f"the lpips package does not import ({type(error).__name__}: {error}); pip install lpips torchvision"
    return None


class Lpips:
    """Mean over frames. The first use fetches the network's ImageNet weights through torchvision.

    ``net``: ``"alex"``, which most tools take, ``"vgg"`` or ``"squeeze"``; figures of different nets do not compare.
    Raises ``UsageError`` for another net, ``UnsupportedError`` where the package or its weights are missing.
    """

    def __init__(self, net: str = "alex"):
        if net not in NETS:
            raise UsageError(f"LPIPS net {net!r} is unknown; choose one of {', '.join(NETS)}")
        why = unavailable()
        if why:
            raise UnsupportedError(f"LPIPS is not available: {why}")
        import lpips

        try:
            self._model: Any = lpips.LPIPS(net=net, version="0.1", verbose=False).eval()
        except Exception as error:  # no network, or a broken cache
            raise UnsupportedError(f"the weights of LPIPS {net} are not available ({error})") from error
        self.variant = f"v0.1, {net}, mean over frames"

    def score(self, a: np.ndarray, b: np.ndarray) -> float:
        """Of two clips, uint8 or float in [0, 1], (T, H, W, 3), frame by frame."""
        import torch

        def ready(frame: np.ndarray) -> torch.Tensor:
            unit = frame.astype(np.float32) / (255 if frame.dtype == np.uint8 else 1)
            return torch.from_numpy(unit * 2 - 1).permute(2, 0, 1)[None]

        with torch.no_grad():
            return float(np.mean([self._model(ready(x), ready(y)).item() for x, y in zip(a, b, strict=True)]))
