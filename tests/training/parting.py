# SPDX-License-Identifier: Apache-2.0
"""Run by test_parallel: pairs of processes reduce a tensor and end at the worst moment. Prints how."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ctxfast.training.loop.parallel import join


def drop_late(rank: int, store: str) -> None:
    """The worst moment, in process 0: gloo's thread wants Python's lock, to drop a tensor, and nobody lets go of it."""
    libc = ctypes.PyDLL(None)  # its calls keep the lock
    began, joined = f"{store}.began".encode(), f"{store}.joined".encode()
    if rank == 1:
        while libc.access(began, os.F_OK):
            libc.usleep(1000)
    tensor = torch.ones(1000)
    task = dist.all_reduce(tensor, async_op=True)
    del tensor, task
    Path((joined if rank else began).decode()).touch()
    if rank == 0:
        sys.setswitchinterval(1000)
        while libc.access(joined, os.F_OK):
            libc.usleep(1000)
        libc.usleep(300_000)


def train_and_part(rank: int, way: str, store: str) -> None:
    os.environ["TORCHELASTIC_RUN_ID"] = "parting"
    dist.init_process_group = functools.partial(
        dist.init_process_group, init_method=f"file://{store}", rank=rank, world_size=2
    )
    group = join("ddp", "cpu")
    if way == "stopped":
        drop_late(rank, store)
        sys.exit(7)
    # As DDP does, by way of torch._dynamo: its default arguments hold the group to the end.
    from torch.distributed.nn import functional  # noqa: F401

    wait = dist.barrier
    dist.barrier = lambda: (wait(), drop_late(rank, store))
    group.leave()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for way in sys.argv[2:]:
        processes = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                train_and_part(rank, way, str(folder / way))
                sys.exit(0)
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(way, *codes, flush=True)
