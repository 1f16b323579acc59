# SPDX-License-Identifier: Apache-2.0
"""What ``ctxfast`` loads on first use is what type checkers and editors are told of it, name by name."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import ctxfast

PACKAGE = Path(ctxfast.__file__).parent


def _declared() -> dict[str, str]:
    """Name -> module, from the imports under ``if TYPE_CHECKING``, which is all that a checker reads."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found: dict[str, str] = {}
    for node in ast.walk(block):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = "ctxfast" + (f".{node.module}" if node.module else "")
        for alias in node.names:
            if alias.name == "*":
                found |= dict.fromkeys(_all_of(module), module)
                continue
            # Only "X as X" is exported to those who import from here.
            assert alias.asname == alias.name, f"from {module} import {alias.name} as {alias.name}"
            found[alias.name] = module if node.module else f"ctxfast.{alias.name}"
    return found


def _all_of(module: str) -> list[str]:
    """``__all__`` as it stands in a module's source: checkers run nothing."""
    tree = ast.parse((PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    (value,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return ast.literal_eval(value)


def test_checkers_are_told_what_is_loaded() -> None:
    lazy = {**ctxfast._LAZY, **{name: f"ctxfast.{name}" for name in ctxfast._LAZY_MODULES}}
    assert _declared() == lazy
    assert (PACKAGE / "py.typed").is_file()  # without it a checker believes nothing of an installed package


@pytest.mark.parametrize("name", ctxfast.__all__)
def test_every_name_is_defined_where_it_is_said_to_be(name: str) -> None:
    """A class that moved and is only passed on would be found at run time, and hovered over in the wrong file."""
    value = getattr(ctxfast, name)
    assert name in dir(ctxfast)
    if name in ctxfast._LAZY_MODULES:
        assert value is importlib.import_module(f"ctxfast.{name}")
    elif ctxfast._LAZY[name] != "ctxfast.functional" or name == "explain":
        assert value.__module__ == ctxfast._LAZY[name]
