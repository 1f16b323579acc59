# SPDX-License-Identifier: Apache-2.0
"""``ctxfast bench``: the benchmark suite, of a checkout or of an installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# What is measured where nothing is said: the small set beside the peers that are installed.
_QUICK = ("--models", "--page", "ctxfast-bench.html", "--overwrite")


def add(commands: Any) -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench",
        help="measure ctxfast beside the peers that are installed: one page, ctxfast-bench.html; --help says more",
        add_help=False,
    )
    bench.set_defaults(run=_run, hands_on=True)


def _run(args: argparse.Namespace) -> int:
    return _suite().main(args.rest or list(_QUICK))


def _suite() -> Any:
    """The suite's program: in the package, where a wheel puts it, else beside it, in a checkout."""
    if (_PACKAGE / "benchmarks" / "__main__.py").is_file():
        return importlib.import_module("ctxfast.benchmarks.__main__")
    if not (_PACKAGE.parent / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            "ctxfast.bench: the benchmark suite is neither in the installed package nor beside it. Install ctxfast "
            "anew, or run make bench in a clone of the repository."
        )
    sys.path.insert(0, str(_PACKAGE.parent))
    return importlib.import_module("benchmarks.__main__")
