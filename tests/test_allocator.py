# SPDX-License-Identifier: Apache-2.0
"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import numpy as np
from ctxfast._core.allocator import keep_freed_memory
keeps = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):  # sizes of a step, the largest last
    [np.ones(size) for size in (1 << 17, 1 << 20, 1 << 22)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    [np.ones(size) for size in (1 << 17, 1 << 20, 1 << 22)]
print(keeps, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(way: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, check=True)
    keeps, faults = done.stdout.split()
    return keeps, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="not on this device: glibc alone has mallopt")
def test_nothing_is_handed_out_anew() -> None:
    keeps, faults = _faults("keep")
    _, usual = _faults("usual")
    assert keeps == "True" and faults < 100 < usual / 10
