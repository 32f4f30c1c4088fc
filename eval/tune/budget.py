"""What a user asks of tuning: ``psnr>=28`` or ``speed>=1.6``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ...errors import UsageError

_FORM = re.compile(r"\s*(psnr|speed)\s*>=\s*(\d+(?:\.\d+)?)\s*(?:db|x)?\s*", re.IGNORECASE)
_UNITS = {"psnr": "dB", "speed": "x"}


@dataclass(frozen=True)
class Budget:
    """``metric`` must be at least ``least``: ``"psnr"`` in dB against dense attention from the same noise, the mean
    over prompts, or ``"speed"``, the dense denoising loop's time over the accelerated one's.

    The other one is then made as large as it goes. Under a budget of PSNR only what is faster than dense counts.
    """

    metric: str
    least: float

    OTHER: ClassVar[dict[str, str]] = {"psnr": "speed", "speed": "psnr"}

    def __post_init__(self) -> None:
        low, high = (0, 100) if self.metric == "psnr" else (1, 100)
        if self.metric not in self.OTHER or not low < self.least < high:
            raise UsageError(
                f"budget {self} cannot be; PSNR lies between 0 and 100 dB and a speed-up between 1 and 100: "
                "psnr>=28, speed>=1.6"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises ``UsageError`` for anything but ``psnr>=NUMBER`` and ``speed>=NUMBER``."""
        match = _FORM.fullmatch(text)
        if not match:
            raise UsageError(
                f"budget {text!r} is not understood; allowed are psnr>=DB and speed>=FACTOR, for example "
                '--budget "psnr>=28" or --budget "speed>=1.6" (quoted, so that the shell keeps the >)'
            )
        return cls(match[1].lower(), float(match[2]))

    @property
    def objective(self) -> str:
        """What is made as large as possible within the budget."""
        return self.OTHER[self.metric]

    @property
    def floor(self) -> float:
        """What the objective must exceed for a setting to be of any use."""
        return 1.0 if self.objective == "speed" else 0.0

    def __str__(self) -> str:
        return f"{self.metric}>={self.least:g}"


def worded(metric: str, value: float) -> str:
    """``"28.31 dB"`` or ``"1.32 x"``."""
    return f"{value:.2f} {_UNITS[metric]}"
