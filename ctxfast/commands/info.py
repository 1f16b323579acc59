# SPDX-License-Identifier: Apache-2.0
"""``ctxfast info``: versions, build, and what each op would run."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command."""
    info = commands.add_parser("info", help="versions, build, and what each op would run")
    info.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from .._core.registry import OPS
    from .._core.report import show_config
    from ..functional import explain

    print(show_config())
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        print(f"\nwhat a float32 call without gradients runs on {device}:")
        for spec in OPS.values():
            case = spec.cases()[0]
            with torch.inference_mode():
                print(explain(spec.name, **case.make(device, torch.float32, 0)))
    return 0
