# SPDX-License-Identifier: Apache-2.0
"""What the host does in a call through a CUDA graph (``benchmarks/host.py``): how many operations a GPU waits for."""

from __future__ import annotations

import pytest
import torch

from benchmarks import host

# Before the replay. Of a mask: its sum, where its tokens are, the verdict on its values.
COUNTS = {
    "Bert, one text": 6,
    "Bert, ragged mask": 16,
    "Bert, ragged lengths": 4,
    "swapped encoder, one text": 5,
    "swapped encoder, ragged mask": 16,
}


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_operations_before_a_replay(name: str) -> None:
    calls = host.rows(layers=1)
    if name not in calls:
        pytest.skip("Transformers is not installed")
    with host.as_on_a_gpu():
        before, after, count = host.measured(calls[name], 3)
    assert before > 0 and after > 0 and count == COUNTS[name]


def test_the_program_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--layers", "1", "--calls", "3"])
    printed = capsys.readouterr().out
    assert "operations before" in printed and all(name in printed for name in ("Bert, one text", "ragged lengths"))
