"""Functions run on several processes of this machine at once, as ranks of a gloo group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(
    worker: Callable[..., Any],
    *args: Any,
    world: int = 2,
    limit: float = 240,
    patience: float = 60,
    dying: tuple[int, ...] = (),
) -> list[Any]:
    """worker(rank, *args) on each of `world` ranks; their results, in order of rank.

    Args:
        worker: a function of a module in tests/, whose result torch.save takes.
        limit: seconds before the ranks are killed. patience: seconds a rank waits for another one.
        dying: ranks that end without a result, None in their place.

    Raises:
        AssertionError: with the traceback of a rank that failed, or that did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "fastdpo"])
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, patience, worker, args)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(limit)
        stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        failed = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
        assert not failed, failed
        assert not stuck, f"ranks {stuck} did not end in {limit} s"
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [None if rank in dying else torch.load(file, weights_only=False) for rank, file in enumerate(files)]


def _rank(rank: int, world: int, folder: str, patience: float, worker: Callable[..., Any], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=patience),
        )
        torch.save(worker(rank, *args), f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
