# SPDX-License-Identifier: Apache-2.0
"""An op's declaration by its public function, and what becomes of a call: autocast, checks, choice, run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import fast_call, torch_ops
from .choice import resolve
from .registry import CEILING, IMPL_NAMES, OPS, AutocastRule, Impl, OpSpec, tensors

P = ParamSpec("P")  # a line each: type checkers know them by nothing else
R = TypeVar("R")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value


def _autocast(spec: OpSpec, args: dict[str, Any]) -> dict[str, Any]:
    if spec.autocast == "keep":
        return args
    device = next(tensors(args)).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return args
    dtype, rule = torch.get_autocast_dtype(device), spec.autocast
    return rule(args, dtype) if callable(rule) else {name: _cast(value, dtype) for name, value in args.items()}


def _checked(spec: OpSpec, args: dict[str, Any], impl: str | None) -> Callable[..., Any]:
    """The function that runs a call, after all checks."""
    spec.check_all(args)
    return spec.function(resolve(spec, args, impl))


def prepared(spec: OpSpec, args: dict[str, Any], impl: str | None = None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """All of a call but the call: the function that runs it, and its arguments, checked, as autocast wants them."""
    facts, check_values = (), spec.check_values
    if check_values is not None:
        facts = fast_call.facts(spec.name, impl, args)
        function = fast_call.FOUND.get(facts) if facts else None
        if function is not None:
            check_values(args)
            return function, args
    args = _autocast(spec, args)
    if torch_ops.is_jit_tracing():
        with torch_ops.without_tracer_warnings():
            function = _checked(spec, args, impl)
    else:
        function = _checked(spec, args, impl)
    if facts:
        fast_call.remember(facts, function)
    return function, args


def given(impl: str | None, /, **args: Any) -> Any:
    """What a function under ``@op`` returns: the implementation asked for, and the arguments of implementations.

    Typed as anything, for what the function is annotated with is its result.
    """
    return impl, args


def no_values(args: Mapping[str, Any]) -> None:
    """``check_values`` of an op whose arguments may hold anything."""


def op(
    *,
    reference: Callable[..., Any],
    check: Callable[[Mapping[str, Any]], None],
    check_values: Callable[[Mapping[str, Any]], None] | None = None,
    autocast: str | AutocastRule = "keep",
    impls: tuple[Impl, ...] = (),
    ceiling: Mapping[torch.dtype, float] = CEILING,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares an op by its public function, which returns ``given(impl, name=argument, ...)``.

    The function's name is the op's and its package's. What users call applies the autocast rule to these arguments,
    checks them, chooses an implementation and runs it.

    Args:
        reference: the definition.
        check: raises for kinds, dtypes, shapes and devices that no implementation can take.
        check_values: the same for values (of ids, of offsets); where it is given, a call like one before it skips
            ``check``.
        autocast: "lower" (floating arguments go to the autocast dtype), "keep", or a rule of the op's own.
        impls: the implementations, fastest first; the reference is the last, and implied.
        ceiling: dtype -> largest error allowed at all, relative to the largest magnitude of the float64 result,
            so that a bad reference cannot excuse a bad kernel.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        package = function.__module__
        spec = OpSpec(name, package, function, reference, check, check_values, autocast, impls, ceiling)
        for implementation in impls:
            if implementation.name not in IMPL_NAMES:
                raise ValueError(f"ctxfast.{name}: implementation {implementation.name!r} is not one of {IMPL_NAMES}.")
        if name in OPS:
            raise ValueError(f"ctxfast: op {name!r} is registered twice.")
        if isinstance(autocast, str) and autocast not in ("lower", "keep"):
            raise ValueError(f"ctxfast.{name}: autocast is {autocast!r}; expected 'lower', 'keep' or a function.")
        OPS[name] = spec

        declaration: Callable[..., Any] = function

        def run(*args: Any, **kwargs: Any) -> Any:
            impl, gathered = declaration(*args, **kwargs)
            implementation, gathered = prepared(spec, gathered, impl)
            return implementation(**gathered)

        # A code object of its own: torch.compile counts compilations by it, and all ops would share one limit.
        run.__code__ = run.__code__.replace(co_name=name)
        return wraps(function)(run)

    return declare


@dataclass(frozen=True)
class Explanation:
    """Why each implementation of an op runs, or does not run, a given call."""

    op: str
    rows: tuple[tuple[str, str, str], ...]  # implementation, "used" | "could" | "no", reason

    @property
    def used(self) -> str:
        return next(name for name, verdict, _ in self.rows if verdict == "used")

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"{name:<{width}}  {verdict:<5}  {reason}" for name, verdict, reason in self.rows]
        return "\n".join([f"ctxfast.{self.op}:", *("  " + line.rstrip() for line in lines)])

    __repr__ = __str__


def explain(spec: OpSpec, *args: Any, **kwargs: Any) -> Explanation:
    """What ``ctxfast.explain`` says of a call of the public function."""
    impl, gathered = spec.declaration(*args, **kwargs)
    gathered = _autocast(spec, gathered)
    spec.check_all(gathered)
    chosen = resolve(spec, gathered, impl).name
    rows = []
    for candidate in spec.all_impls:
        objection = spec.supports(candidate, gathered)
        verdict = "used" if candidate.name == chosen else "could" if objection is None else "no"
        rows.append((candidate.name, verdict, objection or spec.note(candidate, gathered)))
    return Explanation(spec.name, tuple(rows))
