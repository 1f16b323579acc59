# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_late_thread_of_gloo_takes_no_process_down(tmp_path: Path) -> None:
    """Whether the processes leave their group or stop by themselves, the status is their own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "parting.py"), str(tmp_path), "left", "stopped"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.stdout.splitlines() == ["left 0 0", "stopped 7 7"], done.stderr[-3000:]
