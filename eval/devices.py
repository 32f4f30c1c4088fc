"""Device classes and the efficiency factors behind predicted gains. Predictions, never measurements.

A class is described by three ratios. ``attention`` and ``matmul``: the share of the peak matmul rate that dense
attention and large linear layers reach; only their quotient matters, it turns operations into time. ``kernel``: the
rate of the sparse kernel over that of dense attention, per pair of tokens visited. Normalisation, modulation and other
memory-bound work is left out, so real gains on small models fall below the prediction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..cost import end_to_end


@dataclass(frozen=True)
class DeviceClass:
    """``name`` as architectures are called, ``devices`` some of its members, ``source`` where the ratios are from."""

    name: str
    devices: str
    attention: float
    matmul: float
    kernel: float
    source: str

    def time_share(self, attention: float, rest: float) -> float:
        """Attention's share of a step's time, from its operations and those of everything else."""
        spent = attention / self.attention, rest / self.matmul
        return spent[0] / sum(spent)

    def predict(self, attention: float, rest: float, visited: float, sparse: float) -> dict[str, Any]:
        """Gain of the denoising loop. ``visited``: the share of key tiles that the kernel visits. ``sparse``: the share
        of attention calls that run sparse. ``ceiling``: the same with a kernel as fast, pair by pair, as dense."""
        share = self.time_share(attention, rest) * sparse
        return {
            **asdict(self),
            "time_share": self.time_share(attention, rest),
            "loop": end_to_end(self.kernel / visited, share),
            "ceiling": end_to_end(1 / visited, share),
        }


_KERNEL = "sparse kernel: assumed, not measured"

CLASSES = (
    DeviceClass(
        "cpu", "AVX2, AVX-512", 1.0, 0.5, 0.41, "measured on the bundled model, two cores, tier flash (README)"
    ),
    DeviceClass(
        "sm80", "A100, A800", 0.70, 0.80, 0.75, f"FlashAttention-2, arXiv 2307.08691: up to 73 % of peak; {_KERNEL}"
    ),
    DeviceClass("sm89", "RTX 4090, L40S", 0.80, 0.80, 0.75, f"assumed equal to matmul; {_KERNEL}"),
    DeviceClass(
        "sm90", "H100, H200", 0.58, 0.75, 0.75, f"NATTEN's profile of dense attention at 115,200 tokens; {_KERNEL}"
    ),
    DeviceClass("sm100", "B200", 0.54, 0.75, 0.65, f"NATTEN's profile of dense attention at 115,200 tokens; {_KERNEL}"),
)
