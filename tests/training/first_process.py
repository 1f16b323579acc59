# SPDX-License-Identifier: Apache-2.0
"""Run under torchrun by test_prepared: what process 0 makes for all, or fails to make."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ctxfast.training.loop.parallel import join

if __name__ == "__main__":
    file = Path(sys.argv[1])
    group = join("ddp", "cpu")
    patience = []
    broadcast = dist.broadcast_object_list

    def recorded(*args, **options) -> None:
        patience.append(options["group"]._get_backend(torch.device("cpu")).options._timeout)
        broadcast(*args, **options)

    dist.broadcast_object_list = recorded

    def make() -> str:
        if group.is_first:
            file.write_text("made")
        return file.read_text()

    assert group.after_first(make) == "made"
    # What is made may take hours, and the others wait.
    assert patience and min(patience) > timedelta(days=1), patience

    def fails() -> None:
        assert group.is_first, "nothing was made for the others to find"
        raise ValueError("ctxfast.training: line 7 is not UTF-8")

    try:
        group.after_first(fails)
        raise AssertionError("it was to fail")
    except ValueError as error:
        file.with_name(f"said-{group.rank}").write_text(str(error))
    group.leave()
