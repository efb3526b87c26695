"""Forked processes of one training, which need no imports of their own."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Collection
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port

WORLD = 2


def in_processes(
    work: Callable[[int], Any], folder: Path, world: int = WORLD, killed: Collection[int] = ()
) -> list[Any]:
    """What `work(rank)` returns in each of `world` processes, which Lightning takes for those that it would start, less
    those that are killed."""
    port = find_free_network_port()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
        os._exit(0)

    processes = [get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(world)]
    assert [process.exitcode for process in processes] == expected
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world) if rank not in killed]
