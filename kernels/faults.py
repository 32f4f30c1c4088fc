"""Whether a GPU still works after an exception. One wrong address ends the context: all that follows fails too."""

from __future__ import annotations

import torch


class DeviceLost(RuntimeError):
    """The GPU's context is broken: nothing runs on it any more in this process."""


def check_device(error: Exception) -> None:
    """Raise :class:`DeviceLost` from ``error`` where it left the GPU unusable, and ``error`` where it is that already.

    Waits for the GPU: Triton and packages of others raise errors of their own kind for a broken context, and kernels
    fail after their call has returned. Free of cost without a GPU in use.
    """
    if isinstance(error, DeviceLost):
        raise error
    lost = isinstance(error, torch.AcceleratorError)
    if not lost and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            lost = True
    if lost:
        said = (str(error).splitlines() or [""])[0][:200]
        raise DeviceLost(
            f"the GPU's context is broken ({type(error).__name__}: {said}); nothing more can run on it in this "
            "process. Start the command again; to find the kernel: compute-sanitizer --tool memcheck python -m ..."
        ) from error
