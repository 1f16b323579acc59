# SPDX-License-Identifier: Apache-2.0
"""Run under torchrun by test_prepared: what process 0 makes for all, slowly, or fails to make."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ctxfast.training.parallel import join

if __name__ == "__main__":
    file = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    group = join("ddp", "cpu")

    def slow() -> str:
        if group.is_first:
            time.sleep(5)  # longer than the group's own patience
            file.write_text("made")
        return file.read_text()

    assert group.after_first(slow) == "made"

    def fails() -> None:
        assert group.is_first, "nothing was made for the others to find"
        raise ValueError("ctxfast.training: line 7 is no UTF-8")

    try:
        group.after_first(fails)
        raise AssertionError("it was to fail")
    except ValueError as error:
        file.with_name(f"said-{group.rank}").write_text(str(error))
    group.leave()
