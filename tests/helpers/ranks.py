"""Several gloo processes on this machine that run one function."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_ranks(function: Any, ranks: int, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in ``ranks`` processes with a common gloo group; the results by rank.

    Processes are forked, so that none imports the libraries again; each keeps to one thread, which a fork needs. An
    exception in one of them is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:  # a queue would block processes that end before it is read
        arguments = (ranks, port, function, args, Path(folder))
        multiprocessing.start_processes(_worker, arguments, nprocs=ranks, start_method="fork")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _worker(rank: int, ranks: int, port: int, function: Any, args: tuple, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # diffusers gives rank r the device r % device_count; without an accelerator there is nothing to count.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        (folder / str(rank)).write_bytes(pickle.dumps(function(rank, *args)))
    finally:
        dist.destroy_process_group()
