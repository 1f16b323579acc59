# SPDX-License-Identifier: Apache-2.0
"""Launches that are not examined again run the kernel that Triton itself would choose, with the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parents[1]

# In a process of its own: whether kernels are interpreted is decided when they are imported.
PROGRAM = """
from support import fake_triton
import torch
import triton
import triton.language as tl
from ctxfast.ops.shared import triton_launch


@triton.jit(do_not_specialize=["rows"])
def kernel(x, y, rows, stride, factor, N: tl.constexpr, HAS: tl.constexpr):
    column = tl.arange(0, N)
    z = tl.load(x + column * stride, mask=column < rows).to(tl.float32) * factor
    if HAS:
        z += tl.load(y + column)
    tl.store(x + column, z.to(x.dtype.element_ty))


memory = torch.zeros(64)
x, y = memory[:16], memory[16:32]
calls = [
    ((x, y, 5, 4, 0.5), dict(N=16, HAS=True, num_warps=1)),
    ((x, y, 6, 4, 0.25), dict(N=16, HAS=True, num_warps=1)),
    ((x, y, 2**40, 4, 0.5), dict(N=16, HAS=True, num_warps=1)),  # no int32
    ((x, y, 5, 16, 0.5), dict(N=16, HAS=True, num_warps=1)),  # a stride of whole vectors
    ((x, y, 5, 1, 0.5), dict(N=16, HAS=True, num_warps=1)),  # none at all
    ((x, None, 5, 4, 0.5), dict(N=16, HAS=False, num_warps=1)),
    ((x, y, 5, 4, 0.5), dict(N=16, HAS=False, num_warps=1)),
    ((x, y, 5, 4, 0.5), dict(N=16, HAS=True, num_warps=2)),
    ((x.half(), y, 5, 4, 0.5), dict(N=16, HAS=True, num_warps=1)),
    ((memory[1:17], y, 5, 4, 0.5), dict(N=16, HAS=True, num_warps=1)),  # off the vectors
    ((x, memory[17:33], 5, 4, 0.5), dict(N=16, HAS=True, num_warps=1)),
]
for args, constants in calls * 2 + calls[::-1]:
    fake_triton.launches.clear()
    kernel[(3,)](*args, **constants)
    triton_launch.launch(kernel, (3,), *args, **constants)
    own, mine = fake_triton.launches
    assert own[:2] == mine[:2] and len(own[2]) == len(mine[2])
    assert all(one is two or one == two for one, two in zip(own[2], mine[2])), (own, mine)
found = len(triton_launch._FOUND)
assert found == len(calls) - 2, found  # all but those off the vectors; another factor counts as another launch
print("kernels", len(fake_triton._loaded))
"""


def test_launches_like_one_before(tmp_path) -> None:
    program = tmp_path / "launches.py"  # Triton reads a kernel's source
    program.write_text(PROGRAM, encoding="utf-8")
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 10
