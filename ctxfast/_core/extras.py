# SPDX-License-Identifier: Apache-2.0
"""Packages that only some uses of this one need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def need(who: str, module: str, what: str, extra: str | None) -> ModuleType:
    """A module of an optional package.

    Args:
        who: begins the message.
        module: dotted name; its package is called the same, but for "_", which is "-" there.
        what: it is needed for.
        extra: the group of packages of ours that it belongs to; None: it is installed by its own name.

    Raises:
        RuntimeError: it is not installed; with the line that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        line = package if extra is None else f"'ctxfast[{extra}]'"
        raise RuntimeError(
            f"{who}: {package} is not installed; expected it for {what}. Install it: pip install {line}"
        ) from error
