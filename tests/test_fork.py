# SPDX-License-Identifier: Apache-2.0
"""A process that forks after its thread pool was used: the child computes, and neither hangs nor crashes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_SCRIPT = """
import os
import torch
import ctxfast

torch.set_num_threads(2)
x, weight = torch.randn(64, 256), torch.randn(512, 256)
module = ctxfast.nn.LSTM(64, 64, batch_first=True).eval().requires_grad_(False)
steps = torch.randn(8, 20, 64)


def results():
    with torch.no_grad():
        return [
            ctxfast.linear_act(x, weight, impl="cpu"),
            ctxfast.linear_act(x, weight, weight_dtype=torch.int8, impl="cpu"),
            module(steps)[0],
        ]


before = [each.numpy() for each in results()]
for _ in range(2):  # a child, and a child of the child
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    # NumPy compares: torch's own operations on several threads hang in a child.
    assert all((a == b.numpy()).all() for a, b in zip(before, results()))
os._exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_child_computes_after_its_parent_used_threads() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(_SCRIPT)], timeout=120, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
