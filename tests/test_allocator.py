# SPDX-License-Identifier: Apache-2.0
"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Pieces of 40 MB are past the size that glibc by itself ever keeps.
_PROGRAM = """
import resource, sys
from ctxfast._core.allocator import keep_freed_memory
keeps = keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    [b"x" * size for size in (1 << 20, 40 << 20)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
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
    assert keeps == "True" and faults < 100 and usual > 1000
