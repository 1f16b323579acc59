# SPDX-License-Identifier: Apache-2.0
"""``ctxfast bench``: the benchmark suite of a checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command."""
    bench = commands.add_parser("bench", help="the benchmark suite of a checkout; arguments go to it", add_help=False)
    bench.set_defaults(run=_run, hands_on=True)


def _run(args: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            "ctxfast.bench: the benchmark suite is not here; it is part of the source tree, not of an installed "
            "package. Clone the repository and run: make bench"
        )
    return subprocess.call([sys.executable, "-m", "benchmarks", *args.rest], cwd=checkout)
