"""Functions run by several processes at once, which talk through gloo."""

import multiprocessing
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="there is no gloo")
# One process imports what takes seconds; the ranks are forked from it.
multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor.parallel",
        "metaadamw_fast",
    ]
)


def run(function, ranks, directory, *args):
    """``function(rank, *args)`` on each of ``ranks`` processes; the list of what they return."""
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)
    mp.start_processes(_rank, (ranks, str(directory), function, args), nprocs=ranks, start_method="forkserver")
    return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank, ranks, directory, function, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine may lead nowhere
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.save(function(rank, *args), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()
